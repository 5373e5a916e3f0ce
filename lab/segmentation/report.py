"""Results of the segmentation study: mIoU with standard errors, paired differences, tables and a picture.

Shapes: M held-out images, E emoji, C classes, R bootstrap samples.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from benchmarks.table import END, START, rewrite
from lab.markdown import table
from lab.segmentation.collage import CATEGORIES
from lab.segmentation.run import LONGER, TESTS, Arm, Study, Test, Trial, plan
from lab.study import shards
from lab.study.statistics import Estimate, cell, standard_error
from lab.trials import machine
from m3ae_fast.base.atomic_file import atomic_write, write_text_atomically
from m3ae_fast.base.parquet import read_parquet
from m3ae_fast.evaluation.predictions import FILE as PREDICTIONS
from m3ae_fast.evaluation.resampling import bootstrap_weights
from m3ae_fast.evaluation.segment import Counts

PAGE, JSON, PICTURE = "README.md", "segmentation.json", "segmentation.png"
RESAMPLES = 1000
LARGEST = "largest"
NAMES = {LARGEST: "the largest class", "pixels": "pixels of the patch", "random": "random weights", "mae": "MAE",
         "m3ae": "M3AE", "longer": f"MAE ({LONGER} x steps)"}  # fmt: skip
TITLES = {TESTS[0]: "foreground, linear", TESTS[1]: "foreground, k-NN", TESTS[2]: "categories, linear"}
PAIRS: tuple[tuple[Arm, Arm], ...] = (("mae", "random"), ("mae", "pixels"), ("m3ae", "mae"), ("random", "pixels"),
                                     ("longer", "mae"), ("longer", "random"))  # fmt: skip
DRAWN: tuple[Arm, ...] = ("pixels", "random", "mae", "m3ae")  # columns of the picture
TITLE_HEIGHT = 18  # height in pixels of the headings in a picture of `evaluate segment`


class Results:
    """The results so far."""

    def __init__(self, study: Study, seeds: int) -> None:
        self.study = study
        self.found = [trial for trial in plan(seeds) if study.done(trial)]
        held_out = shards.read(study.shards / CATEGORIES, ("val",))
        self.emoji = {sample.key: sample.about["emoji"] for sample in held_out}  # code points by key

    def seeds(self, arm: str, test: Test) -> list[int]:
        """Return the seeds with results. The arm that always predicts the largest class has the seeds of the pixels."""
        arm = "pixels" if arm == LARGEST else arm
        return [trial.seed for trial in self.found if (trial.arm, trial.test) == (arm, test)]

    def miou(self, arm: str, test: Test) -> Estimate | None:
        """Return the mIoU; None if there is no result."""
        return self._estimate(test, self.seeds(arm, test), [(arm, 1)])

    def difference(self, first: str, second: str, test: Test) -> Estimate | None:
        """Return the difference of two mIoU, first minus second, over the seeds that both have; None if there are
        none."""
        seeds = [seed for seed in self.seeds(first, test) if seed in self.seeds(second, test)]
        return self._estimate(test, seeds, [(first, 1), (second, -1)])

    def iou(self, arm: str, test: Test) -> np.ndarray:
        """Return the IoU of each class, mean over seeds, [C]."""
        seeds = self.seeds(arm, test)
        return np.mean([self._counts(arm, test, seed).iou() for seed in seeds], axis=0)

    def _estimate(self, test: Test, seeds: list[int], parts: Sequence[tuple[str, int]]) -> Estimate | None:
        """Return the sum of the mIoU of several arms, each with its sign in `parts`; None if there are no seeds."""
        if not seeds:
            return None
        by_seed, draws_SR = [], []
        for seed in seeds:
            found = [(sign, *self._draws(arm, test, seed)) for arm, sign in parts]
            by_seed.append(sum(sign * whole for sign, whole, _ in found))
            draws_SR.append(sum(sign * draws_R for sign, _, draws_R in found))
        of_emoji = float(np.mean(draws_SR, axis=0).std(ddof=1))
        error = math.hypot(of_emoji, standard_error(by_seed))
        return Estimate(float(np.mean(by_seed)), error, len(seeds), len({*self.emoji.values()}))

    @cache  # noqa: B019, an instance lives for one report
    def _draws(self, arm: str, test: Test, seed: int) -> tuple[float, np.ndarray]:
        """Return the mIoU, and its values for bootstrap samples of the emoji, [R]. The bootstrap samples are the same
        for all arms."""
        counts = self._counts(arm, test, seed)
        whole, *draws = (counts.miou(each) for each in bootstrap_weights(len(counts.truth_MC), RESAMPLES, 0))
        return whole, np.array(draws)

    @cache  # noqa: B019, as above
    def _counts(self, arm: str, test: Test, seed: int) -> Counts:
        """Return the numbers of pixels by emoji and class, summed over the images of each emoji."""
        if arm == LARGEST:
            return self._counts("pixels", test, seed).largest()
        table = read_parquet(self.study.folder(Trial(arm, test, seed)) / PREDICTIONS)
        _, rows = np.unique([self.emoji[key.rpartition("/")[2]] for key in table["key"]], return_inverse=True)
        parts = []
        for name in ("class_right", "class_pixels", "class_predicted"):
            values_MC = np.array(table[name])
            parts.append(np.zeros((rows.max() + 1, values_MC.shape[1]), values_MC.dtype))
            np.add.at(parts[-1], rows, values_MC)
        return Counts(*parts)


def save(folder: Path, head: dict[str, Any], study: Study, seeds: int, classes: Sequence[str]) -> None:
    """Write the results so far to a folder, as JSON, Markdown and a picture. Text outside the tables of an existing
    page is kept.

    Args:
        folder: output folder.
        head: properties of the machine and settings, for the JSON file.
        study: the study.
        seeds: number of seeds.
        classes: names of the classes of CATEGORIES, without the background.
    """
    folder.mkdir(parents=True, exist_ok=True)
    results = Results(study, seeds)
    rows = [
        {"encoder": arm, "masks": test.masks, "head": test.head, **estimate._asdict()}
        for test in TESTS
        for arm in NAMES
        if (estimate := results.miou(arm, test))
    ]
    write_text_atomically(folder / JSON, json.dumps({**head, "miou": rows}, indent=1) + "\n")
    page = folder / PAGE
    text = page.read_text(encoding="utf-8") if page.exists() else f"# Segmentation\n\n{START}\n{END}\n"
    made = f"{machine(head['about'])}. "
    made += "mIoU in %, mean ± standard error over emoji and seeds (number of seeds); differences in points.\n\n"
    made += "\n\n".join(table(header, rows) for header, *rows in tables(results, ["background", *classes]))
    write_text_atomically(page, rewrite(text, f"\n{made}\n\n"))
    draw(results, folder / PICTURE)


def tables(results: Results, classes: Sequence[str]) -> list[list[list[str]]]:
    """Return tables of the mIoU, of differences, and of the IoU by class, each with its header as the first line."""
    scores = [["features", *TITLES.values()]]
    scores += [[NAMES[arm], *(cell(results.miou(arm, test)) for test in TESTS)] for arm in NAMES]
    apart = [["difference", *TITLES.values()]]
    for one, other in PAIRS:
        cells = [cell(results.difference(one, other, test), "+") for test in TESTS]
        apart.append([f"{NAMES[one]} minus {NAMES[other]}", *cells])
    test = Test(CATEGORIES, "linear")
    arms = [arm for arm in NAMES if arm != LARGEST and results.seeds(arm, test)]
    by_class = [["IoU in %, linear head", *(NAMES[arm] for arm in arms)]]
    iou = {arm: results.iou(arm, test) for arm in arms}
    by_class += [[name, *(f"{100 * iou[arm][row]:.1f}" for arm in arms)] for row, name in enumerate(classes)]
    return [scores, apart, by_class]


def draw(results: Results, path: Path) -> None:
    """Write a picture of held-out images, their masks, and the categories that the linear heads of the first seed
    predict, with one column of predictions for each complete encoder. The columns are cut from the pictures that
    `evaluate segment` has written."""
    test = Test(CATEGORIES, "linear")
    sheets = [(arm, results.study.folder(Trial(arm, test, 0)) / "segmentation.png") for arm in DRAWN]
    sheets = [(arm, sheet) for arm, sheet in sheets if 0 in results.seeds(arm, test)]
    if not sheets:
        return
    columns = []
    for number, (arm, sheet) in enumerate(sheets):
        with Image.open(sheet) as opened:
            whole = opened.convert("RGB")
        third = whole.width // 3
        if number == 0:
            columns.append((whole.crop((0, 0, 2 * third, whole.height)), ""))
        columns.append((whole.crop((2 * third, 0, whole.width, whole.height)), NAMES[arm]))
    picture = Image.new("RGB", (sum(column.width for column, _ in columns), columns[0][0].height), "white")
    left = 0
    for column, title in columns:
        if title:  # replaces "prediction"
            column.paste("white", (0, 0, column.width, TITLE_HEIGHT))
            ImageDraw.Draw(column).text((4, 4), title, fill="black")
        picture.paste(column, (left, 0))
        left += column.width
    with atomic_write(path) as partial:
        picture.save(partial, format="PNG")
