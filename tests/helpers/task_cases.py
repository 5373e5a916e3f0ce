"""A program that runs evaluation tasks once, on the ranks on which it is started: `main([RUN, DATA, OUT, *CASES])`. By
default, it runs all of them.

DATA is a folder written by `write_data`. The results are written to folders in OUT. If a task ends because too many
samples are unreadable, its error message is written to OUT/refused.json."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from m3ae_fast.base.errors import UserError
from m3ae_fast.evaluation.task_runner import evaluate
from m3ae_fast.process.session import joined_program
from tests.helpers.labelled import NAMES, coloured, labelled_tar
from tests.helpers.shards import write_tar

TRAIN, VAL = range(47), range(100, 117)  # neither can be split evenly: some ranks have no sample in the last batch
BAD = (1, 5, 101, 106)  # unreadable images: two of --train and two of --val, which different ranks read
# tasks that count the unreadable samples of all ranks; their limit is one sample
REFUSED = {
    "knn": "data.max_bad_fraction=0.03",
    "finetune": "data.max_bad_fraction=0.06",
    "robustness": "data.max_bad_fraction=0.06",
}
_LISTS: list[list[str]] = [["cold", "blue"], ["green", "cold"], []]
_SHORT = ["attentive.steps=3", "attentive.batch=16", "attentive.online=false", "attentive.peak_lr=0.01"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "knn": ("knn", {}),
    "logistic": ("logistic", {}),
    "linear": ("linear", {"overrides": ["train.steps=3", "train.global_batch=16", "optim.peak_lr=1"]}),
    "poolings": ("logistic", {"layers": "all", "pools": "all"}),
    "shots": ("knn", {"shots": [2, 5]}),
    "attentive": ("attentive", {"pools": "all", "overrides": _SHORT}),
    "logistic-lists": ("logistic", {"labels": "json.tags"}),
    "knn-lists": ("knn", {"labels": "json.tags"}),
    "attentive-lists": ("attentive", {"labels": "json.tags", "overrides": _SHORT[:3]}),
    "segment": ("segment", {"overrides": ["segment.steps=9", "segment.batch=5", "segment.peak_lr=0.01"]}),
    "segment-knn": ("segment", {"overrides": ["segment.head=knn", "segment.bank_patches=200"]}),
    "finetune": (
        "finetune",
        {"overrides": ["train.steps=2", "train.global_batch=12", "train.precision=fp32"]},
    ),
    "robustness": (
        "robustness",
        {"overrides": ["robustness.epsilons=[2]", "robustness.steps=2", "encode.batch=4"]},
    ),
    "ood": ("ood", {}),
    "compare": (
        "compare",
        {"seeds": 1, "probes": ["knn", "attentive"], "overrides": [*_SHORT[:2], "attentive.online=true"]},
    ),
}


def write_data(
    folder: Path, train: Iterable[int] = TRAIN, val: Iterable[int] = VAL, distinct: int | None = None
) -> None:
    """Write shards of coloured images with captions, labels, lists of labels and masks. The images in BAD cannot be
    read. `distinct`: number of distinct images, which are repeated with different masks; None: all images differ."""
    for name, numbers in (("train", train), ("val", val)):
        files = []
        for number in numbers:
            mask = np.zeros((40, 40), np.uint8)
            mask[number % 30 :, : 40 - number % 20] = 1 + number % 3
            png = io.BytesIO()
            Image.fromarray(mask).save(png, "PNG")
            fields = {"tags": _LISTS[number % 3]}
            content = number % (distinct or number + 1)
            files += [
                (f"{number:05d}.png", b"" if number in BAD else coloured(content, NAMES[content % 3])),
                (f"{number:05d}.txt", f"a {NAMES[number % 3]} picture of {number}".encode()),
                (f"{number:05d}.cls", str(number % 3).encode()),
                (f"{number:05d}.json", json.dumps(fields).encode()),
                (f"{number:05d}.mask.png", png.getvalue()),
            ]
        write_tar(folder / f"{name}.tar", files)
    labelled_tar(folder / "other.tar", range(200, 211))


def main(arguments: list[str]) -> int:
    """Run the tasks."""
    run, data, out = map(Path, arguments[:3])
    names = arguments[3:]
    with joined_program("cpu") as session:

        def perform(name: str, folder: str, limit: str = "data.max_bad_fraction=0.2") -> None:
            task, options = CASES[name]
            trains = {} if task == "robustness" else {"train": str(data / "train.tar")}
            encoded = [] if task in ("finetune", "robustness") else ["encode.precision=fp32", "encode.batch=4"]
            evaluate(
                task,
                out / "logistic" if task == "robustness" else run,
                val=str(data / "val.tar"),
                out=out / folder,
                session=session,
                **trains,
                **({"ood": {"other": [str(data / "other.tar")]}} if task == "ood" else {}),
                **options | {"overrides": ["data.workers=0", limit, *encoded, *options.get("overrides", [])]},
            )

        for name in names or CASES:
            perform(name, name)
        if names:
            return 0
        refused = {}
        for name, limit in REFUSED.items():
            message = ""
            try:
                perform(name, f"refused-{name}", limit)
            except UserError as error:
                message = str(error)
            refused[name] = session.ranks.gather(message)
        if session.ranks.is_main:
            (out / "refused.json").write_text(json.dumps(refused))
    return 0
