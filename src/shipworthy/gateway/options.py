"""What a gateway worker can be told: addresses and limits. All have safe defaults."""

from __future__ import annotations

from pathlib import Path

import msgspec


class Tls(msgspec.Struct, frozen=True, kw_only=True):
    """Where the certificate chain and its private key are, as PEM; looked at again each second."""

    certificate: Path
    key: Path


class GatewayOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of one worker process. Sizes are in bytes, times in seconds.

    `port` 0 takes any free one; `ready_file` then says which, as JSON with `host`, `port` and
    `pid`, once the worker listens. With `tls` only HTTPS is spoken.

    `sockets` are descriptors of listening sockets that were inherited; then nothing is bound here.
    `relay` are those of both ends of a pair of datagram sockets that all workers of the port have:
    through it, one that ends gives the connections that clients keep to the others.
    This is worker `worker_index` of `workers` on a host: endpoints' concurrency is shared out.

    `max_in_flight` and `max_queued` bound the calls under way to one arm of one plan and those
    waiting for their turn for at most `queue_seconds`. `max_buffered` bounds the bodies of all
    requests that are being read or answered.

    An endpoint is set aside after `eject_after` failures in a row, for `eject_seconds` at first
    and up to `max_eject_seconds`, until it answers a health request.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    sockets: tuple[int, ...] = ()
    relay: tuple[int, int] | None = None
    tls: Tls | None = None
    worker_index: int = 0
    workers: int = 1
    ready_file: Path | None = None
    access_log: bool = False

    max_body: int = 10 * 1024 * 1024
    max_feedback: int = 64 * 1024
    max_response: int = 64 * 1024 * 1024
    max_event: int = 4 * 1024 * 1024
    max_buffered: int = 512 * 1024 * 1024
    body_seconds: float = 10.0

    max_connections: int = 1024
    max_headers: int = 64
    max_head: int = 32 * 1024
    max_request_line: int = 8 * 1024
    head_seconds: float = 5.0
    keep_alive_seconds: float = 75.0
    slow_reader_seconds: float = 30.0

    max_in_flight: int = 1024
    max_queued: int = 256
    queue_seconds: float = 1.0

    eject_after: int = 5
    eject_seconds: float = 1.0
    max_eject_seconds: float = 30.0

    snapshot_seconds: float = 0.1
    unready_seconds: float = 0.0
    drain_seconds: float = 20.0
