"""What can be observed about a release before it meets traffic.

Each probe looks at one checklist item and returns its finding, with evidence and an expiry. It
never raises for what it finds, and says `error` or `inconclusive` where it could not look.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

import msgspec

from shipworthy.domain.checklist import ATTESTED_BY
from shipworthy.domain.contract import OPERATIONS, Contract, incompatibilities
from shipworthy.domain.findings import Finding, Verdict
from shipworthy.domain.lifecycle import Release
from shipworthy.domain.manifest import EndpointServing, Manifest
from shipworthy.errors import Refused, RuntimeFailed, ShipworthyError
from shipworthy.ports import Blobs, Progress
from shipworthy.protocols import oip
from shipworthy.protocols.messages import InvalidMessage
from shipworthy.protocols.openai import read_request
from shipworthy.protocols.questions import answer_problem, operation_of
from shipworthy.release.verify import verify_release

DAY = 86_400.0
"""Seconds."""
VALID_BYTES = 7 * DAY
"""How long after a look the stored bytes may be relied on."""
VALID_FACTS = 30 * DAY
"""The same for what follows from the manifest, which never changes, and from our reading of it."""
VALID_CONTACT = 90 * DAY
"""People move on."""
VALID_COMPARISON = DAY
"""What is in production may change."""

AcceptsMail = Callable[[str], Awaitable[bool]]
"""Whether a domain exists and takes mail; raises OSError or Unavailable when it can't be told."""

_ADDRESS = re.compile(r"[^\s@<>()\[\],;:\\\"]{1,64}@([A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)+)")
_RESERVED = re.compile(
    r"(?:.*\.)?(?:example\.(?:com|net|org)|example|test|invalid|localhost|local)", re.IGNORECASE
)


class Started(msgspec.Struct, frozen=True, kw_only=True):
    """A release that was started from its package, asked, and stopped again.

    `interpreter` says which Python, such as `Python 3.11.7 from requirements.lock`. `answer` is the
    body of its answer to the sample. `seconds` is the time until it was ready.
    """

    interpreter: str
    seconds: float
    answer: bytes


class StartPackage(Protocol):
    """Starts a release in an empty folder, from stored parts alone, and asks it once."""

    async def __call__(self, release: Release, request: bytes) -> Started:
        """Raises RuntimeFailed when it does not start or answer, else Unavailable."""
        ...


async def probe_stored(
    release: Release,
    blobs: Blobs,
    *,
    now: float,
    reported: str | None = None,
    progress: Progress | None = None,
) -> Finding:
    """assets.stored: every stored byte re-read. `reported` is what a remote endpoint says it is."""
    manifest = Manifest.model_validate(release.manifest)
    if isinstance(manifest.serving, EndpointServing) and not manifest.artifacts:
        return _reported(manifest.serving, reported, now)
    checked = await asyncio.to_thread(verify_release, release, blobs, now=now, progress=progress)
    return _finding(
        "assets.stored",
        checked.verdict,
        checked.sentence,
        "every file present, every digest equal",
        now,
        VALID_BYTES,
        manifest=release.digest,
        files={file.path: file.digest for file in checked.files[:1000]},
        bytes=checked.bytes,
    )


def _reported(serving: EndpointServing, reported: str | None, now: float) -> Finding:
    same = reported == serving.served_model
    if reported is None:
        verdict = Verdict.INCONCLUSIVE
        observed = (
            "the endpoint does not say what it serves, so its identity can't be attested; list the"
            " model's files under artifacts, or leave this check out of the policy"
        )
    else:
        verdict = Verdict.PASS if same else Verdict.FAIL
        observed = f"the endpoint says that it serves {reported}"
    return _finding(
        "assets.stored",
        verdict,
        observed,
        f"the endpoint reports {serving.served_model}",
        now,
        DAY,
        **({ATTESTED_BY: ", ".join(serving.urls)} if same else {}),
    )


async def probe_described(release: Release, *, now: float) -> Finding:
    """assets.described: training data, inputs and outputs are recorded, over all rows."""
    manifest = Manifest.model_validate(release.manifest)
    contract, base = manifest.contract, manifest.base
    trained = any(data.role == "train" for data in manifest.data)
    lacking: list[str] = []
    if not trained and (contract.tensors or base is None):
        lacking.append("no training data (role: train)")
    if contract.tensors and not contract.inputs:
        lacking.append("no inputs")
    if contract.tensors and not contract.outputs:
        lacking.append("no outputs")
    if not contract.tensors and not contract.operations:
        lacking.append("no operations (contract.operations)")
    size = sum(file.size for data in manifest.data for file in data.files)
    takes = f"{len(contract.inputs)} inputs, {len(contract.outputs)} outputs"
    if not contract.tensors:
        takes = f"operations {', '.join(contract.operations) or 'not named'}"
    recorded = f"{len(manifest.data)} data sets ({size:,} bytes, hashed in full), {takes}"
    verdict, observed = Verdict.PASS, recorded
    if lacking:
        verdict, observed = Verdict.FAIL, f"{', '.join(lacking)}; recorded: {recorded}"
    elif not trained and base is not None:
        verdict = Verdict.INCONCLUSIVE
        observed = (
            f"what {base.model} was trained on is its maker's to say, and not recorded here; record"
            " data with role: train, or leave this check out of the policy"
        )
    return _finding(
        "assets.described",
        verdict,
        observed,
        "training data, inputs and outputs",
        now,
        VALID_FACTS,
        data={data.name: [file.digest for file in data.files[:100]] for data in manifest.data},
    )


async def probe_final_format(
    release: Release, sample: bytes | None, start: StartPackage, *, now: float
) -> Finding:
    """assets.final-format: it starts from its package and answers `sample` as its contract says."""
    manifest = Manifest.model_validate(release.manifest)
    verdict, evidence = Verdict.INCONCLUSIVE, dict[str, Any]()
    if sample is None:
        observed = "no sample is recorded to ask it with; add data with `role: sample`"
    else:
        verdict, observed, evidence = await _started(release, manifest, sample, start)
        if isinstance(manifest.serving, EndpointServing) and verdict is Verdict.PASS:
            # What runs there can't be looked into: that it is this release is the server's word.
            observed = f"the server at {manifest.serving.urls[0]} answered the sample"
            evidence[ATTESTED_BY] = ", ".join(manifest.serving.urls)
    return _finding(
        "assets.final-format",
        verdict,
        observed,
        "starts in an empty folder and answers its sample",
        now,
        VALID_FACTS,
        **evidence,
    )


async def _started(
    release: Release, manifest: Manifest, sample: bytes, start: StartPackage
) -> tuple[Verdict, str, dict[str, Any]]:
    try:
        started = await start(release, sample)
    except (Refused, RuntimeFailed) as error:
        return Verdict.FAIL, str(error), {}
    except ShipworthyError as error:
        return Verdict.ERROR, str(error), {}
    own = " (no lock is pinned, so it is Shipworthy's own)" if not manifest.environment.lock else ""
    evidence = {"interpreter": started.interpreter, "seconds": round(started.seconds, 3)}
    problem = answer_problem(manifest.contract, sample, started.answer)
    if problem:
        return Verdict.FAIL, f"it started, but its answer breaks the contract: {problem}", evidence
    observed = f"started in {started.seconds:.1f} s in {started.interpreter}{own} and answered"
    return Verdict.PASS, observed, evidence


async def probe_contact(
    release: Release, *, now: float, accepts_mail: AcceptsMail | None = None
) -> Finding:
    """owner.contact: an address of the right form, at a domain that takes mail if that was asked.

    Domains reserved for documentation and tests fail: nobody can read what is sent there.
    """
    owner = Manifest.model_validate(release.manifest).owner
    threshold = "a named owner whose address can receive mail"
    match = _ADDRESS.fullmatch(owner.email) if owner else None
    if owner is None or match is None:
        what = f"{owner.email!r} is no mail address" if owner else "no owner is named"
        verdict, observed = Verdict.FAIL, what
    elif _RESERVED.fullmatch(match[1]):
        verdict = Verdict.FAIL
        observed = f"{match[1]} is reserved for examples, and nobody reads mail there"
    else:
        verdict, observed = await _domain(match[1], accepts_mail)
    # The address itself is personal; it stands in the manifest and is not repeated as evidence.
    return _finding("owner.contact", verdict, observed, threshold, now, VALID_CONTACT)


async def _domain(domain: str, accepts_mail: AcceptsMail | None) -> tuple[Verdict, str]:
    formed = "the address is well-formed"
    if accepts_mail is None:
        return Verdict.PASS, f"{formed}; its domain was not looked up (offline)"
    try:
        accepts = await accepts_mail(domain)
    except (OSError, ShipworthyError) as error:
        return Verdict.PASS, f"{formed}; its domain could not be looked up ({error})"
    if accepts:
        return Verdict.PASS, f"{formed} and {domain} takes mail"
    return Verdict.FAIL, f"{domain} does not exist or takes no mail"


async def probe_contract(release: Release, samples: Sequence[bytes], *, now: float) -> Finding:
    """contract.declared: the schemas exist and accept the recorded samples.

    `samples` are request bodies in the contract's own protocol.
    """
    contract = Manifest.model_validate(release.manifest).contract
    problems: list[str] = []
    for number, body in enumerate(samples, 1):
        try:
            _check_sample(contract, body)
        except ShipworthyError as error:
            problems.append(f"sample {number}: {error}")
    if contract.tensors and (not contract.inputs or not contract.outputs):
        problems.append("inputs or outputs are not declared")
    verdict, observed = Verdict.PASS, f"accepts {len(samples)} of {len(samples)} samples"
    if problems:
        verdict, observed = Verdict.FAIL, "; ".join(problems[:5])
    elif not samples:
        verdict = Verdict.INCONCLUSIVE
        observed = "declared, but no sample is recorded to try it; add data with `role: sample`"
    return _finding(
        "contract.declared",
        verdict,
        observed,
        "inputs and outputs are declared and accept every recorded sample",
        now,
        VALID_FACTS,
        samples=len(samples),
        contract=msgspec.to_builtins(contract),
    )


def _check_sample(contract: Contract, body: bytes) -> None:
    """Raises InvalidMessage for a request that the contract does not allow."""
    if contract.tensors:
        oip.ContractChecker(contract).check_request(oip.decode_request(body))
        return
    operation = operation_of(body)
    read_request(operation, body)
    if operation not in (contract.operations or OPERATIONS):
        raise InvalidMessage(f"it asks for {operation}, which contract.operations does not name")


async def probe_compatible(release: Release, serving: Release | None, *, now: float) -> Finding:
    """contract.compatible: clients of the release in production would not break."""
    verdict, evidence = Verdict.INCONCLUSIVE, dict[str, Any]()
    observed = "nothing is in production to compare with"
    if serving is not None:
        problems = incompatibilities(
            Manifest.model_validate(release.manifest).contract,
            Manifest.model_validate(serving.manifest).contract,
        )
        evidence = {"serving": serving.digest, "problems": problems}
        verdict = Verdict.FAIL if problems else Verdict.PASS
        observed = "; ".join(problems) or f"accepts and returns all that {serving.name} does"
    return _finding(
        "contract.compatible",
        verdict,
        observed,
        "accepts all that the serving release accepts and returns all that it returns",
        now,
        VALID_COMPARISON,
        **evidence,
    )


def _finding(
    check: str,
    verdict: Verdict,
    observed: str,
    threshold: str,
    now: float,
    valid: float,
    **evidence: Any,
) -> Finding:
    return Finding(
        check=check,
        verdict=verdict,
        observed=observed,
        threshold=threshold,
        at=now,
        expires=now + valid,
        evidence=evidence,
    )
