"""Checks through the public door: who is let in, what is refused, and which release answers.

Each sends real requests to a running gateway and says what it saw. That the gateway itself does
not answer is no finding about a release, but an error: it could not be measured.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import msgspec

from shipworthy.domain.contract import Contract
from shipworthy.domain.findings import Finding, Verdict
from shipworthy.errors import Unavailable
from shipworthy.gateway.needs import Http, HttpAnswer
from shipworthy.gateway.probe_calls import Asking, Calls, calls_for, said
from shipworthy.protocols.messages import InvalidMessage

VALID_SECONDS: Final = 24 * 3600.0
"""How long these findings may be relied on."""
_TIMEOUT: Final = 60.0
_ANSWERS: Final = 3


@dataclass(frozen=True, kw_only=True)
class Door:
    """Where a release is to be looked at.

    `base_url` is the gateway's, `plan` the name that clients call and `key` one that opens it.
    `release` and `digest` are those that should answer; `sample` is a request that the contract
    allows: of a model of tensors an inference request in JSON, of a language model one of OpenAI's.
    """

    base_url: str
    plan: str
    key: str
    release: str
    digest: str
    contract: Contract
    sample: bytes

    @cached_property
    def calls(self) -> Calls:
        """What it is asked."""
        return calls_for(self.plan, self.contract, self.sample)


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
            answer = await ask(door, http, key)
            problem = "" if answer.status == wanted else f"{answer.status} instead of {wanted}"
            if wanted != 200 and door.calls.tells(answer):
                problem = f"{answer.status} with the model's outputs"
            seen.append(_Seen(name, answer.status, said(answer), problem))
    except Unavailable as error:
        return _unmeasured("auth.required", _AUTH, error, now)
    if seen[0].problem:
        return _finding("auth.required", Verdict.INCONCLUSIVE, _AUTH, seen, now)
    return _finding("auth.required", None, _AUTH, seen, now)


async def probe_contract(door: Door, http: Http, *, now: float) -> Finding:
    """contract.enforced: right answers to what the contract allows, a clear 4xx to all else."""
    seen: list[_Seen] = []
    try:
        for call in door.calls.allowed():
            answer = await ask(door, http, door.key, call)
            problem = _answer_problem(door, call, answer)
            seen.append(_Seen(call.name, answer.status, said(answer), problem))
        for call in door.calls.forbidden():
            answer = await ask(door, http, door.key, call)
            seen.append(_Seen(call.name, answer.status, said(answer), _refusal_problem(answer)))
    except Unavailable as error:
        return _unmeasured("contract.enforced", _ENFORCED, error, now)
    except InvalidMessage as error:
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
            answer = await ask(door, http, door.key)
            problem = _answer_problem(door, door.calls.sample, answer)
            seen.append(_Seen(f"request {number}", answer.status, said(answer), problem))
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


async def ask(door: Door, http: Http, key: str | None, call: Asking | None = None) -> HttpAnswer:
    """One call through the door, the sample's if no other is named."""
    call = call or door.calls.sample
    headers = {"Content-Type": "application/json"}
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    url = door.base_url.rstrip("/") + call.path
    return await http.request("POST", url, headers=headers, body=call.body, timeout=_TIMEOUT)


def _answer_problem(door: Door, call: Asking, answer: HttpAnswer) -> str:
    """Why this is no right answer by the release that is being looked at; empty when it is."""
    if answer.status != 200:
        return f"{answer.status}: {said(answer)}"
    by = answer.headers.get("x-shipworthy-release", "an unnamed release")
    if by != door.release or answer.headers.get("x-shipworthy-digest") != door.digest:
        return f"answered by {by}, not {door.release} with digest {door.digest[:19]}…"
    return door.calls.problem(call, answer)


def _refusal_problem(answer: HttpAnswer) -> str:
    if not 400 <= answer.status < 500:
        return f"{answer.status} instead of a 4xx"
    return "" if said(answer) else f"{answer.status} without a word why"


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
