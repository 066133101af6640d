"""Spans for an OpenTelemetry collector, where the settings name one; by default nothing is sent.

Every gateway worker imports this: no numpy, no SQLAlchemy, no pydantic, and OpenTelemetry's
libraries only where they are used.
"""

from __future__ import annotations

import random
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec

import msgspec

from shipworthy.errors import UsageError
from shipworthy.gateway.credentials import resolve
from shipworthy.gateway.exporter import NO_EXTRA, SpanExporter, export_spans
from shipworthy.gateway.traces import Sampler


class OtlpOptions(msgspec.Struct, frozen=True, kw_only=True):
    """`gateway.otlp` of the settings, for a worker. Headers refer to their values."""

    endpoint: str
    headers: Mapping[str, str]
    sample: float


def check_extra() -> None:
    """UsageError when the packages are not installed that spans need."""
    try:
        found = find_spec("opentelemetry.exporter.otlp.proto.http.trace_exporter")
    except ModuleNotFoundError:  # not even what it is in
        found = None
    if found is None:
        raise UsageError(NO_EXTRA)


@contextmanager
def exporting(options: OtlpOptions | None, worker: str) -> Generator[SpanExporter | None]:
    """What sends spans, None where no collector is set. Leaving sends what waits, for 2 seconds.

    A header that refers to nothing is left out, and the log says so: requests are answered anyway.
    """
    if options is None:
        yield None
        return
    drawn = random.Random()  # noqa: S311  # ids of spans are no secrets, and drawn for each request
    exporter = export_spans(
        options.endpoint,
        {
            name: value
            for name, reference in options.headers.items()
            if (value := resolve(reference)) is not None
        },
        sampler=Sampler(options.sample, uniform=drawn.random, bits=drawn.getrandbits),
        worker=worker,
    )
    try:
        yield exporter
    finally:
        exporter.close()
