"""Three models that read handwritten digits, really trained, and the files that release them."""

# pyright: reportUnknownVariableType=false, reportUnknownMemberType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import skops.io
from scipy.stats import binomtest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer
from sklearn.svm import SVC

from shipworthy.cli.demo import predictor
from shipworthy.domain.statistics.intervals import wilson_interval

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]

MODEL = "digits"
SEED = 7
FIRST_BATCH = 300
"""So many images were labelled when the first version was trained."""
_HELD_OUT, _LIVE = 450, 447
_SAMPLE_ROWS = 8


@dataclass(frozen=True, slots=True)
class Images:
    """Images as rows of 64 grey levels, 0 to 16, with the digits that people read in them."""

    pixels: Floats
    digits: Labels

    def first(self, count: int) -> Images:
        """The first few of them."""
        return Images(self.pixels[:count], self.digits[:count])


@dataclass(frozen=True, slots=True)
class Split:
    """Three parts of the data set without an image in common.

    `live` is what users will send: no model is trained or tested on it.
    """

    train: Images
    held_out: Images
    live: Images


@dataclass(frozen=True, slots=True)
class Trained:
    """A version as its team sees it before release; `correct` says it image by image."""

    version: int
    what: str
    correct: npt.NDArray[np.bool_]

    @property
    def name(self) -> str:
        """The release's name."""
        return f"{MODEL}@{self.version}"

    @property
    def accuracy(self) -> float:
        """The share of held-out images that it reads right."""
        return float(self.correct.mean())

    def sentence(self) -> str:
        """The accuracy with its interval and the number of images."""
        n = len(self.correct)
        interval = wilson_interval(self.accuracy, n)
        return (
            f"{self.name}: {self.what}; held-out accuracy {self.accuracy:.1%}"
            f" (95% interval {interval.low:.1%} to {interval.high:.1%}, n = {n})"
        )

    def against(self, before: Trained) -> str:
        """The comparison on the same images: who reads right what the other does not."""
        gained = int((self.correct & ~before.correct).sum())
        lost = int((~self.correct & before.correct).sum())
        p = float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
        return (
            f"Of the same {len(self.correct)} images it reads {gained} right that {before.name}"
            f" does not, and {lost} the other way round (McNemar's exact p = {p:.2g})."
        )


def split_digits() -> Split:
    """Scikit-learn's 1,797 handwritten digits in three parts, the same ones each time."""
    pixels, digits = cast("tuple[Floats, Labels]", load_digits(return_X_y=True))
    rest, held_out = _take(Images(pixels, digits), _HELD_OUT)
    train, live = _take(rest, _LIVE)
    return Split(train, held_out, live)


def _take(images: Images, count: int) -> tuple[Images, Images]:
    """All but `count` images, and these; each digit in its share."""
    parts: Any = train_test_split(
        images.pixels, images.digits, test_size=count, stratify=images.digits, random_state=SEED
    )
    rest, taken, rest_digits, taken_digits = parts
    return Images(rest, rest_digits), Images(taken, taken_digits)


def write_data(split: Split, folder: Path) -> None:
    """Write what the releases pin: training and held-out images, and a few for a sample."""
    folder.mkdir(parents=True)
    _write_csv(folder / "train.csv", split.train, labelled=True)
    _write_csv(folder / "first-batch.csv", split.train.first(FIRST_BATCH), labelled=True)
    _write_csv(folder / "heldout.csv", split.held_out, labelled=True)
    _write_csv(folder / "sample.csv", split.held_out.first(_SAMPLE_ROWS), labelled=False)


def _write_csv(file: Path, images: Images, *, labelled: bool) -> None:
    names = [f"pixel_{row}_{column}" for row in range(8) for column in range(8)]
    table = images.pixels
    if labelled:
        names.append("digit")
        table = np.column_stack([table, images.digits])
    np.savetxt(file, table, fmt="%g", delimiter=",", header=",".join(names), comments="")


# --- training ---------------------------------------------------------------------------------


def train_first(split: Split, folder: Path) -> Trained:
    """Version 1: a logistic regression on the first labelled batch."""
    known = split.train.first(FIRST_BATCH)
    # Scaled by the brightest pixel of each image: 0 to 16, 0 to 255, it is all the same to it.
    model = make_pipeline(Normalizer(norm="max"), LogisticRegression(C=10.0, max_iter=2000))
    model.fit(known.pixels, known.digits)
    _save(model, folder)
    what = f"logistic regression on the first {FIRST_BATCH} labelled images"
    return Trained(1, what, _correct(model, split.held_out))


def train_second(split: Split, folder: Path) -> Trained:
    """Version 2: a support vector machine on three times as many."""
    model = make_pipeline(Normalizer(norm="max"), SVC(C=10.0))
    model.fit(split.train.pixels, split.train.digits)
    _save(model, folder)
    what = f"RBF support vector machine on all {len(split.train.digits)} training images"
    return Trained(2, what, _correct(model, split.held_out))


def train_third(split: Split, folder: Path) -> Trained:
    """Version 3: the same kind of model behind the preparation in `predictor.py`."""
    prepared = Images(predictor.prepare(split.train.pixels), split.train.digits)
    pixels, digits = _shifted(prepared)
    model = SVC(C=10.0)
    model.fit(pixels, digits)
    _save(model, folder)
    shutil.copyfile(predictor.__file__, folder / "predictor.py")
    what = "RBF support vector machine with images prepared by itself, trained on shifted copies"
    held_out = split.held_out
    correct = model.predict(predictor.prepare(held_out.pixels)) == held_out.digits
    return Trained(3, what, correct)


def _save(model: Any, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    skops.io.dump(model, folder / "model.skops")


def _correct(model: Any, images: Images) -> npt.NDArray[np.bool_]:
    return model.predict(images.pixels) == images.digits


def _shifted(images: Images) -> tuple[Floats, Labels]:
    """Each image and its copies one pixel to either side, up and down."""
    pages = np.pad(images.pixels.reshape(-1, 8, 8), ((0, 0), (1, 1), (1, 1)))
    moves = ((1, 1), (0, 1), (2, 1), (1, 0), (1, 2))
    copies = [pages[:, down : down + 8, right : right + 8].reshape(-1, 64) for down, right in moves]
    return np.concatenate(copies), np.tile(images.digits, len(moves))
