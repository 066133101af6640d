"""What each repository of a ledger promises, over every adapter."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shipworthy.domain import audit
from shipworthy.domain.contract import Contract
from shipworthy.domain.erasure import Tombstone
from shipworthy.domain.findings import Finding, Verdict
from shipworthy.domain.lifecycle import (
    Approval,
    Decision,
    Deployment,
    DeploymentState,
    Intent,
    IntentKind,
    IntentStatus,
    Release,
    StageEntry,
    StageFinding,
    StoredPolicy,
    TrafficCount,
    Waiver,
)
from shipworthy.domain.names import Stage, parse_reference
from shipworthy.domain.plan import Arm, Endpoint, Key, Limits, Plan
from shipworthy.domain.policy import Policy
from shipworthy.domain.rollout import (
    RolloutState,
    RolloutStatus,
    UnitHistory,
    begin,
)
from shipworthy.domain.statistics.guardrail import CountedUnit, ErrorGuardrail
from shipworthy.domain.terms import Term
from shipworthy.errors import Conflict, LedgerUnavailable
from shipworthy.ports import Ledger, StoredKey

PRODUCTION = Stage.PRODUCTION


def digest(letter: str) -> str:
    return "sha256:" + letter * 64


def release(version: int, letter: str, model: str = "digits") -> Release:
    return Release(
        model=model,
        version=version,
        digest=digest(letter),
        manifest={"model": model, "nested": [1, 2.0, None, {"é": True}]},
        created_at=10.0,
        created_by="p1",
    )


def entry(letter: str, at: float, **fields: Any) -> StageEntry:
    known: dict[str, Any] = {"model": "digits", "stage": PRODUCTION, "policy": None}
    return StageEntry(release=digest(letter), at=at, **(known | fields))


def rollout(id: str = "r1", model: str = "digits") -> RolloutState:
    return begin(
        id=id,
        model=model,
        candidate=(digest("b"), f"{model}@2"),
        stable=(digest("a"), f"{model}@1"),
        policy=Policy(model=model),
        now=5.0,
    )


class TestTransactions:
    def test_what_is_written_is_read(self, ledger: Ledger):
        with ledger.write() as tx:
            tx.releases.add(release(1, "a"))
        with ledger.read() as tx:
            assert tx.releases.list() == [release(1, "a")]

    def test_an_error_undoes_all_of_it(self, ledger: Ledger):
        def fail_half_way() -> None:
            with ledger.write() as tx:
                tx.releases.add(release(1, "a"))
                tx.audit.append(at=1.0, actor="p", act="register", subject="digits@1")
                raise RuntimeError

        with pytest.raises(RuntimeError):
            fail_half_way()
        with ledger.read() as tx:
            assert tx.releases.list() == []
            assert tx.audit.head().sequence == 0

    def test_a_reader_sees_one_snapshot_while_others_write(self, ledger: Ledger):
        with ledger.read() as reader:
            assert reader.stages.models() == []
            with ledger.write() as writer:
                writer.releases.add(release(1, "a"))
            assert reader.releases.list() == []
            assert reader.stages.models() == []

    def test_a_second_writer_waits_and_then_says_who_is_to_blame(self, ledger: Ledger):
        with ledger.write(), pytest.raises(LedgerUnavailable, match="try again"), ledger.write():
            pass
        with ledger.write() as tx:
            tx.releases.add(release(1, "a"))

    def test_a_reader_can_not_write(self, ledger: Ledger):
        with ledger.read() as tx, pytest.raises(LedgerUnavailable):
            tx.releases.add(release(1, "a"))


class TestReleases:
    def test_the_same_again_changes_nothing(self, ledger: Ledger):
        again = msgspec.structs.replace(release(1, "a"), created_at=99.0, created_by="p2")
        with ledger.write() as tx:
            tx.releases.add(release(1, "a"))
            tx.releases.add(again)
            assert tx.releases.list() == [release(1, "a")]

    @pytest.mark.parametrize("other", [release(1, "b"), release(2, "a")], ids=["content", "number"])
    def test_neither_content_nor_version_has_two_names(self, ledger: Ledger, other: Release):
        with ledger.write() as tx:
            tx.releases.add(release(1, "a"))
            with pytest.raises(Conflict, match=r"digits@1.*;"):
                tx.releases.add(other)
            assert tx.releases.list() == [release(1, "a")]

    def test_listed_newest_first_and_counted_by_model(self, ledger: Ledger):
        with ledger.write() as tx:
            assert tx.releases.next_version("digits") == 1
            for known in (release(2, "b"), release(10, "c"), release(3, "d", "other")):
                tx.releases.add(known)
            assert [r.version for r in tx.releases.list("digits")] == [10, 2]
            assert len(tx.releases.list()) == 3
            assert tx.releases.next_version("digits") == 11
            assert tx.stages.models() == ["digits", "other"]

    def test_found_by_version_digest_and_stage(self, ledger: Ledger):
        with ledger.write() as tx:
            one, two = release(1, "a"), release(2, "b")
            tx.releases.add(one)
            tx.releases.add(two)
            tx.stages.enter(entry("a", 1.0))
            tx.stages.enter(entry("b", 2.0))
            tx.stages.enter(entry("a", 1.5, rollback=True))  # the clock stepped back
            found = {
                name: tx.releases.find(parse_reference(name))
                for name in (
                    "digits@2",
                    "digits@9",
                    "other@1",
                    f"digits@{digest('b')}",
                    "digits@sha256:aaaaaaaa",
                    "digits@sha256:cccccccc",
                    "digits@production",
                    "digits@staging",
                )
            }
        assert list(found.values()) == [two, None, None, two, one, None, one, None]

    def test_an_ambiguous_digest_is_a_conflict(self, ledger: Ledger):
        close = msgspec.structs.replace(release(2, "a"), digest=digest("a")[:-1] + "b")
        with ledger.write() as tx:
            tx.releases.add(release(1, "a"))
            tx.releases.add(close)
            with pytest.raises(Conflict, match="digits@2, digits@1"):
                tx.releases.find(parse_reference("digits@sha256:aaaaaaaa"))

    def test_only_a_registered_release_enters_a_stage(self, ledger: Ledger):
        with pytest.raises(Conflict, match=";"), ledger.write() as tx:
            tx.stages.enter(entry("a", 1.0))

    def test_a_stage_has_a_history(self, ledger: Ledger):
        entries = [entry("a", 1.0, policy=digest("f")), entry("a", 2.0, rollback=True)]
        with ledger.write() as tx:
            tx.releases.add(release(1, "a"))
            for each in entries:
                tx.stages.enter(each)
            assert tx.stages.history("digits", PRODUCTION) == entries[::-1]
            assert tx.stages.history("digits", Stage.STAGING) == []


class TestOrder:
    def test_models_are_in_the_same_order_on_any_database(self, ledger: Ledger):
        models = ["a-b", "a1", "aa", "ab", "a-c"]  # a language's order overlooks the hyphens
        with ledger.write() as tx:
            for model in models:
                tx.releases.add(release(1, "a", model))
            tx.releases.add(release(2, "b", "aa"))
            assert tx.stages.models() == sorted(models)
            listed = [(each.model, each.version) for each in tx.releases.list()]
            assert listed == sorted(listed, key=lambda pair: (pair[0], -pair[1]))


class TestPolicies:
    def test_the_highest_revision_is_in_force(self, ledger: Ledger):
        def policy(revision: int, letter: str) -> StoredPolicy:
            return StoredPolicy(
                model="digits",
                revision=revision,
                digest=digest(letter),
                document={"rollout": {"steps": [0.05, 1]}},
                applied_at=1.0,
                applied_by="p1",
            )

        with ledger.write() as tx:
            assert tx.policies.current("digits") is None
            for each in (policy(1, "a"), policy(2, "b"), policy(3, "a")):
                tx.policies.put(each)
            tx.policies.put(policy(3, "a"))
            assert tx.policies.current("digits") == policy(3, "a")
            assert tx.policies.by_digest("digits", digest("b")) == policy(2, "b")
            assert tx.policies.by_digest("digits", digest("a")) == policy(3, "a")
            assert tx.policies.by_digest("other", digest("a")) is None
            with pytest.raises(Conflict, match="revision 2"):
                tx.policies.put(policy(2, "c"))


class TestAccess:
    def test_a_principal_is_made_once(self, ledger: Ledger):
        with ledger.write() as tx:
            ada, ci = tx.principals.ensure("ada"), tx.principals.ensure("ci", "service")
            assert (ada.kind, ci.kind) == ("person", "service")
            assert ada.id != ci.id
            assert "ada" not in ada.id
            assert tx.principals.ensure("ada") == ada
            assert tx.principals.get(ci.id) == ci
            assert tx.principals.get("nobody") is None

    def test_keys_are_revoked_once(self, ledger: Ledger):
        def key(id: str, revoked_at: float | None = None) -> StoredKey:
            return StoredKey(
                key=Key(id=id, hash=f"hash of {id}", role="client", models=("digits", "*")),
                principal="p1",
                created_at=1.0,
                revoked_at=revoked_at,
            )

        with ledger.write() as tx:
            tx.keys.add(key("k2"))
            tx.keys.add(key("k1"))
            assert tx.keys.revoke("k2", 5.0)
            assert not tx.keys.revoke("k2", 6.0)
            assert not tx.keys.revoke("k3", 6.0)
            assert tx.keys.list() == [key("k2", 5.0), key("k1")]
            with pytest.raises(Conflict):
                tx.keys.add(key("k1"))

    def test_keys_keep_their_limits(self, ledger: Ledger):
        def key(id: str, limits: Limits) -> StoredKey:
            kept = Key(id=id, hash=f"hash of {id}", role="client", limits=limits)
            return StoredKey(key=kept, principal="p1", created_at=1.0)

        some, others = Limits(concurrency=3, budget_per_day=0.1), Limits(requests_per_minute=10**12)
        with ledger.write() as tx:
            tx.keys.add(key("k1", some))
            tx.keys.add(key("k2", Limits()))
        with ledger.write() as tx:
            assert tx.keys.list() == [key("k1", some), key("k2", Limits())]
            assert tx.keys.limit("k2", others)
            assert tx.keys.limit("k1", Limits())
            assert not tx.keys.limit("k3", others)
            assert tx.keys.list() == [key("k1", Limits()), key("k2", others)]
            tx.keys.revoke("k1", 5.0)
            assert not tx.keys.limit("k1", some)


class TestEvidence:
    def test_the_newest_finding_of_each_check_and_stage(self, ledger: Ledger):
        def finding(check: str, verdict: Verdict, stage: Stage = Stage.STAGING) -> StageFinding:
            return StageFinding(
                release=digest("a"),
                stage=stage,
                finding=Finding(
                    check=check,
                    verdict=verdict,
                    observed="12 ms",
                    threshold="at most 10 ms",
                    at=1.0,
                    expires=2.0,
                    evidence={"n": 3, "shares": [0.1, 1e-300]},
                ),
            )

        kept = [
            finding("latency.replay", Verdict.ERROR, PRODUCTION),
            finding("latency.replay", Verdict.PASS),
            finding("capacity.load", Verdict.FAIL),
        ]
        with ledger.write() as tx:
            tx.evidence.add_finding(finding("latency.replay", Verdict.FAIL))
            for each in kept:
                tx.evidence.add_finding(each)
            assert tx.evidence.findings(digest("a")) == kept
            assert tx.evidence.findings(digest("b")) == []

    def test_approvals_and_waivers_oldest_first(self, ledger: Ledger):
        approvals = [
            Approval(release=digest("a"), stage=PRODUCTION, by=by, at=1.0, reason="tried it")
            for by in ("p2", "p1")
        ]
        waivers = [
            Waiver(what="four-eyes", by="p1", at=2.0, reason="alone"),
            Waiver(what="capacity.load", by="p1", at=1.0, reason="later", model="m", until=9.0),
        ]
        with ledger.write() as tx:
            for approval in approvals:
                tx.evidence.add_approval(approval)
            for waiver in waivers:
                tx.evidence.add_waiver(waiver)
            assert tx.evidence.approvals(digest("a"), PRODUCTION) == approvals
            assert tx.evidence.approvals(digest("a"), Stage.STAGING) == []
            assert tx.evidence.waivers() == waivers

    def test_decisions_newest_first_and_limited(self, ledger: Ledger):
        def decision(number: int, model: str = "digits") -> Decision:
            return Decision(
                id=f"d{number}",
                at=1.0,
                model=model,
                kind="rollback",
                text="Rolled back.",
                rollout="r1",
                numbers={"e_value": 101.5, "n": number},
            )

        with ledger.write() as tx:
            for number in range(3):
                tx.decisions.add(decision(number))
            tx.decisions.add(decision(3, "other"))
            assert tx.decisions.list(limit=2) == [decision(3, "other"), decision(2)]
            assert tx.decisions.list("digits") == [decision(2), decision(1), decision(0)]
            with pytest.raises(Conflict):
                tx.decisions.add(decision(0))


class TestDelivery:
    def test_deployments_are_replaced_and_listed_until_stopped(self, ledger: Ledger):
        def deployment(id: str, state: DeploymentState, **fields: Any) -> Deployment:
            known: dict[str, Any] = {
                "model": "digits",
                "release": digest("a"),
                "stage": PRODUCTION,
                "wanted": True,
            }
            return Deployment(id=id, state=state, since=1.0, **(known | fields))

        first = deployment("d1", DeploymentState.STARTING)
        ready = deployment("d1", DeploymentState.READY, endpoints=("http://a", "http://b"))
        other = deployment("d0", DeploymentState.FAILED, model="other", retire_at=5.0, wanted=False)
        with ledger.write() as tx:
            for each in (first, other, deployment("d2", DeploymentState.STOPPED), ready):
                tx.deployments.put(each)
            assert tx.deployments.list() == [ready, other]
            assert tx.deployments.list("other") == [other]
            assert tx.deployments.get("d1") == ready
            assert tx.deployments.get("d9") is None

    def test_intents_wait_in_line(self, ledger: Ledger):
        def intent(id: str, status: IntentStatus) -> Intent:
            return Intent(
                id=id,
                at=1.0,
                actor="p1",
                kind=IntentKind.PROMOTE,
                model="digits",
                release=digest("a"),
                stage=PRODUCTION,
                status=status,
            )

        with ledger.write() as tx:
            for id in "cab":
                tx.intents.put(intent(id, IntentStatus.PENDING))
            tx.intents.put(intent("a", IntentStatus.DONE))
            tx.intents.put(intent("c", IntentStatus.WAITING))
            assert [each.id for each in tx.intents.open()] == ["c", "b"]
            assert tx.intents.get("a") == intent("a", IntentStatus.DONE)
            assert tx.intents.get("z") is None

    def test_a_rollout_goes_on_after_a_restart(self, ledger: Ledger):
        state = msgspec.structs.replace(
            rollout(), guardrail=ErrorGuardrail(logs=(-math.inf, 0.1) + (1e-320,) * 5)
        )
        ended = msgspec.structs.replace(
            rollout("r0"), status=RolloutStatus.COMPLETED, started=9.0, ended=9.5
        )
        with ledger.write() as tx:
            for each in (rollout(), state, ended, rollout("r2", "other")):
                tx.rollouts.save(each)
        with ledger.read() as tx:
            assert tx.rollouts.active() == [state, rollout("r2", "other")]
            assert tx.rollouts.get("r1") == state
            assert tx.rollouts.get("r9") is None
            assert tx.rollouts.latest("digits") == ended
            assert tx.rollouts.latest("nothing") is None

    def test_units_are_remembered_and_forgotten(self, ledger: Ledger):
        first = {f"u{n}": UnitHistory(0) for n in range(3)}
        changed = {"u1": UnitHistory(2, errors=CountedUnit(0.05, 0.25)), "u3": UnitHistory(1)}
        with ledger.write() as tx:
            tx.rollouts.save_units("r1", first)  # in any order with the rollout itself
            tx.rollouts.save(rollout())
            tx.rollouts.save(rollout("r2"))
            tx.rollouts.save_units("r2", first)
        with ledger.write() as tx:
            tx.rollouts.save_units("r1", changed)
            tx.rollouts.save_units("r1", {})
            assert tx.rollouts.units("r1") == first | changed
            tx.rollouts.forget_units("r1", ["u0", "u3", "u9"])
            tx.rollouts.forget_units("r1", [])
            assert set(tx.rollouts.units("r1")) == {"u1", "u2"}
            tx.rollouts.forget_units("r1")
            assert tx.rollouts.units("r1") == {}
            assert tx.rollouts.units("r2") == first

    def test_units_of_no_rollout_are_refused_on_commit(self, ledger: Ledger):
        with pytest.raises(Conflict), ledger.write() as tx:
            tx.rollouts.save_units("r1", {"u": UnitHistory(0)})
        with ledger.write() as tx:
            assert tx.rollouts.units("r1") == {}

    def test_plans_by_name(self, ledger: Ledger):
        arm = Arm(
            release="digits@1",
            digest=digest("a"),
            version=1,
            endpoints=(Endpoint(url="http://127.0.0.1:1", credential="env:KEY"),),
            served_model="digits",
            contract=Contract(protocol="oip-v2", inputs=(), outputs=()),
        )

        def plan(name: str, revision: int) -> Plan:
            return Plan(name=name, model="digits", revision=revision, fence=1, stable=arm)

        with ledger.write() as tx:
            for each in (plan("digits", 1), plan("digits@staging", 1), plan("digits", 2)):
                tx.plans.put(each)
            tx.plans.remove("digits@staging")
            tx.plans.remove("digits@staging")
            assert tx.plans.all() == {"digits": plan("digits", 2)}

    def test_terms_follow_each_other(self, ledger: Ledger):
        first, second = Term(number=1, holder="a", until=9.5), Term(number=2, holder="b")
        with ledger.write() as tx:
            assert tx.terms.current() == Term()
            tx.terms.put(first)
            assert tx.terms.current() == first
            tx.terms.put(second)
        with ledger.read() as tx:
            assert tx.terms.current() == second

    def test_tombstones_are_numbered_in_order(self, ledger: Ledger):
        stones = [Tombstone(unit=unit, at=float(at), by="p") for at, unit in enumerate("aba")]
        with ledger.write() as tx:
            assert tx.tombstones.after(0) == []
            numbers = [tx.tombstones.add(stone) for stone in stones]
            kept = tx.tombstones.after(0)
        assert [stone.sequence for stone in kept] == numbers == sorted(numbers)
        assert [msgspec.structs.replace(stone, sequence=0) for stone in kept] == stones
        with ledger.read() as tx:
            assert tx.tombstones.after(numbers[1]) == kept[2:]

    def test_cursors_are_replaced(self, ledger: Ledger):
        with ledger.write() as tx:
            tx.cursors.save({"a": 1, "b": 2**40})
            tx.cursors.save({"b": 3, "c": 4})
            assert tx.cursors.load() == {"b": 3, "c": 4}
            tx.cursors.save({})
            assert tx.cursors.load() == {}

    def test_traffic_adds_up_by_minute(self, ledger: Ledger):
        def count(minute: int, served: int, plan: str = "digits") -> TrafficCount:
            return TrafficCount(
                plan=plan, release=digest("a"), minute=minute, assigned=served + 1, served=served
            )

        with ledger.write() as tx:
            tx.traffic.add([count(5, 1), count(4, 1), count(4, 1, "other")])
            tx.traffic.add([count(5, 2), count(3, 7)])
            both = msgspec.structs.replace(count(5, 3), assigned=5)
            assert tx.traffic.since("digits", 4) == [count(4, 1), both]
            tx.traffic.forget_before(5)
            assert tx.traffic.since("digits", 0) == [both]
            assert tx.traffic.since("other", 0) == []


class TestAudit:
    def test_acts_make_a_chain(self, ledger: Ledger):
        with ledger.write() as tx:
            assert tx.audit.head() == audit.AuditHead(sequence=0, hash=audit.GENESIS)
            first = tx.audit.append(at=1, actor="p1", act="register", subject="digits@1")
            exported = tx.audit.head()
        with ledger.write() as tx:
            second = tx.audit.append(
                at=2.5, actor="p2", act="approve", subject="digits@1", detail={"stages": ("x", 1)}
            )
        with ledger.read() as tx:
            entries = list(tx.audit.entries())
            assert tx.audit.head() == audit.AuditHead(sequence=2, hash=second.hash)
        assert entries[0] == first
        assert exported.hash == first.hash == second.previous
        assert audit.verify(entries, exported=exported) == []

    @settings(
        max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
    )
    @given(
        at=st.floats(0, 2e9) | st.integers(0, 2**53),
        detail=st.dictionaries(
            st.text(st.characters(exclude_categories=["Cs"])),
            st.recursive(
                st.none()
                | st.booleans()
                | st.integers()
                | st.floats(allow_nan=False, allow_infinity=False)
                | st.text(st.characters(exclude_categories=["Cs"])),
                lambda inner: st.lists(inner, max_size=3),
                max_leaves=4,
            ),
            max_size=3,
        ),
    )
    def test_an_entry_is_read_as_it_was_sealed(self, ledger: Ledger, at: float, detail: dict):
        with ledger.write() as tx:
            tx.audit.append(at=at, actor="p", act="a", subject="s", detail=detail)
        with ledger.read() as tx:
            assert audit.verify(tx.audit.entries()) == []

    def test_many_entries_are_streamed(self, ledger: Ledger):
        with ledger.write() as tx:
            for number in range(600):
                tx.audit.append(at=number, actor="p", act="a", subject=str(number))
        with ledger.read() as tx:
            entries = tx.audit.entries()
            assert next(entries).subject == "0"
            assert sum(1 for _ in entries) == 599
