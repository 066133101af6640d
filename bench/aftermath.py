"""What a project looks like after a storm: every promise held against what is on disk.

Independent of the code that is on trial, where that is worth something: the lake is read with
DuckDB over the files that Delta's log names, the ledger by plain SQL. Only the journals, the
rollouts' states and the audit chain's hashes are decoded by the product's own code.
"""

from __future__ import annotations

import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import msgspec
import sqlalchemy
from deltalake import DeltaTable

from shipworthy.domain import audit
from shipworthy.domain.plan import BUCKETS
from shipworthy.domain.records import FeedbackRecord, InferenceRecord
from shipworthy.domain.rollout import RolloutState, RolloutStatus
from shipworthy.settings import Project
from shipworthy.stores.journal import JournalReader

TABLES = ("inferences", "feedback", "decisions", "minutes")
_SHOWN = 3  # examples in a problem


class Problem(NamedTuple):
    """A promise that was not kept, and how often."""

    kind: str
    text: str
    times: int = 1


@dataclass(slots=True)
class Acknowledged:
    """What clients were told is safe: ids of inferences, and of feedback."""

    inferences: set[str] = field(default_factory=set[str])
    feedback: set[str] = field(default_factory=set[str])


def examine(project: Project, acknowledged: Acknowledged) -> list[Problem]:
    """All that is wrong with the project's lake and ledger; nobody may be at work in it."""
    problems: list[Problem] = []
    with closing(_ledger(project)) as ledger, closing(_lake(project, problems)) as lake:
        if problems:
            return problems
        problems += _records(project, lake, acknowledged)
        problems += _minutes(lake)
        problems += _decisions(lake, ledger)
        problems += _traffic(lake, ledger)
        problems += _rollouts(lake, ledger)
        problems += _stages(ledger)
        problems += _terms(ledger)
        problems += _audit(ledger)
    return problems


# --- the lake -----------------------------------------------------------------------------------


def _lake(project: Project, problems: list[Problem]) -> duckdb.DuckDBPyConnection:
    """The four tables as views over the very files that they consist of now."""
    lake = duckdb.connect()
    for name in TABLES:
        folder = project.lake / name
        if not DeltaTable.is_deltatable(str(folder)):
            problems.append(Problem("lake", f"there is no table {name}"))
            continue
        files = DeltaTable(str(folder)).file_uris()
        if not files:
            problems.append(Problem("lake", f"the table {name} is empty"))
            continue
        source = lake.read_parquet(files, union_by_name=True, hive_partitioning=False)
        source.create_view(name)
    return lake


def _records(
    project: Project, lake: duckdb.DuckDBPyConnection, acknowledged: Acknowledged
) -> Iterator[Problem]:
    """Each acknowledged record once, and none twice; nor is one left behind in a journal."""
    written = _in_journals(project)
    for table, told, journalled in (
        ("inferences", acknowledged.inferences, written.inferences),
        ("feedback", acknowledged.feedback, written.feedback),
    ):
        found: Counter[str] = Counter(
            dict(lake.execute(f"SELECT id, count(*) FROM {table} GROUP BY id").fetchall())
        )
        yield from _told("lost", f"acknowledged {table} not in the lake", told - found.keys())
        left = journalled - found.keys() - told
        yield from _told("left", f"{table} of the journals not in the lake", left)
        twice = {id for id, count in found.items() if count > 1}
        yield from _told("doubled", f"{table} in the lake more than once", twice)


def _in_journals(project: Project) -> Acknowledged:
    """The records of the segments that are still there."""
    reader, cursors, written = JournalReader(project.journals), {}, Acknowledged()
    while True:
        records, cursors = reader.read(cursors, 10_000)
        for record in records:
            if isinstance(record, InferenceRecord):
                written.inferences.add(record.id)
            elif isinstance(record, FeedbackRecord):
                written.feedback.add(record.id)
        if not records:
            return written


_MINUTE = "CAST(floor(epoch({}) / 60) AS BIGINT)"
_CELLS = "plan, model, release, rollout, assigned, serving_release, outcome, reason"


def _minutes(lake: duckdb.DuckDBPyConnection) -> Iterator[Problem]:
    """The roll-up adds up to the inferences, in every cell."""
    cells = f"{_MINUTE.format('minute')}, {_CELLS}"
    sums = "sum(requests), sum(request_bytes), sum(response_bytes), sum(seconds)"
    rolled = _cells(lake, f"SELECT {cells}, {sums} FROM minutes WHERE slice = '' GROUP BY ALL")
    sums = "count(*), sum(request_bytes), sum(response_bytes), sum(seconds)"
    cells = f"{_MINUTE.format('time')}, {_CELLS}"
    counted = _cells(lake, f"SELECT {cells}, {sums} FROM inferences GROUP BY ALL")
    wrong = [
        f"{' '.join(map(str, cell))}: {rolled.get(cell)} instead of {counted.get(cell)}"
        for cell in rolled.keys() | counted.keys()
        if not _alike(rolled.get(cell), counted.get(cell))
    ]
    yield from _told("minutes", "cells of minutes that are not what the inferences say", wrong)


def _cells(lake: duckdb.DuckDBPyConnection, query: str) -> dict[tuple[str, ...], tuple[Any, ...]]:
    rows = lake.execute(query).fetchall()
    return {tuple(str(part or "") for part in row[:-4]): row[-4:] for row in rows}


def _alike(one: Sequence[Any] | None, other: Sequence[Any] | None) -> bool:
    if one is None or other is None:
        return False
    *exact, seconds = one
    *others, other_seconds = other
    return exact == others and math.isclose(seconds, other_seconds, rel_tol=1e-6, abs_tol=1e-6)


def _decisions(lake: duckdb.DuckDBPyConnection, ledger: sqlalchemy.Connection) -> Iterator[Problem]:
    """The lake's decisions are the ledger's."""
    fields = "sequence, id, model, kind, text, rollout"
    decided = Counter(map(_plainly, _rows(ledger, f"SELECT {fields} FROM decisions")))
    kept = Counter(map(_plainly, lake.execute(f"SELECT {fields} FROM decisions").fetchall()))
    for kind, text, rows in (
        ("lost", "decisions not in the lake", decided - kept),
        ("doubled", "decisions in the lake that the ledger has not so often", kept - decided),
    ):
        yield from _told(kind, text, [f"{row[0]} {row[3]}" for row in rows.elements()])


def _plainly(row: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(part or "" for part in row)


# --- lake and ledger ----------------------------------------------------------------------------


def _traffic(lake: duckdb.DuckDBPyConnection, ledger: sqlalchemy.Connection) -> Iterator[Problem]:
    """The keeper counted each request once."""
    minute = _MINUTE.format("time")
    counted: defaultdict[tuple[str, str, int], list[int]] = defaultdict(lambda: [0, 0, 0])
    for plan, release, at, assigned, failed in lake.execute(
        f"SELECT plan, release, {minute}, count(*), count(*) FILTER (outcome = 'failure')"
        " FROM inferences WHERE outcome IN ('success', 'failure') GROUP BY ALL"
    ).fetchall():
        counted[plan, release, at][:2] = [assigned, failed]
    for plan, release, at, served in lake.execute(
        f"SELECT plan, serving_release, {minute}, count(*) FROM inferences"
        " WHERE serving_release IS NOT NULL AND serving_release <> '' GROUP BY ALL"
    ).fetchall():
        counted[plan, release, at][2] = served
    kept = {
        (plan, release, at): [assigned, failed, served]
        for plan, release, at, assigned, failed, served in _rows(
            ledger, "SELECT plan, release, minute, assigned, failed, served FROM traffic_counts"
        )
    }
    wrong = [
        f"{' '.join(map(str, cell))}: keeper {kept.get(cell)}, lake {counted.get(cell)}"
        for cell in sorted(kept.keys() | counted.keys())
        if kept.get(cell) != counted.get(cell)
    ]
    yield from _told("traffic", "minutes that the keeper counted otherwise than the lake", wrong)


# --- rollouts -----------------------------------------------------------------------------------

_Status = RolloutStatus
_WAYS: Mapping[tuple[_Status, str], _Status] = {
    (_Status.PREPARING, "expose"): _Status.PROGRESSING,
    (_Status.PREPARING, "abort"): _Status.ABORTED,
    (_Status.PREPARING, "roll back"): _Status.ROLLED_BACK,
    (_Status.PROGRESSING, "go up"): _Status.PROGRESSING,
    (_Status.PROGRESSING, "hold"): _Status.HELD,
    (_Status.PROGRESSING, "pause"): _Status.PAUSED,
    (_Status.HELD, "pause"): _Status.PAUSED,
    (_Status.HELD, "resume"): _Status.PROGRESSING,
    (_Status.PAUSED, "resume"): _Status.PROGRESSING,
    (_Status.PROGRESSING, "complete"): _Status.COMPLETED,
    **{
        (status, kind): end
        for status in (_Status.PROGRESSING, _Status.PAUSED, _Status.HELD)
        for kind, end in (("roll back", _Status.ROLLED_BACK), ("abort", _Status.ABORTED))
    },
}


def _rollouts(lake: duckdb.DuckDBPyConnection, ledger: sqlalchemy.Connection) -> Iterator[Problem]:
    """Each rollout went a way that there is, and its requests were split as it said."""
    states = [
        (status, ended, msgspec.msgpack.decode(state, type=RolloutState))
        for status, ended, state in _rows(
            ledger, "SELECT status, ended, state FROM rollouts ORDER BY sequence"
        )
    ]
    decided: defaultdict[str, list[tuple[str, dict[str, Any]]]] = defaultdict(list)
    for rollout, kind, numbers in _rows(
        ledger,
        "SELECT rollout, kind, numbers FROM decisions WHERE rollout IS NOT NULL ORDER BY sequence",
    ):
        decided[rollout].append((kind, msgspec.json.decode(numbers)))
    for status, ended, state in states:
        for text in _way(status, ended, state, decided.pop(state.id, [])):
            yield Problem("rollout", f"{state.id} ({state.candidate_name}): {text}")
    yield from _told("rollout", "decisions about rollouts that there are not", decided)
    yield from _in_turn([state for _, _, state in states])
    yield from _splits(lake, {state.id: state for _, _, state in states})


def _way(
    status: str, ended: float | None, state: RolloutState, decisions: list[tuple[str, Any]]
) -> Iterator[str]:
    at, step = RolloutStatus.PREPARING, -1
    for kind, numbers in decisions:
        after = _WAYS.get((at, kind))
        if after is None:
            yield f"{kind!r} was decided while it was {at}"
            return
        step += kind in {"expose", "go up"}
        if kind in {"expose", "go up"} and not _is_step(state, step, numbers):
            yield f"{kind!r} led to {numbers.get('weight')}, which is not step {step} of its policy"
        if kind == "complete" and step != len(state.rules.steps) - 1:
            yield f"it was completed at step {step} of {len(state.rules.steps)}"
        at = after
    if not (at == state.status == status):
        yield f"its decisions make it {at}, its row says {status}, its state {state.status}"
    if state.status.ended != (ended is not None) or ended != state.ended:
        yield f"it is {state.status} and its end is {ended}"
    if state.status.exposed and state.weight != state.rules.steps[state.step].weight:
        yield f"its weight is {state.weight}"


def _is_step(state: RolloutState, step: int, numbers: Mapping[str, Any]) -> bool:
    steps = state.rules.steps
    return step < len(steps) and numbers.get("weight") == steps[step].weight


def _in_turn(states: Iterable[RolloutState]) -> Iterator[Problem]:
    """One rollout of a model at a time."""
    by_model: defaultdict[str, list[RolloutState]] = defaultdict(list)
    for state in states:
        by_model[state.model].append(state)
    for each in by_model.values():
        for before, after in pairwise(each):
            if before.ended is None or before.ended > after.started:
                text = f"{after.id} began at {after.started} before {before.id} had ended"
                yield Problem("rollout", text)


def _splits(
    lake: duckdb.DuckDBPyConnection, states: Mapping[str, RolloutState]
) -> Iterator[Problem]:
    """Requests were assigned by weights of the policy's steps, and evidence not counted twice."""
    exposed: Counter[str] = Counter()
    for rollout, assigned, probability, evidence in lake.execute(
        "SELECT rollout, assigned, probability,"
        " count(*) FILTER (outcome IN ('success', 'failure')) FROM inferences"
        " WHERE rollout IS NOT NULL AND rollout <> '' GROUP BY ALL"
    ).fetchall():
        state = states.get(rollout)
        if state is None:
            yield Problem("rollout", f"requests of a rollout {rollout} that the ledger has not")
            continue
        share = probability if assigned == "candidate" else 1.0 - probability
        if round(share * BUCKETS) not in {step.weight for step in state.rules.steps}:
            yield Problem("rollout", f"{rollout}: requests were split at {share:.2%}")
        exposed[rollout] += evidence if assigned == "candidate" else 0
    for id, state in states.items():
        if state.exposed_requests > exposed[id]:
            text = (
                f"{id}: decided on {state.exposed_requests} requests to the candidate,"
                f" and there were {exposed[id]}"
            )
            yield Problem("rollout", text)


def _stages(ledger: sqlalchemy.Connection) -> Iterator[Problem]:
    """Who held production follows from rollouts, first promotions and ways back."""
    entries: defaultdict[tuple[str, str], list[tuple[str, bool]]] = defaultdict(list)
    for model, stage, release, rollback in _rows(
        ledger, "SELECT model, stage, release, rollback FROM stage_entries ORDER BY sequence"
    ):
        entries[model, stage].append((release, bool(rollback)))
    completed: defaultdict[str, list[str]] = defaultdict(list)
    for model, state in _rows(
        ledger,
        "SELECT model, state FROM rollouts WHERE status = 'completed' ORDER BY ended, sequence",
    ):
        completed[model].append(msgspec.msgpack.decode(state, type=RolloutState).candidate)
    for (model, stage), history in entries.items():
        yield from _walk(f"{model} in {stage}", history)
        if stage == "production":
            forward = [release for release, rollback in history if not rollback][1:]
            if forward != completed[model]:
                text = f"{model}: {len(forward)} releases took production over, and not those of"
                yield Problem("stages", f"{text} its {len(completed[model])} completed rollouts")


def _walk(where: str, history: Sequence[tuple[str, bool]]) -> Iterator[Problem]:
    stack: list[str] = []
    for release, rollback in history:
        if not rollback:
            if stack and stack[-1] == release:
                yield Problem("stages", f"{where}: {release[:15]} took over from itself")
            stack.append(release)
        elif len(stack) < 2 or stack[-2] != release:
            yield Problem("stages", f"{where}: went back to {release[:15]}, which was not before")
        else:
            stack.pop()


# --- terms and the audit log --------------------------------------------------------------------


def _terms(ledger: sqlalchemy.Connection) -> Iterator[Problem]:
    """Keepers' terms only ever grow, and no plan is from one to come."""
    begun = [
        int(subject)
        for (subject,) in _rows(
            ledger,
            "SELECT subject FROM audit_entries WHERE act = 'begin term' ORDER BY sequence",
        )
    ]
    for before, after in pairwise(begun):
        if after <= before:
            yield Problem("terms", f"term {after} was begun after term {before}")
    ((current,),) = _rows(ledger, "SELECT number FROM keeper_term")
    if begun and current != begun[-1]:
        yield Problem("terms", f"the term is {current}, and the last that was begun {begun[-1]}")
    for name, plan in _rows(ledger, "SELECT name, plan FROM plans"):
        if msgspec.json.decode(plan)["fence"] > current:
            yield Problem("terms", f"plan {name} is from a term after {current}")


def _audit(ledger: sqlalchemy.Connection) -> Iterator[Problem]:
    """The chain holds, and each decision is in it once."""
    fields = audit.AuditEntry.__struct_fields__
    entries = [
        audit.AuditEntry(**{**dict(row), "detail": msgspec.json.decode(row["detail"])})
        for row in ledger.execute(
            sqlalchemy.text(f"SELECT {', '.join(fields)} FROM audit_entries ORDER BY sequence")
        ).mappings()
    ]
    ((sequence, head),) = _rows(ledger, "SELECT sequence, hash FROM audit_head")
    for problem in audit.verify(entries, head=audit.AuditHead(sequence=sequence, hash=head)):
        yield Problem("audit", problem)
    recorded = Counter(entry.detail["decision"] for entry in entries if "decision" in entry.detail)
    decided = Counter(id for (id,) in _rows(ledger, "SELECT id FROM decisions"))
    wrong = (recorded - decided) + (decided - recorded)
    yield from _told("audit", "decisions that the audit log has not just once", wrong)


def _ledger(project: Project) -> sqlalchemy.Connection:
    url = sqlalchemy.make_url(project.ledger_url)
    if url.get_backend_name() == "postgresql":
        url = url.set(drivername="postgresql+psycopg")
    return sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool).connect()


def _rows(ledger: sqlalchemy.Connection, query: str) -> list[Any]:
    return list(ledger.execute(sqlalchemy.text(query)))


def _told(kind: str, what: str, found: Iterable[str]) -> Iterator[Problem]:
    """One problem for all of a kind, with a few of them."""
    names = sorted(found)
    if names:
        shown = "; ".join(names[:_SHOWN]) + ("; …" if len(names) > _SHOWN else "")
        yield Problem(kind, f"{len(names)} {what}: {shown}", len(names))


# --- processes ----------------------------------------------------------------------------------


def left_running(project: Project) -> list[Problem]:
    """Processes that speak of this project or work in its folder."""
    return [
        Problem("orphan", f"process {pid} still runs: {' '.join(words)[:150]}")
        for pid, words in processes(project.root)
    ]


def processes(root: Path) -> Iterator[tuple[int, list[str]]]:
    """Ids and words of all processes but this one that name the folder or work in it."""
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        try:
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            cwd = (folder / "cwd").readlink()
        except OSError:
            continue  # it has ended, or is none of ours
        named = any(f"{root}/" in f"{word}/" or f'{root}"' in word for word in words)
        if any(words) and (named or cwd == root or root in cwd.parents):  # a zombie has no words
            yield int(folder.name), words
