"""The Open Inference Protocol v2 in front of one release.

Started as `python -m shipworthy.runtimes.model_server`, or by people as `shipworthy serve`. It
verifies the release's files, has the release's own interpreter load them (`model_host`), checks
each request against the contract and answers. What the model rejects although the contract accepts
it is the release's failure: 500, and 504 when it takes too long. 503 with `Retry-After` means that
the model is being loaded or that the queue is full.

`GET /v2/models/{model}` also has `parameters`, beyond the protocol: `release` (`digits@3`),
`digest` (of the manifest that this process has loaded and verified the files against), `engine`
and `engine_version`. So whoever asks knows which release answers.

Tensors may come and go in binary, as the protocol's extension has it (`oip_binary`).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import json
import logging
import random
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Generator, MutableMapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import msgspec
import uvicorn
import uvloop

import shipworthy
from shipworthy.domain.contract import ANY, Tensor
from shipworthy.domain.manifest import Manifest
from shipworthy.errors import RuntimeFailed, ShipworthyError
from shipworthy.protocols import oip, oip_binary
from shipworthy.protocols.packed import Packed
from shipworthy.runtimes.folder import model_of, verify
from shipworthy.runtimes.hosts import (
    Busy,
    Host,
    HostDied,
    HostPool,
    NotReady,
    PredictFailed,
    TookTooLong,
)
from shipworthy.runtimes.orphans import wake_when_orphaned

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Headers = tuple[tuple[bytes, bytes], ...]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """What a model server must know.

    `folder` holds the release's artifacts, `manifest` is its manifest's JSON file, `release` its
    name (`digits@3`). `workers` requests run at once and `queue` more may wait; `timeout`,
    `load_timeout` and `grace` (to finish requests when stopping) are in seconds, `max_body` in
    bytes. `port` 0 takes a free one. `ready_file` is written as `{"url"}` once it takes requests
    (ready or not), or `{"problem"}`. `watch_stdin`: end when stdin does, so that this process never
    outlives the one that started it.
    """

    folder: Path
    manifest: Path
    release: str
    interpreter: Path = Path(sys.executable)
    host: str = "127.0.0.1"
    port: int = 0
    workers: int = 1
    queue: int = 512
    timeout: float = 30.0
    load_timeout: float = 300.0
    max_body: int = 16 * 1024 * 1024
    grace: float = 10.0
    ready_file: Path | None = None
    watch_stdin: bool = False


class Refusal(Exception):
    """An HTTP answer other than the result."""

    def __init__(
        self, status: int, message: str, headers: Sequence[tuple[bytes, bytes]] = ()
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers


_RETRY = ((b"retry-after", b"1"),)
_JSON: Headers = ((b"content-type", b"application/json"),)
_LENGTH = oip_binary.HEADER.lower().encode()


class ModelServer:
    """The ASGI application of one release."""

    def __init__(self, manifest: Manifest, release: str, pool: HostPool, *, max_body: int) -> None:
        self._manifest = manifest
        self._release = release
        self._version = release.rpartition("@")[2]
        self._digest = manifest.digest()
        self._pool = pool
        self._max_body = max_body
        self._checker = oip.ContractChecker(manifest.contract)
        self._outputs = {tensor.name: tensor for tensor in manifest.contract.outputs}
        self.draining = False

    @property
    def ready(self) -> bool:
        """Whether a request would be answered now."""
        return self._pool.ready and not self.draining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one HTTP request."""
        if scope["type"] != "http":
            return
        headers = _JSON
        try:
            if _parts(scope)[3:][-1:] == ["infer"]:  # and no model of that name
                status = 200
                body, headers = await self._inferred(scope, receive)
            else:
                status, body = self._answer(scope)
        except Refusal as refusal:
            status, body = refusal.status, oip.error_body(str(refusal))
            headers = (*_JSON, *refusal.headers)
        except Exception as error:  # noqa: BLE001  # an answer, whatever it was
            _log.exception("a request failed in the server")
            status, body = 500, oip.error_body(f"the model server failed ({type(error).__name__})")
        start = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": [*start, *headers]})
        await send({"type": "http.response.body", "body": body})

    async def _inferred(self, scope: Scope, receive: Receive) -> tuple[bytes, Headers]:
        parts = _parts(scope)
        if parts[:2] != ["v2", "models"] or self._of_model(parts[2:]) != "infer":
            raise self._nothing_here(scope)
        _only(scope, "POST")
        length = next((value for name, value in scope["headers"] if name == _LENGTH), None)
        body, length = await self._infer(await self._body(scope, receive), length)
        if length is None:
            return body, _JSON
        binary = (b"content-type", oip_binary.CONTENT_TYPE.encode())
        return body, (binary, (_LENGTH, str(length).encode()))

    def _answer(self, scope: Scope) -> tuple[int, bytes]:
        parts = _parts(scope)
        if parts[:2] == ["v2", "models"] and len(parts) > 2:
            what = self._of_model(parts[2:])
            _only(scope, "GET", "HEAD")
            if what == "ready":
                body = oip.model_ready(self._manifest.model, ready=self.ready)
                return (200 if self.ready else 503), body
            return 200, self._metadata()
        _only(scope, "GET", "HEAD")
        if parts == ["v2"]:
            return 200, oip.server_metadata("shipworthy", shipworthy.__version__)
        if parts == ["v2", "health", "live"]:
            return 200, oip.server_live(live=True)
        if parts == ["v2", "health", "ready"]:
            return (200 if self.ready else 503), oip.server_ready(ready=self.ready)
        raise self._nothing_here(scope)

    def _nothing_here(self, scope: Scope) -> Refusal:
        return Refusal(
            404, f"there is no {scope['path']} here; see /v2/models/{self._manifest.model}"
        )

    def _of_model(self, parts: list[str]) -> str:
        """What is asked of our model: `infer`, `ready` or nothing, for its metadata."""
        if parts[0] != self._manifest.model:
            raise Refusal(404, f"no model {parts[0]!r} here; this is {self._release}")
        rest = parts[1:]
        if rest[:1] == ["versions"] and len(rest) > 1:
            if rest[1] != self._version:
                raise Refusal(404, f"no version {rest[1]!r} here; this is {self._release}")
            rest = rest[2:]
        if len(rest) > 1 or rest not in ([], ["infer"], ["ready"]):
            raise Refusal(404, f"a model has /infer and /ready, and no /{'/'.join(rest)}")
        return rest[0] if rest else ""

    def _metadata(self) -> bytes:
        manifest, inference = self._manifest, self._manifest.inference
        document: dict[str, Any] = msgspec.json.decode(
            oip.model_metadata(
                manifest.model,
                manifest.contract,
                versions=[self._version],
                platform=f"shipworthy_{inference.engine}",
            )
        )
        document["parameters"] = {
            "release": self._release,
            "digest": self._digest,
            "engine": inference.engine,
            "engine_version": inference.engine_version,
        }
        return msgspec.json.encode(document)

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        limit = self._max_body
        too_large = Refusal(413, f"the body is larger than {limit} bytes; send fewer rows at once")
        for name, value in scope["headers"]:
            if name == b"content-length" and int(value) > limit:
                raise too_large
        chunks: list[bytes] = []
        size = 0
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Refusal(400, "the client went away while it sent the body")
            chunk: bytes = message.get("body", b"")
            size += len(chunk)
            if size > limit:
                raise too_large
            chunks.append(chunk)
            more = message.get("more_body", False)
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    async def _infer(self, body: bytes, length: bytes | None) -> tuple[bytes, int | None]:
        """The answer, and its JSON's length when there is binary data behind that."""
        if self.draining:
            raise Refusal(503, "this server is stopping; try another", _RETRY)
        try:
            json = None if length is None else oip_binary.header_length(length)
            request = oip_binary.decode_request(body, json)
            inputs = self._checker.check_request(request)
            _check_texts(inputs)
            binary = oip_binary.wants_binary(request, self._outputs)
        except oip.InvalidMessage as error:
            raise Refusal(400, str(error)) from None
        wanted = [output.name for output in request.outputs] if request.outputs else None
        try:
            outputs = await self._pool.predict(inputs, wanted)
        except (NotReady, Busy) as error:
            raise Refusal(503, f"{error}; try again", _RETRY) from None
        except TookTooLong as error:
            raise Refusal(504, str(error)) from None
        except (PredictFailed, HostDied) as error:
            raise Refusal(500, str(error)) from None
        broken = self._broken(outputs, wanted)
        if broken is not None:
            raise Refusal(500, f"the model broke its contract: {broken}")
        name, version = self._manifest.model, self._version
        if not binary:
            return oip.encode_response(
                outputs, model_name=name, model_version=version, id=request.id
            ), None
        return oip_binary.encode_response(
            outputs, model_name=name, model_version=version, id=request.id, binary=binary
        )

    def _broken(self, outputs: list[oip.TensorValues], wanted: list[str] | None) -> str | None:
        """How the answer differs from what the contract promises."""
        given = {output.name for output in outputs}
        names = wanted or [name for name, tensor in self._outputs.items() if not tensor.optional]
        for name in names:
            if name not in given:
                return f"it returned no {name!r}"
        for output in outputs:
            promised = self._outputs.get(output.name)
            if promised is None or not _keeps(output, promised):
                shape = f"{output.datatype} {list(output.shape)}"
                return f"{output.name!r} came as {shape}; promised is {_told(promised)}"
        return None


def _parts(scope: Scope) -> list[str]:
    return str(scope["path"]).strip("/").split("/")


def _check_texts(inputs: Sequence[oip.TensorValues]) -> None:
    """The hosts read BYTES as str, and binary data may hold what is none."""
    for index, tensor in enumerate(inputs):
        if tensor.datatype == "BYTES" and isinstance(tensor.data, Packed):
            problem = tensor.data.json_problem()
            if problem is not None:
                raise oip.ContractViolation(f"inputs[{index}]: {problem}; send text in UTF-8")


def _only(scope: Scope, *methods: str) -> None:
    if scope["method"] not in methods:
        raise Refusal(405, f"use {methods[0]} here", ((b"allow", ", ".join(methods).encode()),))


def _keeps(output: oip.TensorValues, promised: Tensor) -> bool:
    return (
        output.datatype == promised.datatype
        and len(output.shape) == len(promised.shape)
        and all(
            want in (ANY, size) for size, want in zip(output.shape, promised.shape, strict=True)
        )
    )


def _told(promised: Tensor | None) -> str:
    return "nothing" if promised is None else f"{promised.datatype} {list(promised.shape)}"


# --- the process ------------------------------------------------------------------------------


class _Server(uvicorn.Server):
    """Leaves signals to us: uvicorn would raise them again before the hosts are ended."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


async def serve(options: ServeOptions) -> None:
    """Serve until SIGTERM or SIGINT, or until stdin ends when that is watched.

    RuntimeFailed or IntegrityError when the model does not load at the start.
    """
    manifest = Manifest.model_validate_json(options.manifest.read_bytes())
    model = model_of(manifest)
    await asyncio.to_thread(verify, manifest, options.folder)
    start = functools.partial(
        Host.start, options.interpreter, options.folder, model, options.load_timeout
    )
    pool = HostPool(
        start,
        size=options.workers,
        queue=options.queue,
        timeout=options.timeout,
        rng=random.Random(),  # noqa: S311  # spreads restarts, hides nothing
    )
    application = ModelServer(manifest, options.release, pool, max_body=options.max_body)
    with _bound(options) as listener:
        server = _Server(
            uvicorn.Config(
                application,
                lifespan="off",
                access_log=False,
                log_config=None,
                server_header=False,
                timeout_graceful_shutdown=max(1, round(options.grace)),
            )
        )
        await _run(server, application, pool, listener, options)


async def _run(
    server: _Server,
    application: ModelServer,
    pool: HostPool,
    listener: socket.socket,
    options: ServeOptions,
) -> None:
    loop = asyncio.get_running_loop()

    def stop() -> None:
        application.draining = True
        server.should_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    if options.watch_stdin:
        await _at_end_of_stdin(stop)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    _tell(options, {"url": _url(listener)})
    loading = asyncio.create_task(pool.open())
    try:
        await asyncio.wait((serving, loading), return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            host = loading.result()
            _log.info("%s is loaded (%s %s)", options.release, host.engine, host.engine_version)
            await serving
    finally:
        loading.cancel()
        stop()
        await serving
        with contextlib.suppress(asyncio.CancelledError, ShipworthyError):
            await loading
        await pool.close()


def _bound(options: ServeOptions) -> socket.socket:
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((options.host, options.port))
        listener.listen(1_024)  # from now on clients are kept waiting, not refused
    except OSError as error:
        listener.close()
        raise RuntimeFailed(
            f"can't listen on {options.host}:{options.port} ({error.strerror}); choose another port"
        ) from error
    return listener


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _tell(options: ServeOptions, what: dict[str, str]) -> None:
    if options.ready_file is None:
        return
    draft = options.ready_file.with_suffix(".new")
    draft.write_text(json.dumps(what))
    draft.replace(options.ready_file)


async def _at_end_of_stdin(stop: Callable[[], None]) -> None:
    class Watch(asyncio.Protocol):
        def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
            stop()

    await asyncio.get_running_loop().connect_read_pipe(Watch, sys.stdin)
    wake_when_orphaned()


def run(options: ServeOptions) -> int:
    """`serve` as a process does it: logs to stderr, problems there and in the ready file."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    try:
        uvloop.run(serve(options))
    except ShipworthyError as error:
        _log.error("%s", error)
        _tell(options, {"problem": str(error)})
        return error.exit_code
    return 0


def main(arguments: Sequence[str]) -> int:
    """The command line that the process runtime uses; its options are ServeOptions' fields."""
    parser = argparse.ArgumentParser(prog="model_server", description=ServeOptions.__doc__)
    for field in fields(ServeOptions):
        option = "--" + field.name.replace("_", "-")
        if field.name == "watch_stdin":
            parser.add_argument(option, action="store_true")
        elif field.default is MISSING:
            parser.add_argument(option, required=True, type=_OPTION_TYPES[str(field.type)])
        else:
            kind = _OPTION_TYPES[str(field.type)]
            parser.add_argument(option, type=kind, default=field.default)
    return run(ServeOptions(**vars(parser.parse_args(arguments))))


_OPTION_TYPES: dict[str, Callable[[str], Any]] = {
    "Path": Path, "Path | None": Path, "str": str, "int": int, "float": float,
}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
