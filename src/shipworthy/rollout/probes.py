"""Checks on the move itself: what is served where, whose the traffic is, and whether we can return.

Each observes and says what it saw; none judges by what was merely asked for.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any
from urllib.parse import quote

from shipworthy.domain.checklist import ATTESTED_BY
from shipworthy.domain.findings import Finding, Verdict
from shipworthy.domain.lifecycle import Release, TrafficCount, manifest_of
from shipworthy.domain.manifest import PinnedFile
from shipworthy.errors import IntegrityError, ShipworthyError
from shipworthy.ports import Blobs, HttpClient

VALID_SECONDS = 24 * 3600.0
"""How long these findings may be relied on."""
AskServed = Callable[[str], Awaitable[str | None]]
"""What the server at an address says that it serves; None when it says nothing."""
LEAST_REQUESTS = 20
"""Fewer answers than this say nothing about where the traffic goes."""


async def probe_parity(
    release: Release, endpoints: Sequence[str], http: HttpClient, *, now: float
) -> Finding:
    """parity.version: the digest that each endpoint reports is the one that was registered."""
    reported = {endpoint: await _reported(endpoint, release.model, http) for endpoint in endpoints}
    wrong = {url: digest for url, digest in reported.items() if digest != release.digest}
    silent = [url for url, digest in wrong.items() if not digest.startswith("sha256:")]
    if not reported or silent:
        verdict = Verdict.ERROR if not reported else Verdict.INCONCLUSIVE
        observed = "no endpoint answers" if not reported else f"{silent[0]}: {wrong[silent[0]]}"
    else:
        verdict = Verdict.FAIL if wrong else Verdict.PASS
        observed = next(iter(wrong.values()), release.digest)
    return _parity(verdict, observed, release.digest, {"reported": reported}, now)


async def probe_endpoint_parity(
    release: Release,
    served_model: str,
    endpoints: Sequence[str],
    asked: AskServed,
    *,
    now: float,
) -> Finding:
    """parity.version for a server elsewhere: it reports the model that the release names.

    What lies behind that name is the endpoint's own word, so a pass is attested by it.
    """
    reported = {endpoint: await _told(endpoint, asked) for endpoint in endpoints}
    evidence: dict[str, Any] = {"reported": reported, "registered": release.digest}
    wrong = [f"{url}: {said}" for url, said in reported.items() if said != served_model]
    if not reported:
        verdict, observed = Verdict.ERROR, "no endpoint answers"
    elif wrong:
        verdict, observed = Verdict.INCONCLUSIVE, wrong[0]
    else:
        verdict, observed = Verdict.PASS, f"{len(reported)} endpoints report {served_model}"
        evidence[ATTESTED_BY] = ", ".join(reported)
    return _parity(verdict, observed, served_model, evidence, now)


async def _told(endpoint: str, asked: AskServed) -> str:
    try:
        return await asked(endpoint) or "does not say what it serves"
    except ShipworthyError as error:
        return f"does not answer ({error})"


def _parity(
    verdict: Verdict, observed: str, expected: str, evidence: dict[str, Any], now: float
) -> Finding:
    return Finding(
        check="parity.version",
        verdict=verdict,
        observed=observed,
        threshold=f"each endpoint reports {expected}",
        at=now,
        expires=now + VALID_SECONDS,
        evidence=evidence,
    )


async def _reported(endpoint: str, model: str, http: HttpClient) -> str:
    """The digest in an endpoint's metadata of its model, or why there is none."""
    url = f"{endpoint.rstrip('/')}/v2/models/{quote(model, safe='')}"
    try:
        answer = await http.request("GET", url, timeout=5.0)
    except ShipworthyError as error:
        return f"does not answer ({error})"
    if answer.status != 200:
        return f"answers {answer.status}"
    try:
        return str(json.loads(answer.body)["parameters"]["digest"])
    except (ValueError, KeyError, TypeError):
        return "does not say what it serves"


def probe_traffic(
    release: Release, plan: str, counts: Iterable[TrafficCount], *, now: float
) -> Finding:
    """traffic.moved: since the move all answers came from this release, by the gateway's records.

    `counts` begin with the first whole minute behind the move.
    """
    served: dict[str, int] = {}
    for count in counts:
        served[count.release] = served.get(count.release, 0) + count.served
    total, ours = sum(served.values()), served.get(release.name, 0)
    if total < LEAST_REQUESTS:
        verdict = Verdict.INCONCLUSIVE
        observed = f"only {total} answers in whole minutes since the move"
    else:
        verdict = Verdict.PASS if ours == total else Verdict.FAIL
        observed = f"{ours:,} of {total:,} answers came from {release.name}"
    return Finding(
        check="traffic.moved",
        verdict=verdict,
        observed=observed,
        threshold=f"all of at least {LEAST_REQUESTS} answers",
        at=now,
        expires=now + VALID_SECONDS,
        evidence={"plan": plan, "served": served},
    )


def probe_restorable(previous: Release, blobs: Blobs, *, warm: bool, now: float) -> Finding:
    """rollback.restorable: all pinned parts of the release before are here and unaltered."""
    problems: list[str] = []
    files: tuple[PinnedFile, ...] = ()
    try:
        files = manifest_of(previous).pinned_files()
    except IntegrityError as error:
        problems.append(str(error))
    for file in files:
        try:
            blobs.verify(file)
        except ShipworthyError as error:
            problems.append(str(error))
    size = sum(file.size for file in files)
    kept = "still warm" if warm else "stopped; it would be restored"
    return Finding(
        check="rollback.restorable",
        verdict=Verdict.FAIL if problems else Verdict.PASS,
        observed="; ".join(problems)
        or f"{previous.name}: {len(files)} files, {size:,} bytes, all re-read and equal; {kept}",
        threshold="every pinned part present, every digest equal",
        at=now,
        expires=now + VALID_SECONDS,
        evidence={"release": previous.digest, "files": [file.digest for file in files]},
    )
