"""Looks at a server elsewhere that is to become a release: what it speaks, serves and answers.

An OpenAI server is told by its list of models, one that speaks the Open Inference Protocol by its
health, one that scores for MLflow by its ping. Then it is asked, so that its contract is what it
was seen to do.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import msgspec

from shipworthy.domain.contract import ANY, OPERATIONS, Contract, Datatype, Operation, Tensor
from shipworthy.errors import RuntimeFailed, Unavailable, UsageError
from shipworthy.ports import HttpClient, HttpResponse
from shipworthy.protocols import oip
from shipworthy.protocols.messages import InvalidMessage
from shipworthy.protocols.mlflow import Scoring, error_text
from shipworthy.protocols.openai import error_text as openai_error_text
from shipworthy.protocols.openai import read_answer
from shipworthy.protocols.packed import flattened
from shipworthy.protocols.questions import PATHS, addressed, operation_of, plain_request
from shipworthy.runtimes.endpoint import listed_models
from shipworthy.runtimes.inspection import inspect_endpoint
from shipworthy.runtimes.samples import Inputs, Sample, inputs_from

_ROWS: Final = 4
_PATIENCE: Final = 120.0  # seconds; a cold language model is slow with its first words
_OPENAI_URL: Final = re.compile(
    r"(?P<base>.*?/v1)(?:/(?:models|chat/completions|completions|embeddings))?"
)


@dataclass(frozen=True, kw_only=True)
class ServerInspection:
    """What a server was seen to serve.

    `model` is its own name there, None where it tells none. `requests` are what it was asked: for
    a language model bodies in OpenAI's protocol, for MLflow's scoring one in its own. `seen` is a
    sentence for people.
    """

    base_url: str
    model: str | None
    contract: Contract
    seen: str
    requests: tuple[bytes, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Asking:
    """How a server is to be looked at.

    `model` is its name there; where a protocol has no list of them `name`, which is ours, stands in
    for it. `rows` is a file of samples for tensors, and `requests` are those for a language model,
    where others than the plainest are to be asked. `credential` is sent as a token.
    """

    url: str
    model: str | None = None
    name: str | None = None
    credential: str | None = None
    rows: Path | None = None
    requests: Sequence[bytes] = ()


async def inspect_server(asking: Asking, http: HttpClient) -> ServerInspection:
    """Find out which protocol the server speaks, and ask it.

    UsageError when a name or a sample has to be given, Unavailable when it does not answer, and
    RuntimeFailed when what it answers is none of the protocols.
    """
    server = _Server(asking, http)
    named = _OPENAI_URL.fullmatch(server.url)
    if "/v2" in server.url:
        return await _tensors(asking, http)
    if named is not None:
        return await _language(server, named["base"])
    if server.url.endswith("/invocations"):
        return await _scoring(server, server.url.removesuffix("/invocations"))
    if listed_models((await server.get(f"{server.url}/v1/models")).body):
        return await _language(server, f"{server.url}/v1")
    if (await server.get(f"{server.url}/v2/health/ready")).status == 200:
        return await _tensors(asking, http)
    if (await server.get(f"{server.url}/ping")).status == 200:
        return await _scoring(server, server.url)
    raise RuntimeFailed(
        f"{server.url} speaks none of the protocols: it lists no models at /v1/models, and is ready"
        " neither at /v2/health/ready nor at /ping; check the address"
    )


class _Server:
    """A server that is asked, each time with its credential."""

    def __init__(self, asking: Asking, http: HttpClient) -> None:
        self.asking = asking
        self.url = asking.url.rstrip("/")
        self._http = http
        self._headers = {"content-type": "application/json"}
        if asking.credential:
            self._headers["authorization"] = f"Bearer {asking.credential}"

    async def get(self, url: str) -> HttpResponse:
        """What it says; RuntimeFailed when it wants another credential."""
        response = await self._http.request("GET", url, headers=self._headers)
        if response.status in (401, 403):
            wants = "refuses the credential" if self.asking.credential else "wants a credential"
            raise RuntimeFailed(
                f"{self.url} {wants} (HTTP {response.status}); name its token with --credential"
                " env:NAME"
            )
        return response

    async def post(self, url: str, body: bytes) -> HttpResponse:
        """What it answers."""
        return await self._http.request(
            "POST", url, headers=self._headers, body=body, timeout=_PATIENCE
        )


# --- the Open Inference Protocol --------------------------------------------------------------


async def _tensors(asking: Asking, http: HttpClient) -> ServerInspection:
    seen = await inspect_endpoint(
        asking.url,
        http,
        credential=asking.credential,
        model=asking.model or asking.name or asking.name,
    )
    what = f"{seen.base_url} serves {seen.model} ({seen.platform or seen.server})."
    return ServerInspection(
        base_url=seen.base_url, model=seen.model, contract=seen.contract, seen=what
    )


# --- language models --------------------------------------------------------------------------


async def _language(server: _Server, base: str) -> ServerInspection:
    listed = await server.get(f"{base}/models")
    models = listed_models(listed.body)
    if not models:
        raise RuntimeFailed(
            f"{base}/models lists no models (HTTP {listed.status}); wait until the server has"
            " loaded its model, or check the address"
        )
    model = _chosen(base, models, server.asking.model)
    answered: dict[Operation, bytes] = {}
    refused: list[str] = []
    for request in _requests(server.asking):
        operation = operation_of(request)
        problem = await _asked(server, base, operation, addressed(request, model))
        if not problem:
            answered.setdefault(operation, request)
        else:
            refused.append(f"{operation}: {problem}")
    if not answered:
        raise RuntimeFailed(
            f"{base} lists {model} but answers nothing ({'; '.join(refused)}); see to the server,"
            " or give requests that it answers with --sample"
        )
    return ServerInspection(
        base_url=base,
        model=model,
        contract=Contract(protocol="openai", operations=tuple(answered)),
        seen=f"{base} serves {model}, and answered {', '.join(answered)}.",
        requests=tuple(answered.values()),
    )


def _chosen(base: str, models: Sequence[str], wanted: str | None) -> str:
    """The model to ask: an adapter (LoRA) has a name of its own in the list."""
    several = f"{', '.join(models[:10])}{', …' if len(models) > 10 else ''}"
    if wanted is not None and wanted not in models:
        raise UsageError(f"{base} does not list {wanted!r}; it lists {several}")
    if wanted is None and len(models) > 1:
        raise UsageError(f"{base} serves several models; name one with --served-model: {several}")
    return wanted or models[0]


def _requests(asking: Asking) -> list[bytes]:
    """What is asked: the person's own, and the plainest of each operation that these leave out."""
    given = list(asking.requests)
    there = {operation_of(request) for request in given}
    return given + [plain_request(one) for one in OPERATIONS if one not in there]


async def _asked(server: _Server, base: str, operation: Operation, body: bytes) -> str:
    """Why there was no answer; empty when there was one."""
    try:
        response = await server.post(base + PATHS[operation], body)
    except (Unavailable, TimeoutError) as error:
        return str(error) or "no answer in time"
    if response.status != 200:
        return f"HTTP {response.status} {openai_error_text(response.body)[:200]}".strip()
    return read_answer(operation, response.body).problem


# --- MLflow's scoring -------------------------------------------------------------------------


async def _scoring(server: _Server, base: str) -> ServerInspection:
    rows = server.asking.rows
    if rows is None:
        raise UsageError(
            f"{base} scores for MLflow, and such a server does not tell what it takes; give a few"
            " rows with --sample rows.csv"
        )
    version = await server.get(f"{base}/version")
    tensors = _inputs(Sample.read(rows)).tensors
    inputs = tuple(Tensor(one.name, one.datatype, (ANY, *one.shape[1:])) for one in tensors)
    asked = Scoring(Contract(inputs=inputs, protocol="mlflow")).write_request(tensors)
    response = await server.post(f"{base}/invocations", asked)
    if response.status != 200:
        said = error_text(response.body)[:300] or "no reason"
        raise RuntimeFailed(
            f"{base} refuses the rows of {rows.name} (HTTP {response.status}: {said}); give rows as"
            " the model was trained on"
        )
    contract = Contract(inputs=inputs, outputs=_outputs(base, response.body), protocol="mlflow")
    try:
        request = oip.decode_request(oip.encode_request(tensors))
        Scoring(contract).read_response(response.body, request)
    except InvalidMessage as problem:
        raise _by_hand(base, str(problem)) from None
    by = f"MLflow {version.body.decode(errors='replace').strip()[:40]}"
    return ServerInspection(
        base_url=base,
        model=server.asking.model or server.asking.name,
        contract=contract,
        seen=f"{base} scores for {by if version.status == 200 else 'MLflow'}; it does not tell"
        " which model it serves.",
        requests=(asked,),
    )


def _inputs(sample: Sample) -> Inputs:
    """Columns by their names; rows without names are one matrix."""
    if sample.columns is not None or sample.tensors:
        return inputs_from(sample, {}, rows=_ROWS)
    return inputs_from(sample, {"features": len(sample.rows[0])}, rows=_ROWS)


def _outputs(base: str, body: bytes) -> tuple[Tensor, ...]:
    """What the predictions are, by their first rows."""
    try:
        said: Any = msgspec.json.decode(body, type=dict[str, Any]).get("predictions")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        said = None
    records = _records(said)
    if records:
        return tuple(_output(base, name, [row.get(name) for row in records]) for name in records[0])
    if isinstance(said, dict):
        named = msgspec.convert(said, dict[str, Any])
        return tuple(_output(base, name, values) for name, values in named.items())
    return (_output(base, "predictions", said),)


def _records(said: Any) -> list[dict[str, Any]]:
    try:
        return msgspec.convert(said, list[dict[str, Any]])
    except msgspec.ValidationError:
        return []


def _output(base: str, name: str, values: Any) -> Tensor:
    shape: list[int] = []
    inner: Any = values
    while isinstance(inner, list) and inner:
        rows = cast("list[Any]", inner)
        shape.append(len(rows))
        inner = rows[0]
    if not shape:
        raise _by_hand(base, f"its predictions of {name} are no list")
    try:
        flat = flattened(values)
    except TypeError:
        raise _by_hand(base, f"its predictions of {name} are lists and single values") from None
    return Tensor(name, _datatype(flat), (ANY, *shape[1:]))


def _datatype(values: Sequence[Any]) -> Datatype:
    if all(isinstance(value, bool) for value in values):
        return "BOOL"
    if all(isinstance(value, int) and not isinstance(value, bool) for value in values):
        return "INT64"
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return "FP64"
    return "BYTES"


def _by_hand(base: str, problem: str) -> RuntimeFailed:
    return RuntimeFailed(
        f"no contract can be made of what {base} answers ({problem}); write it in release.yaml by"
        " hand"
    )
