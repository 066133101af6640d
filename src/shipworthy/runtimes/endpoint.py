"""The `endpoint` runtime: a release that a server elsewhere answers for.

Nothing is started; each URL is probed, and counts as a replica while it is ready.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Final
from urllib.parse import quote

import msgspec

from shipworthy.domain.contract import Protocol
from shipworthy.domain.lifecycle import Deployment, Release
from shipworthy.domain.manifest import EndpointServing, Manifest
from shipworthy.errors import RuntimeFailed, ShipworthyError, Unavailable
from shipworthy.ports import HttpClient, HttpResponse
from shipworthy.protocols.questions import base_of

_EVERY: Final = 5.0  # seconds between probes
_PATIENCE: Final = 3  # failed probes in a row before it counts as a problem


class EndpointRuntime:
    """Watches servers elsewhere. Implements ports.Runtime."""

    def __init__(self, http: HttpClient, *, every: float = _EVERY) -> None:
        self._http = http
        self._every = every

    async def start(self, release: Release, deployment: Deployment) -> tuple[EndpointReplica, ...]:  # noqa: ARG002
        """Begin to probe each of the manifest's URLs."""
        manifest = Manifest.model_validate(release.manifest)
        serving, protocol = manifest.serving, manifest.contract.protocol
        if not isinstance(serving, EndpointServing):
            raise RuntimeFailed(f"{release.name} has no endpoint; use the process runtime")
        return tuple(
            EndpointReplica(url, serving, protocol, self._http, self._every) for url in serving.urls
        )


class EndpointReplica:
    """One URL. Implements ports.RunningReplica."""

    def __init__(
        self,
        url: str,
        serving: EndpointServing,
        protocol: Protocol,
        http: HttpClient,
        every: float,
    ) -> None:
        self._where = url
        self._serving = serving
        self._protocol: Protocol = protocol
        self._http = http
        self._every = every
        self._url: str | None = None
        self._problem: str | None = None
        self._probing = asyncio.create_task(self._watch())

    @property
    def url(self) -> str | None:
        """The manifest's URL while it is ready."""
        return self._url

    @property
    def problem(self) -> str | None:
        """Why it does not answer, in one sentence; None while it is not known yet or ready."""
        return self._problem

    @property
    def doing(self) -> str:
        """What goes on now, for people."""
        return self._problem or ("ready" if self._url else "waiting for it to answer")

    def last_lines(self, count: int = 20) -> list[str]:  # noqa: ARG002
        """Nothing: its log is elsewhere."""
        return []

    async def stop(self, grace: float) -> None:  # noqa: ARG002
        """Stop probing; the server goes on."""
        self._probing.cancel()
        await asyncio.gather(self._probing, return_exceptions=True)
        self._url = None

    async def _watch(self) -> None:
        failed = 0
        while True:
            try:
                await probe(self._where, self._serving, self._protocol, self._http)
            except ShipworthyError as error:
                failed += 1
                if failed >= _PATIENCE:
                    self._url, self._problem = None, str(error)
            else:
                failed = 0
                self._url, self._problem = self._where, None
            await asyncio.sleep(self._every)


async def probe(url: str, serving: EndpointServing, protocol: Protocol, http: HttpClient) -> None:
    """Whether the server answers for the model: RuntimeFailed or Unavailable says why not.

    An OpenAI server has to list the model. One that scores for MLflow tells only that it is up: it
    serves one model, and has no name for it.
    """
    name = serving.served_model
    response = await _get(
        url, _READY[protocol].format(quote(name, safe="")), serving, protocol, http
    )
    if response.status in (401, 403):
        raise RuntimeFailed(f"{url} refuses our credential (HTTP {response.status}); renew it")
    if response.status != 200:
        raise RuntimeFailed(
            f"{url} is not ready for {name!r} (HTTP {response.status}); see to the server"
        )
    if protocol == "openai" and name not in listed_models(response.body):
        raise RuntimeFailed(f"{url} does not list {name!r}; correct serving.served_model")


async def reported_model(
    url: str, serving: EndpointServing, protocol: Protocol, http: HttpClient
) -> str | None:
    """What the server says that it serves under the name of the release: the very name if so.

    None when it says nothing, as an MLflow server never does. Unavailable when it does not answer.
    """
    if protocol == "mlflow":
        return None
    name = serving.served_model
    path = _NAMED[protocol].format(quote(name, safe=""))
    response = await _get(url, path, serving, protocol, http)
    if response.status != 200:
        return f"nothing (HTTP {response.status})"
    if protocol == "openai":
        models = listed_models(response.body)
        return name if name in models else ", ".join(models) or None
    try:
        return msgspec.json.decode(response.body, type=_Named).name
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


_READY: Final[dict[Protocol, str]] = {
    "openai": "/models",
    "mlflow": "/ping",
    "oip-v2": "/v2/models/{}/ready",
}
_NAMED: Final[dict[Protocol, str]] = {"openai": "/models", "oip-v2": "/v2/models/{}"}


async def _get(
    url: str, path: str, serving: EndpointServing, protocol: Protocol, http: HttpClient
) -> HttpResponse:
    try:
        return await http.request(
            "GET", base_of(url, protocol) + path, headers=authorisation(serving)
        )
    except TimeoutError:
        raise Unavailable(f"{url} does not answer in time; see to the server") from None


class _Named(msgspec.Struct):
    name: str


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: tuple[_Model, ...]


def listed_models(body: bytes) -> tuple[str, ...]:
    """The names in an OpenAI server's list; none when it is no such list."""
    try:
        return tuple(model.id for model in msgspec.json.decode(body, type=_Models).data)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return ()


def authorisation(serving: EndpointServing) -> dict[str, str]:
    """The header that carries the server's credential, if it has one."""
    if serving.credential is None:
        return {}
    return {"authorization": f"Bearer {read_credential(serving.credential)}"}


def read_credential(reference: str) -> str:
    """The secret behind `env:NAME` or `file:PATH`; RuntimeFailed when there is none."""
    kind, _, where = reference.partition(":")
    if kind == "env":
        secret = os.environ.get(where, "")
    else:
        try:
            secret = Path(where).read_text(encoding="utf-8", errors="replace").strip()
        except OSError as error:
            raise RuntimeFailed(
                f"the credential {reference} can't be read ({error.strerror}); check the path"
            ) from error
    if not secret:
        raise RuntimeFailed(f"the credential {reference} is empty; set it where this process runs")
    if not (secret.isascii() and secret.isprintable()):
        raise RuntimeFailed(
            f"the credential {reference} holds characters that no header can carry; set it to one"
            " line of plain text"
        )
    return secret
