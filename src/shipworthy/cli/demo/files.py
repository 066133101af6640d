"""The files that a team would write: `policy.yaml`, and a `release.yaml` for each version."""

from __future__ import annotations

from pathlib import Path

from shipworthy.cli.demo.models import MODEL, SEED, Trained

_POLICY = """\
# What must hold for {model} to be promoted, to stay, and to be rolled back.
# Put in force with: shipworthy apply -f policy.yaml
model: {model}
preset: standard            # all that this file does not say

north_star: share of digits read right, by the labels that come back

risks:
  - problem: a release fails on images that its tests have not seen
    metric: failed answers, by user, candidate against stable
    monitor: the error guardrail of every rollout
    action: everything back to stable, by itself

promotion:
  staging:
    # The standard ones but for owner.contact: nobody reads mail for a demo.
    checks: [assets.stored, assets.described, contract.declared, assets.final-format]
  production:
    rules:
      # Judged on the interval's lower end, so a lucky small test does not pass.
      - {{metric: heldout.accuracy, at_least: 0.92}}
    approvals: 1            # by somebody other than the release's maker

rollout:
  steps:
    - {{weight: 10%, requests: 100}}
    - {{weight: 50%, requests: 100}}
  margin: 2%                # the default is 1%, which takes twice as many users to prove
  step_limit: 2m            # a demo has no day to wait
  keep_warm: 30m

rollback:
  alpha: 0.01               # the chance of throwing out a release that is no worse

deadlines: {{connect: 1s, attempt: 1.5s, total: 10s}}

capture: {{payloads: full}}   # so that labels can be held against answers
"""

_RELEASE = """\
# Register with: shipworthy release create -f {folder}/release.yaml
model: {model}
version: {version}
description: {what}
owner: {{name: Vision team, email: vision@example.org}}
artifacts:
{artifacts}
data:
  - {{name: train, path: ../data/{train}, role: train}}
  - {{name: heldout, path: ../data/heldout.csv, role: test}}
  - {{name: sample, path: ../data/sample.csv, role: sample}}
contract:
  inputs: [{{name: input, datatype: FP64, shape: [-1, 64]}}]
  outputs: [{{name: predict, datatype: INT64, shape: [-1]}}]
  side_effects: none
training: {{command: shipworthy demo, seed: {seed}}}
metrics:
  heldout:
    accuracy: {{value: {accuracy!r}, n: {n}}}
"""

_SKOPS = "  - {path: model.skops, format: skops}"
_OWN_CODE = """\
  - {path: predictor.py, format: python}   # its own preparation of the images
  - {path: model.skops, format: file}"""


def write_policy(file: Path) -> None:
    """The policy of the model."""
    file.write_text(_POLICY.format(model=MODEL), encoding="utf-8")


def write_release(file: Path, trained: Trained) -> None:
    """The description of one version, beside its artifacts."""
    own_code = (file.parent / "predictor.py").is_file()
    first = trained.version == 1
    text = _RELEASE.format(
        folder=file.parent.name,
        model=MODEL,
        version=trained.version,
        what=trained.what,
        artifacts=_OWN_CODE if own_code else _SKOPS,
        train="first-batch.csv" if first else "train.csv",
        seed=SEED,
        accuracy=trained.accuracy,
        n=len(trained.correct),
    )
    file.write_text(text, encoding="utf-8")
