"""Checks through the public door: who is let in, what is refused, and which release answers.

Each sends real requests to a running gateway and says what it saw. That the gateway itself does
not answer is no finding about a release, but an error: it could not be measured.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from shipworthy.domain.contract import ANY, Contract, Tensor
from shipworthy.domain.findings import Finding, Verdict
from shipworthy.errors import Unavailable
from shipworthy.gateway.needs import Http, HttpAnswer
from shipworthy.protocols import oip

VALID_SECONDS: Final = 24 * 3600.0
"""How long these findings may be relied on."""
_TIMEOUT: Final = 30.0
_ANSWERS: Final = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Door:
    """Where a release is to be looked at.

    `base_url` is the gateway's, `plan` the name that clients call and `key` one that opens it.
    `release` and `digest` are those that should answer; `sample` is a request that the contract
    allows, as an inference request in JSON.
    """

    base_url: str
    plan: str
    key: str
    release: str
    digest: str
    contract: Contract
    sample: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Strangers:
    """Keys that must not open the door.

    `wrong` has a key's form but was never issued, `revoked` was, and `foreign` is for other models.
    """

    wrong: str
    revoked: str
    foreign: str


@dataclass(frozen=True, slots=True)
class _Seen:
    """One request and what came of it; `problem` is empty when it is what should come of it."""

    name: str
    status: int
    said: str
    problem: str


async def probe_auth(door: Door, http: Http, *, strangers: Strangers, now: float) -> Finding:
    """auth.required: no key, a wrong one, a revoked one and another model's are turned away.

    A good key has to get its answer, or being turned away would mean nothing.
    """
    cases: list[tuple[str, str | None, int]] = [
        ("a good key", door.key, 200),
        ("no key", None, 401),
        ("a wrong key", strangers.wrong, 401),
        ("a good key with another secret", door.key[:-1] + _other(door.key[-1:]), 401),
        ("a revoked key", strangers.revoked, 401),
        ("the key of another model", strangers.foreign, 403),
    ]
    seen: list[_Seen] = []
    try:
        for name, key, wanted in cases:
            answer = await _infer(door, http, door.sample, key)
            problem = "" if answer.status == wanted else f"{answer.status} instead of {wanted}"
            if wanted != 200 and _outputs(answer):
                problem = f"{answer.status} with the model's outputs"
            seen.append(_Seen(name, answer.status, _said(answer), problem))
    except Unavailable as error:
        return _unmeasured("auth.required", _AUTH, error, now)
    if seen[0].problem:
        return _finding("auth.required", Verdict.INCONCLUSIVE, _AUTH, seen, now)
    return _finding("auth.required", None, _AUTH, seen, now)


async def probe_contract(door: Door, http: Http, *, now: float) -> Finding:
    """contract.enforced: right answers to what the contract allows, a clear 4xx to all else."""
    seen: list[_Seen] = []
    try:
        for name, body in _allowed(door):
            answer = await _infer(door, http, body, door.key)
            problem = _answer_problem(door, body, answer)
            seen.append(_Seen(name, answer.status, _said(answer), problem))
        for name, body in _forbidden(door):
            answer = await _infer(door, http, body, door.key)
            seen.append(_Seen(name, answer.status, _said(answer), _refusal_problem(answer)))
    except Unavailable as error:
        return _unmeasured("contract.enforced", _ENFORCED, error, now)
    except oip.InvalidMessage as error:
        problem = f"the sample itself is not what the contract allows: {error}"
        return _finding(
            "contract.enforced", Verdict.ERROR, _ENFORCED, [_Seen("sample", 0, "", problem)], now
        )
    return _finding("contract.enforced", None, _ENFORCED, seen, now)


async def probe_answers(door: Door, http: Http, *, now: float) -> Finding:
    """answers.returned: real requests are answered by this release through the public door."""
    seen: list[_Seen] = []
    inferences: list[str] = []
    answer: HttpAnswer | None = None
    threshold = f"{door.release} answers all of {_ANSWERS} requests"
    try:
        for number in range(1, _ANSWERS + 1):
            answer = await _infer(door, http, door.sample, door.key)
            problem = _answer_problem(door, door.sample, answer)
            seen.append(_Seen(f"request {number}", answer.status, _said(answer), problem))
            inferences.append(answer.headers.get("x-shipworthy-inference", ""))
    except Unavailable as error:
        return _unmeasured("answers.returned", threshold, error, now)
    finding = _finding("answers.returned", None, threshold, seen, now)
    evidence = {
        "inferences": inferences,
        "digest": door.digest,
        "request": _digest(door.sample),
        "answer": _digest(answer.body) if answer else "",
    }
    return msgspec.structs.replace(finding, evidence={**finding.evidence, **evidence})


_AUTH: Final = "only a key for this model opens it; others get 401 or 403"
_ENFORCED: Final = "a right answer or a clear 4xx to each call, never a 5xx or silence"


# --- asking -----------------------------------------------------------------------------------


async def _infer(door: Door, http: Http, body: bytes, key: str | None) -> HttpAnswer:
    headers = {"Content-Type": "application/json"}
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    url = f"{door.base_url.rstrip('/')}/v2/models/{door.plan}/infer"
    return await http.request("POST", url, headers=headers, body=body, timeout=_TIMEOUT)


def _answer_problem(door: Door, body: bytes, answer: HttpAnswer) -> str:
    """Why this is no right answer by the release that is being looked at; empty when it is."""
    if answer.status != 200:
        return f"{answer.status}: {_said(answer)}"
    by = answer.headers.get("x-shipworthy-release", "an unnamed release")
    if by != door.release or answer.headers.get("x-shipworthy-digest") != door.digest:
        return f"answered by {by}, not {door.release} with digest {door.digest[:19]}…"
    try:
        response = oip.decode_response(answer.body)
        oip.ContractChecker(door.contract).check_response(response, oip.decode_request(body))
    except oip.InvalidMessage as error:
        return str(error)
    return ""


def _refusal_problem(answer: HttpAnswer) -> str:
    if not 400 <= answer.status < 500:
        return f"{answer.status} instead of a 4xx"
    return "" if _said(answer) else f"{answer.status} without a word why"


def _said(answer: HttpAnswer) -> str:
    """The error's text; empty for an answer, or when there is none."""
    content = _json(answer)
    error = content.get("error")
    return error[:300] if isinstance(error, str) else ""


def _outputs(answer: HttpAnswer) -> bool:
    return "outputs" in _json(answer)


def _json(answer: HttpAnswer) -> dict[str, Any]:
    try:
        return msgspec.json.decode(answer.body, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {}


# --- calls ------------------------------------------------------------------------------------


def _allowed(door: Door) -> Iterable[tuple[str, bytes]]:
    """The sample, and calls at the edge of what the contract allows."""
    values = oip.ContractChecker(door.contract).check_request(oip.decode_request(door.sample))
    declared = {tensor.name: tensor for tensor in door.contract.inputs}
    yield "the sample", door.sample
    batched = all(_batched(declared[value.name]) for value in values)
    if batched and values:
        yield "one row", oip.encode_request(_rows(value, 1) for value in values)
        several = 2 * values[0].shape[0]
        yield f"{several} rows", oip.encode_request(_rows(value, several) for value in values)
    required = [value for value in values if not declared[value.name].optional]
    yield "required inputs alone", oip.encode_request(required)
    yield "one output", oip.encode_request(values, outputs=[door.contract.outputs[0].name])
    yield "all zero or empty", oip.encode_request(_filled(value, _ZERO) for value in values)


def _forbidden(door: Door) -> Iterable[tuple[str, bytes]]:
    """Calls that the contract forbids, each in one way only."""
    yield "an empty body", b""
    yield "half a body", door.sample[: len(door.sample) // 2]
    yield "no JSON", b"features=1,2,3"
    yield "a list", b"[]"
    yield "no inputs", b'{"inputs": []}'
    yield "invalid UTF-8", b'{"id": "\xff", ' + door.sample.lstrip()[1:]
    for name, change in _CHANGES.items():
        yield name, _changed(door.sample, change)
    yield "an unknown output", _with(door.sample, outputs=[{"name": "no-such-output"}])
    yield "not a number", _changed(door.sample, {"data": ["@"]}).replace(b'"@"', b"NaN")


_CHANGES: Final[dict[str, dict[str, Any]]] = {
    "an unknown input": {"name": "no-such-input"},
    "an unknown datatype": {"datatype": "FP7"},
    "a shape that is no list": {"shape": "wide"},
    "a shape of another rank": {"shape": [1] * 9},
    "a negative shape": {"shape": [-1]},
    "no values": {"data": []},
    "values that are no list": {"data": 7},
    "a null among the values": {"data": [None]},
    "an object among the values": {"data": [{}]},
}
_ZERO: Final = {"BYTES": "", "BOOL": False}


def _with(sample: bytes, **changes: Any) -> bytes:
    message: dict[str, Any] = msgspec.json.decode(sample)
    return msgspec.json.encode({**message, **changes})


def _changed(sample: bytes, change: dict[str, Any]) -> bytes:
    """The sample with something else in its first input."""
    message: dict[str, Any] = msgspec.json.decode(sample)
    first, *others = message["inputs"]
    return msgspec.json.encode({**message, "inputs": [{**first, **change}, *others]})


def _batched(tensor: Tensor) -> bool:
    return bool(tensor.shape) and tensor.shape[0] == ANY


def _rows(values: oip.TensorValues, count: int) -> oip.TensorValues:
    """So many rows, repeating those that are there."""
    flat = _flat(values)
    size = math.prod(values.shape[1:])
    rows = [flat[at : at + size] for at in range(0, len(flat), size)]
    data = [value for number in range(count) for value in rows[number % len(rows)]]
    return oip.TensorValues(values.name, values.datatype, (count, *values.shape[1:]), data)


def _filled(values: oip.TensorValues, by_type: dict[str, Any]) -> oip.TensorValues:
    data = [by_type.get(values.datatype, 0)] * math.prod(values.shape)
    return oip.TensorValues(values.name, values.datatype, values.shape, data)


def _flat(values: oip.TensorValues) -> list[Any]:
    flat: list[Any] = values.data
    while flat and isinstance(flat[0], list):
        flat = [value for row in flat for value in row]
    return flat


# --- findings ---------------------------------------------------------------------------------


def _finding(
    check: str, verdict: Verdict | None, threshold: str, seen: list[_Seen], now: float
) -> Finding:
    """What was seen; without a verdict of its own, it passes when nothing was wrong."""
    wrong = [one for one in seen if one.problem]
    if wrong:
        observed = "; ".join(f"{one.name}: {one.problem}" for one in wrong[:3])
        if len(wrong) > 3:
            observed += f"; and {len(wrong) - 3} more"
    else:
        observed = f"all {len(seen)} calls ended as they should"
    return Finding(
        check=check,
        verdict=verdict or (Verdict.FAIL if wrong else Verdict.PASS),
        observed=observed,
        threshold=threshold,
        at=now,
        expires=now + VALID_SECONDS,
        evidence={
            "calls": [
                {"call": one.name, "status": one.status, "error": one.said, "problem": one.problem}
                for one in seen
            ]
        },
    )


def _unmeasured(check: str, threshold: str, error: Unavailable, now: float) -> Finding:
    return Finding(
        check=check,
        verdict=Verdict.ERROR,
        observed=f"the gateway does not answer: {error}",
        threshold=threshold,
        at=now,
    )


def _digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def _other(character: str) -> str:
    return "0" if character != "0" else "1"
