"""Errors and lists of models in OpenAI's shapes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, cast

import msgspec

_SHOWN: Final = 500  # characters of a server's error message that are told
_encode = msgspec.json.Encoder().encode

_TYPES: Final = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    429: "rate_limit_error",
}


def error_type(status: int) -> str:
    """How OpenAI's protocol names the kind of error that this status is."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return _TYPES.get(status, kind)


def error_body(
    message: str,
    *,
    type: str,  # noqa: A002  # the protocol's word
    code: str | None = None,
    param: str | None = None,
) -> bytes:
    """The protocol's shape of an error."""
    return _encode({"error": {"message": message, "type": type, "param": param, "code": code}})


class _Failure(msgspec.Struct, gc=False):
    """The shapes in which servers that call themselves compatible tell of errors."""

    error: object = None
    message: object = None
    detail: object = None


_failures = msgspec.json.Decoder(_Failure)


def error_text(body: bytes) -> str:
    """What a server says that went wrong; empty when it does not say it in a known way."""
    try:
        failure = _failures.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ""
    for said in (failure.error, failure.message, failure.detail):
        text = cast("dict[str, object]", said).get("message") if isinstance(said, dict) else said
        if isinstance(text, str) and text:
            return text[:_SHOWN]
    return ""


def model_document(name: str, created: int, owned_by: str) -> bytes:
    """`GET /v1/models/{name}`."""
    return _encode(_described(name, created, owned_by))


def models_list(models: Iterable[tuple[str, int, str]]) -> bytes:
    """`GET /v1/models`: of each its name, the Unix time of its making, and who owns it."""
    return _encode({"object": "list", "data": [_described(*model) for model in models]})


def _described(name: str, created: int, owned_by: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": owned_by}
