"""Credentials for upstream servers, by reference: the snapshot and the logs never hold a secret."""

from __future__ import annotations

import logging
import os
from pathlib import Path

_log = logging.getLogger("shipworthy.gateway")


def resolve(reference: str | None) -> str | None:
    """What `env:NAME` or `file:PATH` stands for; None, and a log line, when there is nothing.

    An endpoint whose credential is missing is called without one: it will say so itself.
    """
    if reference is None:
        return None
    kind, _, where = reference.partition(":")
    value = ""
    if kind == "env":
        value = os.environ.get(where, "")
    elif kind == "file":
        try:
            value = Path(where).read_text(encoding="utf-8").strip()
        except (OSError, ValueError):
            value = ""
    if not value or not value.isascii() or not value.isprintable():
        _log.error(
            "the credential %s holds nothing that can be sent; set it, and publish the plan again"
            " or restart 'shipworthy up'",
            f"{kind}:{where}" if kind in ("env", "file") else "of an endpoint",
        )
        return None
    return value


def bearer(secret: str | None) -> dict[str, str]:
    """The header that carries it."""
    return {} if secret is None else {"Authorization": f"Bearer {secret}"}
