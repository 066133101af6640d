"""The collector that spans are sent to: OpenTelemetry's libraries, which are the extra `otlp`.

No gateway worker without a collector imports this: it brings protobuf and requests.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Final

import requests
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState

from shipworthy import __version__
from shipworthy.gateway.spans import Span

_PATH: Final = "/v1/traces"
_SCHEMA: Final = "https://opentelemetry.io/schemas/1.41.1"
_MAX_PROBLEM: Final = 300
_NANO: Final = 1_000_000_000
_SAMPLED: Final = TraceFlags(TraceFlags.SAMPLED)
_FINE: Final = Status(StatusCode.UNSET)
_ERROR: Final = Status(StatusCode.ERROR)


class OtlpCollector:
    """Speaks OTLP over HTTP with the collector at `endpoint`, a base address.

    A call takes up to `seconds`, with all its repetitions. `worker` tells this process from others.
    """

    def __init__(
        self, endpoint: str, headers: Mapping[str, str], *, worker: str, seconds: float
    ) -> None:
        self._resource = Resource.create(
            {
                "service.name": "shipworthy-gateway",
                "service.version": __version__,
                "service.instance.id": worker,
            },
            _SCHEMA,
        )
        self._scope = InstrumentationScope("shipworthy.gateway", __version__, _SCHEMA)
        self._session = _Session()
        self._exporter = OTLPSpanExporter(
            endpoint.rstrip("/").removesuffix(_PATH) + _PATH,
            headers=headers,
            timeout=seconds,
            session=self._session,
        )
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # once per batch is too often

    def send(self, spans: Sequence[Span]) -> str | None:
        """What went wrong, None if the collector took them."""
        self._session.problem = ""
        result = self._exporter.export([self._readable(span) for span in spans])
        if result is SpanExportResult.SUCCESS:
            return None
        return self._session.problem or "they can't be written as protobuf"

    def close(self) -> None:
        """End the wait for a repetition; calls from now on fail."""
        self._exporter.shutdown()

    def _readable(self, span: Span) -> ReadableSpan:
        trace = int(span.trace_id, 16)
        state = TraceState.from_header([span.state.decode()]) if span.state else None
        own = SpanContext(trace, span.id, is_remote=False, trace_flags=_SAMPLED, trace_state=state)
        above = None
        if span.parent:
            above = SpanContext(trace, span.parent, is_remote=span.serves, trace_flags=_SAMPLED)
        return ReadableSpan(
            span.name,
            context=own,
            parent=above,
            resource=self._resource,
            attributes=span.attributes,
            kind=SpanKind.SERVER if span.serves else SpanKind.CLIENT,
            status=_ERROR if span.failed else _FINE,
            start_time=int(span.start * _NANO),
            end_time=int(span.end * _NANO),
            instrumentation_scope=self._scope,
        )


class _Session(requests.Session):
    """Keeps what went wrong last, which the library only logs."""

    def __init__(self) -> None:
        super().__init__()
        self.problem = ""
        self.auth = _as_it_is  # else a line in ~/.netrc would replace the header that was set

    def send(self, request: requests.PreparedRequest, **options: Any) -> requests.Response:
        """Send; a redirect is an error, since the library takes it for success."""
        try:
            response = super().send(request, **options)
        except requests.RequestException as error:
            self.problem = str(error)[:_MAX_PROBLEM]
            raise
        if response.status_code >= 300:
            self.problem = f"it answers {response.status_code} {response.reason}"[:_MAX_PROBLEM]
            if response.status_code < 400:
                raise requests.exceptions.InvalidURL(self.problem)
        return response


def _as_it_is(request: requests.PreparedRequest) -> requests.PreparedRequest:
    return request
