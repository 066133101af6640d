"""What a policy asks for that the gateway does not do, and why."""

from __future__ import annotations

from shipworthy.domain.lifecycle import DeploymentState, Release, manifest_of
from shipworthy.domain.names import ReleaseReference, Stage
from shipworthy.domain.policy import Policy
from shipworthy.ports import Transaction

_DECLARE = "declare 'contract.side_effects: none' in its next version if asking changes nothing"


def unheeded(tx: Transaction, policy: Policy) -> list[str]:
    """One sentence, with its cure, for each part of the policy that is not in force."""
    return [*filter(None, (unheeded_mirror(tx, policy), _unheeded_hedge(tx, policy)))]


def unheeded_mirror(tx: Transaction, policy: Policy) -> str:
    """Why no requests are copied although the policy says so; empty when they are."""
    if policy.mirror is None:
        return ""
    model, to = policy.model, policy.mirror.to
    serving = _holder(tx, model, Stage.PRODUCTION)
    if serving is None:
        return f"nothing of {model} is copied to {to}: production holds no release yet"
    stage = Stage(to) if to in set(Stage) else None
    release = _holder(tx, model, stage) if stage else _named(tx, model, to)
    if release is None:
        why = f"{to} holds no release" if stage else f"{to} is not registered"
        return f"nothing of {model} is copied to {to}: {why}; promote one, or correct mirror.to"
    if release.digest == serving.digest:
        return (
            f"nothing of {model} is copied to {to}: {release.name} is what answers in production;"
            " promote another one to staging"
        )
    if manifest_of(release).contract.side_effects != "none":
        return (
            f"nothing of {model} is copied to {to}: {release.name} does not say that it has no side"
            f" effects; {_DECLARE}"
        )
    if not _answers(tx, release, stage):
        return (
            f"nothing of {model} is copied to {to}: {release.name} does not run there now;"
            f" 'shipworthy status {model}' tells more"
        )
    return ""


def _unheeded_hedge(tx: Transaction, policy: Policy) -> str:
    """Why nothing is asked twice although the policy says so; empty when it is."""
    release = _holder(tx, policy.model, Stage.PRODUCTION)
    if policy.hedge is None or release is None:
        return ""
    if manifest_of(release).contract.side_effects != "none":
        return (
            f"no request for {policy.model} is asked twice: {release.name} does not say that it has"
            f" no side effects; {_DECLARE}"
        )
    return ""


def _holder(tx: Transaction, model: str, stage: Stage) -> Release | None:
    return tx.releases.find(ReleaseReference(model, stage=stage))


def _named(tx: Transaction, model: str, name: str) -> Release | None:
    own, _, version = name.rpartition("@")
    if own != model or not version.isdecimal():
        return None
    return tx.releases.find(ReleaseReference(model, version=int(version)))


def _answers(tx: Transaction, release: Release, stage: Stage | None) -> bool:
    return any(
        deployment.release == release.digest
        and deployment.wanted
        and stage in {None, deployment.stage}
        and deployment.state is not DeploymentState.FAILED
        for deployment in tx.deployments.list(release.model)
    )
