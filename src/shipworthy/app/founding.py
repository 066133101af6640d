"""Making a project, and putting policies in force."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from shipworthy.app.session import Session, open_session
from shipworthy.domain.gates import unmeetable
from shipworthy.domain.lifecycle import FOUR_EYES, StoredPolicy, Waiver
from shipworthy.domain.policy import PRESETS, Policy, with_preset
from shipworthy.errors import Conflict, InvalidDocument, NotFound, UsageError
from shipworthy.protocols.documents import read_document
from shipworthy.release.catalogue import built_in
from shipworthy.rollout.intents import put_policy
from shipworthy.rollout.unheeded import unheeded
from shipworthy.settings import FILE, STATE

_SETTINGS = """\
# Settings of this Shipworthy project. Everything has a default; uncomment what you change.
preset: {preset}            # how strict new policies are: prototype, standard or critical
# ledger: sqlite:///path/to/ledger.db
# gateway: {{host: 127.0.0.1, port: 8080}}
# journal: {{max_bytes: 1073741824}}
# keys: {{max_stale: 1d}}         # without it keys hold for as long as the keeper is away
"""


def make_project(root: Path, *, preset: str, solo: bool) -> Session:
    """Write a project that works into a folder; Conflict when there is one already.

    With `solo` a standing waiver is recorded that lets the one person here approve what they made.
    """
    if preset not in PRESETS:
        message = f"no preset {preset!r}; presets are {', '.join(PRESETS)}"
        raise UsageError(message)
    seats = with_preset({"preset": preset})["promotion"]["production"].get("approvals", 0)
    if solo and seats > 1:
        message = (
            f"the {preset} preset asks for {seats} people beside a release's maker, which one"
            " person can't meet; leave --solo out or take another preset"
        )
        raise UsageError(message)
    if (root / FILE).exists():
        message = f"{root.resolve()} is a Shipworthy project already; edit its {FILE}"
        raise Conflict(message)
    root.mkdir(parents=True, exist_ok=True)
    (root / FILE).write_text(_SETTINGS.format(preset=preset), encoding="utf-8")
    ignore_state(root)
    session = open_session(root, prepare=True)
    if solo:
        _waive_four_eyes(session)
    return session


def ignore_state(root: Path) -> None:
    """Keep keys and blobs out of version control, where the folder may be under it."""
    file, line = root / ".gitignore", f"{STATE}/"
    present = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    if line not in present:
        file.write_text("\n".join([*present, line]) + "\n", encoding="utf-8")


def _waive_four_eyes(session: Session) -> None:
    actor, now = session.actor(), session.clock()
    with session.ledger.write() as tx:
        tx.evidence.add_waiver(
            Waiver(what=FOUR_EYES, by=actor.id, at=now, reason="one person works here alone")
        )
        tx.audit.append(at=now, actor=actor.id, act="waive", subject=FOUR_EYES)


@dataclass(frozen=True, slots=True)
class Applied:
    """What became of a policy file: changes as `path: before → after`, none when in force.

    `notes` say what it asks for that is not done as things stand.
    """

    file: str
    model: str
    new: bool
    changes: list[str]
    notes: list[str]


def apply_policies(session: Session, source: Path, *, dry_run: bool) -> list[Applied]:
    """Put policies in force; with `dry_run` only say what would change.

    `source` is a file, or a folder: then all `policy.yaml` and `*.policy.yaml` below it. Nothing is
    changed when any file has a problem: InvalidDocument tells all of them.
    """
    policies = _read_all(source)
    actor, now = session.actor(), session.clock()
    applied: list[Applied] = []
    with session.ledger.write() as tx:
        for file, policy in policies:
            before = tx.policies.current(policy.model)
            changes = _changes(before, policy)
            applied.append(
                Applied(file, policy.model, before is None, changes, unheeded(tx, policy))
            )
            if not dry_run:
                put_policy(tx, policy, by=actor.id, at=now)
    return applied


def _read_all(source: Path) -> list[tuple[str, Policy]]:
    files = _policy_files(source)
    problems: list[str] = []
    read: list[tuple[str, Policy]] = []
    for file in files:
        try:
            policy = read_policy(file)
        except InvalidDocument as error:
            problems += error.problems
            continue
        others = [name for name, other in read if other.model == policy.model]
        if others:
            problems.append(f"{file}: {others[0]} is a policy of {policy.model} too; keep one")
        read.append((str(file), policy))
    if problems:
        raise InvalidDocument(problems)
    return read


def _policy_files(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    if not source.is_dir():
        message = f"no file or folder {source}"
        raise NotFound(message)
    files = sorted({*source.rglob("policy.yaml"), *source.rglob("*.policy.yaml")})
    files = [file for file in files if STATE not in file.parts]
    if not files:
        message = f"no policy.yaml or *.policy.yaml below {source}"
        raise NotFound(message)
    return files


def read_policy(file: Path) -> Policy:
    """Read a policy over its preset; what can never be met is a problem of the file."""
    policy = read_document(file.read_bytes(), str(file), Policy, prepare=with_preset)
    impossible = [*unmeetable(policy.promotion, built_in()), *filter(None, [policy.nowhere()])]
    if impossible:
        raise InvalidDocument([f"{file}: {problem}" for problem in impossible])
    return policy


def _changes(before: StoredPolicy | None, after: Policy) -> list[str]:
    old = dict(_flat(before.document)) if before else {}
    new = dict(_flat(after.model_dump(mode="json")))
    return [
        f"{path}: {old.get(path, 'unset')} → {new.get(path, 'unset')}"
        for path in sorted({*old, *new})
        if old.get(path) != new.get(path)
    ]


def _flat(value: Any, path: str = "") -> list[tuple[str, Any]]:
    children: list[tuple[str, Any]] = []
    if isinstance(value, dict):
        mapping = cast("dict[str, Any]", value)
        children = [(f"{path}.{key}" if path else key, inner) for key, inner in mapping.items()]
    elif isinstance(value, list):
        items = cast("list[Any]", value)
        children = [(f"{path}[{index}]", inner) for index, inner in enumerate(items)]
    else:
        return [(path, value)]
    return [leaf for name, inner in children for leaf in _flat(inner, name)]
