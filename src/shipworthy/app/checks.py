"""The checks that can be observed now: each wired to what it looks at, and kept as a finding."""

from __future__ import annotations

import asyncio
import secrets
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from shipworthy.app.access import admin_key, create_key, revoke_key
from shipworthy.app.gateway_address import gateway_pin, gateway_url
from shipworthy.app.http import AiohttpClient
from shipworthy.app.releasing import sample_requests
from shipworthy.app.serving import make_runtimes
from shipworthy.app.session import Session, new_id
from shipworthy.domain.checklist import Checklist, ChecklistItem, Moment
from shipworthy.domain.findings import Finding, Verdict
from shipworthy.domain.gates import GateItem, GateJudgement, GateVerdict, judge_confirmation
from shipworthy.domain.keys import key_id, new_key
from shipworthy.domain.lifecycle import (
    Deployment,
    DeploymentState,
    Release,
    StageFinding,
    manifest_of,
    standing,
)
from shipworthy.domain.manifest import EndpointServing, Manifest
from shipworthy.domain.names import ReleaseReference, Stage, plan_name
from shipworthy.domain.policy import Policy
from shipworthy.errors import NotFound, NotMeasured, Refused, RuntimeFailed, ShipworthyError
from shipworthy.gateway import probes as gateway_probes
from shipworthy.gateway.needs import HttpAnswer
from shipworthy.ports import HttpClient
from shipworthy.protocols.questions import as_its_server_takes_it, base_of, plain_requests
from shipworthy.release import probes as release_probes
from shipworthy.release.catalogue import built_in
from shipworthy.release.probes import Started
from shipworthy.release.report import Report, ReportLine, build_report
from shipworthy.rollout import probes as rollout_probes
from shipworthy.rollout.intents import is_first, judge_entry
from shipworthy.rollout.plans import behaviour_of
from shipworthy.runtimes.endpoint import authorisation, reported_model

Tell = Callable[[str], None]
START_SECONDS = 300.0
_PROBE_KEY_SECONDS = 300.0
_PATIENCE = 30  # tenths of a second for a change to reach the gateway
_SAMPLE_ROWS = 4


@dataclass(frozen=True, slots=True)
class Look:
    """What a probe may look at: a release, at a stage, now."""

    session: Session
    release: Release
    manifest: Manifest
    stage: Stage
    http: HttpClient

    @property
    def now(self) -> float:
        """Unix time."""
        return self.session.clock()

    @property
    def plan(self) -> str:
        """What clients call it at this stage."""
        return plan_name(self.release.model, self.stage)

    def deployment(self) -> Deployment | None:
        """The one that runs this release at this stage."""
        with self.session.ledger.read() as tx:
            found = [
                deployment
                for deployment in tx.deployments.list(self.release.model)
                if deployment.release == self.release.digest and deployment.stage is self.stage
            ]
        return found[-1] if found else None

    def before(self) -> Release | None:
        """The release that a rollback would return to."""
        with self.session.ledger.read() as tx:
            stack = standing(tx.stages.history(self.release.model, Stage.PRODUCTION))
            if stack and stack[-1].release == self.release.digest:
                stack = stack[:-1]
            if not stack:
                return None
            return tx.releases.find(ReleaseReference(self.release.model, digest=stack[-1].release))

    async def sample(self) -> bytes | None:
        """A request made of the release's recorded sample."""
        samples = await asyncio.to_thread(
            sample_requests, self.session, self.manifest, _SAMPLE_ROWS
        )
        return samples[0] if samples else None


Probe = Callable[[Look], Awaitable[Finding]]


# --- release ----------------------------------------------------------------------------------


async def _stored(look: Look) -> Finding:
    reported = None
    serving, protocol = look.manifest.serving, look.manifest.contract.protocol
    if isinstance(serving, EndpointServing) and not look.manifest.artifacts:
        reported = await reported_model(serving.urls[0], serving, protocol, look.http)
    return await release_probes.probe_stored(
        look.release, look.session.blobs, now=look.now, reported=reported
    )


async def _described(look: Look) -> Finding:
    return await release_probes.probe_described(look.release, now=look.now)


async def _final_format(look: Look) -> Finding:
    serving = look.manifest.serving

    async def start(release: Release, request: bytes) -> Started:
        if isinstance(serving, EndpointServing):
            return await _ask_endpoint(look.http, look.manifest, serving, request)
        return await _start_package(look.session, look.http, release, request)

    return await release_probes.probe_final_format(
        look.release, await look.sample(), start, now=look.now
    )


async def _contact(look: Look) -> Finding:
    return await release_probes.probe_contact(look.release, now=look.now)


async def _contract(look: Look) -> Finding:
    samples = await asyncio.to_thread(sample_requests, look.session, look.manifest, _SAMPLE_ROWS)
    return await release_probes.probe_contract(look.release, samples, now=look.now)


async def _compatible(look: Look) -> Finding:
    with look.session.ledger.read() as tx:
        serving = tx.releases.find(ReleaseReference(look.release.model, stage=Stage.PRODUCTION))
    return await release_probes.probe_compatible(look.release, serving, now=look.now)


async def _ask_endpoint(
    http: HttpClient, manifest: Manifest, serving: EndpointServing, request: bytes
) -> Started:
    """A server elsewhere runs already: ask it the sample, as the gateway would."""
    contract = manifest.contract
    asked = as_its_server_takes_it(contract, request, serving.served_model, behaviour_of(manifest))
    headers = {"Content-Type": "application/json", **authorisation(serving)}
    begun = time.monotonic()
    answer = await http.request(
        "POST",
        base_of(serving.urls[0], contract.protocol) + asked.path,
        headers=headers,
        body=asked.body,
        timeout=60.0,
    )
    if answer.status != 200:
        message = f"{serving.urls[0]} answered the sample with HTTP {answer.status}"
        raise Refused(message)
    return Started(
        interpreter=f"the server at {serving.urls[0]}",
        seconds=time.monotonic() - begun,
        answer=answer.body,
    )


async def _start_package(
    session: Session, http: HttpClient, release: Release, request: bytes
) -> Started:
    """Start a release from its stored parts alone, in an empty folder, and ask it once."""
    manifest = manifest_of(release)
    asked = as_its_server_takes_it(
        manifest.contract, request, release.model, behaviour_of(manifest)
    )
    with TemporaryDirectory(prefix="shipworthy-") as folder:
        runtime = make_runtimes(session, http, Path(folder))
        deployment = Deployment(
            id=new_id("try"),
            model=release.model,
            release=release.digest,
            stage=Stage.DEVELOPMENT,
            wanted=True,
            state=DeploymentState.STARTING,
            since=session.clock(),
        )
        begun = time.monotonic()
        replicas = list(await runtime.start(release, deployment))
        try:
            async with asyncio.timeout(START_SECONDS):
                while (url := replicas[0].url) is None:
                    if replicas[0].problem:
                        raise RuntimeFailed(replicas[0].problem)
                    await asyncio.sleep(0.05)
            seconds = time.monotonic() - begun
            answer = await http.request(
                "POST",
                base_of(url, manifest.contract.protocol) + asked.path,
                headers={"Content-Type": "application/json"},
                body=asked.body,
                timeout=60.0,
            )
        except TimeoutError:
            message = f"{release.name} was not ready within {START_SECONDS:.0f} s"
            raise RuntimeFailed(message) from None
        finally:
            await asyncio.gather(*(replica.stop(5.0) for replica in replicas))
    if answer.status != 200:
        message = f"{release.name} started but answered its sample with HTTP {answer.status}"
        raise Refused(message)
    version = ".".join(str(part) for part in sys.version_info[:3])
    lock = manifest.environment.lock
    built = f"the interpreter of {lock.path}" if lock else f"Python {version}"
    return Started(interpreter=built, seconds=seconds, answer=answer.body)


# --- the gateway ------------------------------------------------------------------------------


async def _door(look: Look) -> gateway_probes.Door:
    """Where the release is looked at: through this project's own gateway, at its stage."""
    sample, contract = await look.sample(), look.manifest.contract
    if sample is None and not contract.tensors:
        sample = plain_requests(contract)[0]  # every release that does this must answer it
    if sample is None:
        message = "no sample is recorded to call it with; add data with 'role: sample'"
        raise NotMeasured(message)
    door = gateway_probes.Door(
        base_url=gateway_url(look.session.project),
        plan=look.plan,
        key=await asyncio.to_thread(admin_key, look.session),
        release=look.release.name,
        digest=look.release.digest,
        contract=contract,
        sample=sample,
    )
    # A plan that was just published may not have reached the worker yet.
    await _until(
        look, door, door.key, lambda seen: seen.headers.get("x-shipworthy-digest") == door.digest
    )
    return door


async def _auth(look: Look) -> Finding:
    """With keys made for this: one that worked and was revoked, one of another model."""
    door = await _door(look)
    by = await asyncio.to_thread(look.session.actor)
    make = partial(
        create_key,
        look.session,
        "checks",
        kind="service",
        expires=look.now + _PROBE_KEY_SECONDS,
        by=by.id,
    )
    revoked, foreign = make(models=(look.plan,)), make(models=("no-such-model",))
    ids = [key_id(text) or "" for text in (revoked, foreign)]
    try:
        await _until(look, door, revoked, lambda seen: seen.status == 200)
        await _until(look, door, foreign, lambda seen: seen.status == 403)
        revoke_key(look.session, ids[0], by=by.id)
        await _until(look, door, revoked, lambda seen: seen.status == 401)
        wrong = new_key(secrets.token_hex(6), secrets.token_bytes(32))
        strangers = gateway_probes.Strangers(wrong=wrong, revoked=revoked, foreign=foreign)
        return await gateway_probes.probe_auth(door, look.http, strangers=strangers, now=look.now)
    finally:
        for id in ids:
            with suppress(NotFound):
                revoke_key(look.session, id, by=by.id)


async def _until(
    look: Look, door: gateway_probes.Door, key: str, heard: Callable[[HttpAnswer], bool]
) -> None:
    """Wait for the gateway to have heard of a change, if it does; the probe itself judges."""
    for _ in range(_PATIENCE):
        answer = await gateway_probes.ask(door, look.http, key)
        if heard(answer):
            return
        await asyncio.sleep(0.1)


async def _enforced(look: Look) -> Finding:
    return await gateway_probes.probe_contract(await _door(look), look.http, now=look.now)


async def _returned(look: Look) -> Finding:
    return await gateway_probes.probe_answers(await _door(look), look.http, now=look.now)


# --- the move ---------------------------------------------------------------------------------


async def _parity(look: Look) -> Finding:
    deployment = look.deployment()
    endpoints = deployment.endpoints if deployment else ()
    serving = look.manifest.serving
    if isinstance(serving, EndpointServing):
        return await rollout_probes.probe_endpoint_parity(
            look.release,
            serving.served_model,
            endpoints,
            lambda url: reported_model(url, serving, look.manifest.contract.protocol, look.http),
            now=look.now,
        )
    return await rollout_probes.probe_parity(look.release, endpoints, look.http, now=look.now)


async def _traffic(look: Look) -> Finding:
    """From the first whole minute behind the move on."""
    with look.session.ledger.read() as tx:
        entry = next(iter(tx.stages.history(look.release.model, look.stage)), None)
        since = int(entry.at // 60) + 1 if entry else 0
        counts = tx.traffic.since(look.plan, since)
    return rollout_probes.probe_traffic(look.release, look.plan, counts, now=look.now)


async def _restorable(look: Look) -> Finding:
    previous = look.before()
    if previous is None:
        message = "there is no earlier release to go back to"
        raise NotMeasured(message)
    with look.session.ledger.read() as tx:
        warm = any(
            deployment.release == previous.digest and deployment.stage is Stage.PRODUCTION
            for deployment in tx.deployments.list(look.release.model)
        )
    return await asyncio.to_thread(
        rollout_probes.probe_restorable, previous, look.session.blobs, warm=warm, now=look.now
    )


PROBES: dict[str, Probe] = {
    "assets.stored": _stored,
    "assets.described": _described,
    "assets.final-format": _final_format,
    "owner.contact": _contact,
    "contract.declared": _contract,
    "contract.compatible": _compatible,
    "contract.enforced": _enforced,
    "auth.required": _auth,
    "answers.returned": _returned,
    "parity.version": _parity,
    "traffic.moved": _traffic,
    "rollback.restorable": _restorable,
}
"""Every check that can be observed; each room brings its own."""


# --- running them -----------------------------------------------------------------------------


async def run_checks(
    session: Session,
    release: Release,
    *,
    stage: Stage | None = None,
    only: Sequence[str] = (),
    tell: Tell,
) -> None:
    """Observe all that can be observed wherever the release runs, or at one stage."""
    checklist = built_in()
    chosen = {item.id for name in only for item in checklist.select(name)}
    stages = [stage] if stage else [Stage.DEVELOPMENT, *_held(session, release)]
    with session.ledger.read() as tx:
        first = is_first(tx, release)
    wanted = [
        (item, place)
        for place in stages
        for item in checklist.items
        if item.id in PROBES
        and (item.id in chosen if chosen else not (first and item.next))
        and _moments(place) & set(item.when)
    ]
    await _run(session, release, wanted, tell)


async def run_gate_checks(session: Session, release: Release, stage: Stage, *, tell: Tell) -> None:
    """Observe what the gate to a stage asks for, where it asks to have it observed."""
    with session.ledger.read() as tx:
        stored = tx.policies.current(release.model)
        first = is_first(tx, release)
    if stored is None:
        return  # the gate will say so
    gate = Policy.model_validate(stored.document).promotion.gate(stage)
    held = _held(session, release)
    wanted: list[tuple[ChecklistItem, Stage]] = []
    for item in _selected(built_in(), gate.checks):
        places = item.observed_at(stage)
        here = [place for place in Stage if place in places and place in (*held, Stage.DEVELOPMENT)]
        if item.id in PROBES and here and not (first and item.next):
            # What is known of the bytes at registration need not be looked at twice.
            place = here[0] if Stage.DEVELOPMENT in places else here[-1]
            wanted.append((item, place))
    await _run(session, release, wanted, tell)


async def confirm(session: Session, release: Release, *, tell: Tell) -> GateJudgement | None:
    """Observe, after the move to production, what the policy wants confirmed, and judge it.

    None when the policy wants nothing confirmed.
    """
    with session.ledger.read() as tx:
        stored = tx.policies.current(release.model)
        first = is_first(tx, release)
    wanted = Policy.model_validate(stored.document).promotion.confirm if stored else None
    if wanted is None or not wanted.checks:
        return None
    await run_checks(session, release, stage=Stage.PRODUCTION, only=wanted.checks, tell=tell)
    with session.ledger.read() as tx:
        return judge_confirmation(
            wanted,
            release=release,
            findings=tx.evidence.findings(release.digest),
            waivers=tx.evidence.waivers(),
            checklist=built_in(),
            now=session.clock(),
            first=first,
        )


def _selected(checklist: Checklist, names: Sequence[str]) -> list[ChecklistItem]:
    known = [name for name in names if not checklist.unknown([name])]
    return list(dict.fromkeys(item for name in known for item in checklist.select(name)))


def _moments(stage: Stage) -> set[Moment]:
    return {
        Stage.DEVELOPMENT: {Moment.REGISTRATION, Moment.STAGING},
        Stage.STAGING: {Moment.PRODUCTION},
        Stage.PRODUCTION: {Moment.CONFIRM},
    }[stage]


def _held(session: Session, release: Release) -> list[Stage]:
    """The stages that the release holds."""
    with session.ledger.read() as tx:
        return [
            stage
            for stage in (Stage.STAGING, Stage.PRODUCTION)
            if (entry := next(iter(tx.stages.history(release.model, stage)), None))
            and entry.release == release.digest
        ]


async def _run(
    session: Session,
    release: Release,
    wanted: Sequence[tuple[ChecklistItem, Stage]],
    tell: Tell,
) -> None:
    manifest = manifest_of(release)
    async with AiohttpClient(partial(gateway_pin, session.project)) as http:
        for number, (item, stage) in enumerate(wanted, 1):
            tell(f"{number} of {len(wanted)}: {item.id}")
            look = Look(session, release, manifest, stage, http)
            finding = await _observe(item, look)
            with session.ledger.write() as tx:
                tx.evidence.add_finding(
                    StageFinding(release=release.digest, stage=stage, finding=finding)
                )


async def _observe(item: ChecklistItem, look: Look) -> Finding:
    """The probe's finding; what kept it from looking is an error, or inconclusive."""
    try:
        return await PROBES[item.id](look)
    except ShipworthyError as error:
        undecided = isinstance(error, NotMeasured)
        return Finding(
            check=item.id,
            verdict=Verdict.INCONCLUSIVE if undecided else Verdict.ERROR,
            observed=str(error),
            threshold=item.title,
            at=look.now,
        )


# --- judging ----------------------------------------------------------------------------------


def judge_now(session: Session, release: Release, stage: Stage) -> GateJudgement | str:
    """What the gate to a stage says on the evidence there is; a string when it can't be judged."""
    with session.ledger.read() as tx:
        return judge_entry(tx, release, stage, built_in(), session.clock())


def refusal_code(session: Session, release: Release, stage: Stage) -> int:
    """The exit code for a promotion that was refused: 1 for measured bad, 3 for not measured."""
    judged = judge_now(session, release, stage)
    bad = isinstance(judged, GateJudgement) and judged.verdict is GateVerdict.FAIL
    return Refused.exit_code if bad else NotMeasured.exit_code


def missing_for_production(session: Session, release: Release) -> list[str]:
    """What stands between a release and production now, one sentence each."""
    asyncio.run(run_gate_checks(session, release, Stage.STAGING, tell=lambda _: None))
    judged = judge_now(session, release, Stage.STAGING)
    if isinstance(judged, str):
        return [judged]
    missing = [_missing(item) for item in judged.items if item.verdict.holds]
    with session.ledger.read() as tx:
        stored = tx.policies.current(release.model)
    if stored is not None:
        gate = Policy.model_validate(stored.document).promotion.production
        if not gate.rules:
            missing.append(
                "the policy has no rule on a metric; add promotion.production.rules, and claim"
                " metrics with their n in release.yaml"
            )
        asked = ", ".join(gate.checks)
        missing.append(f"then, observed in staging: {asked}")
        if gate.approvals:
            missing.append(f"{gate.approvals} approval(s): 'shipworthy approve {release.name}'")
    return missing


def _missing(item: GateItem) -> str:
    return f"{item.explanation}{f' ({item.cure})' if item.cure else ''}"


def report_of(session: Session, release: Release) -> Report:
    """The release's checklist page, with the gates that it stands before or has passed."""
    now = session.clock()
    with session.ledger.read() as tx:
        approvals = [
            approval
            for stage in (Stage.STAGING, Stage.PRODUCTION)
            for approval in tx.evidence.approvals(release.digest, stage)
        ]
        waivers = tx.evidence.waivers()
        people = {release.created_by, *(a.by for a in approvals), *(w.by for w in waivers)}
        judged = [
            judge_entry(tx, release, stage, built_in(), now)
            for stage in (Stage.STAGING, Stage.PRODUCTION)
        ]
        return build_report(
            release,
            built_in(),
            findings=tx.evidence.findings(release.digest),
            approvals=approvals,
            waivers=waivers,
            gates=[gate for gate in judged if isinstance(gate, GateJudgement)],
            names={id: person.name for id in people if (person := tx.principals.get(id))},
            now=now,
        )


def observed_lines(report: Report, only: Sequence[str]) -> list[ReportLine]:
    """The lines of what was looked at: `only` these, else all that have a finding."""
    chosen = {item.id for name in only for item in built_in().select(name)}
    return [
        line
        for _, lines in report.groups
        for line in lines
        if (line.id in chosen if chosen else line.at is not None)
    ]
