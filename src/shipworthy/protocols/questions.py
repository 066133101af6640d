"""How a release is asked by those who look at it: the request, where it goes, what is no answer.

Samples are kept as clients put them to the gateway: for models of tensors in the Open Inference
Protocol, for language models in OpenAI's. Here one becomes what the release's own server takes, and
what that says is judged as the gateway would.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, NamedTuple
from urllib.parse import quote, urlsplit

import msgspec

from shipworthy.domain.contract import OPERATIONS, Contract, Operation, Protocol
from shipworthy.domain.plan import Behaviour
from shipworthy.protocols import oip
from shipworthy.protocols.messages import InvalidMessage
from shipworthy.protocols.mlflow import Scoring
from shipworthy.protocols.openai import for_upstream, read_answer, read_request

PATHS: Final[dict[Operation, str]] = {
    "chat": "/chat/completions",
    "completions": "/completions",
    "embeddings": "/embeddings",
}
"""OpenAI's doors, below `/v1`."""
HEALTH: Final[dict[Protocol, str]] = {
    "oip-v2": "/v2/health/ready",
    "mlflow": "/ping",
    "openai": "/models",
}
"""Where a server says that it is up, below its base."""
_TELLS: Final[dict[str, Operation]] = {
    "messages": "chat",
    "prompt": "completions",
    "input": "embeddings",
}
_PLAIN: Final[dict[Operation, dict[str, Any]]] = {
    "chat": {"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 16},
    "completions": {"prompt": "Hello, my name is", "max_tokens": 16},
    "embeddings": {"input": "hello"},
}
_PLACEHOLDER: Final = "sample"
_STREAMING: Final = ("stream", "stream_options")


class Asked(NamedTuple):
    """A request to a server: the path below its base, and the body."""

    path: str
    body: bytes


def base_of(url: str, protocol: Protocol) -> str:
    """Where a server's doors begin: of an OpenAI server at `/v1`, unless its URL names a path."""
    base = url.rstrip("/")
    return f"{base}/v1" if protocol == "openai" and not urlsplit(base).path else base


def as_its_server_takes_it(
    contract: Contract, sample: bytes, served_model: str, behaviour: Behaviour | None = None
) -> Asked:
    """The sample as the gateway would send it on. Raises InvalidMessage when it is none."""
    if contract.protocol == "openai":
        operation, body = operation_of(sample), addressed(sample, served_model)
        said = read_request(operation, body)
        sent = for_upstream(
            body, said, served_model=served_model, behaviour=behaviour, want_usage=False
        )
        return Asked(PATHS[operation], sent)
    if contract.protocol == "mlflow":
        values = oip.ContractChecker(contract).check_request(oip.decode_request(sample))
        return Asked("/invocations", Scoring(contract).write_request(values))
    return Asked(f"/v2/models/{quote(served_model, safe='')}/infer", sample)


def answer_problem(contract: Contract, sample: bytes, answer: bytes) -> str:
    """Why what its server said is no answer to the sample; empty when it is one."""
    try:
        if contract.protocol == "openai":
            return read_answer(operation_of(sample), answer).problem
        request = oip.decode_request(sample)
        if contract.protocol == "mlflow":
            Scoring(contract).read_response(answer, request)
        else:
            oip.ContractChecker(contract).check_response(oip.decode_response(answer), request)
    except InvalidMessage as problem:
        return str(problem)
    return ""


# --- language models --------------------------------------------------------------------------


def operation_of(body: bytes) -> Operation:
    """What a request for a language model asks for, by its fields. Raises InvalidMessage."""
    fields = _object(body)
    for name, operation in _TELLS.items():
        if name in fields:
            return operation
    raise InvalidMessage("it has none of messages, prompt and input; give a request's body")


def addressed(body: bytes, model: str, **changes: Any) -> bytes:
    """A request for a language model with this model's name, and other fields changed."""
    return msgspec.json.encode({**_object(body), "model": model, **changes})


def plain_request(operation: Operation) -> bytes:
    """The least that can be asked: what each release that does this has to answer."""
    return msgspec.json.encode({"model": _PLACEHOLDER, **_PLAIN[operation]})


def plain_requests(contract: Contract) -> list[bytes]:
    """One for each of its operations."""
    return [plain_request(operation) for operation in contract.operations or OPERATIONS]


def read_samples(content: bytes) -> list[bytes]:
    """The requests in a file: one JSON object, a list of them, or one on each line.

    Each as it is asked in one piece; whom it is for is said when it is asked. InvalidMessage tells
    which one is no request for a language model.
    """
    samples: list[bytes] = []
    for number, fields in enumerate(_objects(content), 1):
        kept = {name: value for name, value in fields.items() if name not in _STREAMING}
        body = msgspec.json.encode({**kept, "model": _PLACEHOLDER})
        try:
            read_request(operation_of(body), body)
        except InvalidMessage as problem:
            raise InvalidMessage(f"request {number}: {problem}") from None
        samples.append(body)
    if not samples:
        raise InvalidMessage("it holds no request")
    return samples


def write_samples(samples: Iterable[bytes]) -> bytes:
    """A file of requests, one on each line, for `read_samples`."""
    lines: list[bytes] = []
    for sample in samples:
        fields = _object(sample)
        del fields["model"]
        lines.append(msgspec.json.encode(fields))
    return b"\n".join([*lines, b""])


def _objects(content: bytes) -> list[dict[str, Any]]:
    try:
        whole: Any = msgspec.json.decode(content)
        return msgspec.convert(whole if isinstance(whole, list) else [whole], list[dict[str, Any]])
    except msgspec.ValidationError:
        raise InvalidMessage("it holds something else than JSON objects") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return [_object(line) for line in content.splitlines() if line.strip()]


def _object(body: bytes) -> dict[str, Any]:
    try:
        return msgspec.json.decode(body, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as problem:
        raise InvalidMessage(f"it is no JSON object ({problem})") from None
