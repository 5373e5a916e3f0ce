"""The evaluation tasks and their options. This module does not import torch, so that `--help` is fast.

A new task needs an entry in `TASKS`, a module in this package with a function `run(job)`, and a section of
EvaluationConfig if it has settings. A new frozen probe also needs an entry in `PROBES` of `probes.py`, and its name in
`PROBE_NAMES` if `compare` is to offer it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

from m3ae_fast.base import object_store
from m3ae_fast.base.errors import UserError
from m3ae_fast.base.libraries import require_libraries
from m3ae_fast.config import POOLS, Pool
from m3ae_fast.config.evaluation import FINETUNE, LINEAR, Uses
from m3ae_fast.weights.model_name import IMAGE_FEATURES, RANDOM

DRAWS = 5  # number of draws for each number of shots

PROBE_NAMES = ("knn", "logistic", "attentive")  # probes that `compare` can use
MOST_SEEDS = 100
COLUMN_NAMES = ("path", "class", "caption")  # additional columns of `embed`
Modality = Literal["image", "text", "paired"]
MODALITIES: tuple[Modality, ...] = get_args(Modality)
_NAMED = re.compile(r"([A-Za-z0-9_-]+)=(.+)", re.DOTALL)  # NAME=SHARDS, the first value of an option --ood


class Task(NamedTuple):
    """Properties of a task. Its module in this package has a function `run(job)`, which returns the result, or None if
    the task was stopped before its end."""

    about: str  # description for --help
    trains: bool = True  # has the options --train and --labels
    resumes: bool = False  # has the option --resume
    has_masks: bool = False  # the labels are masks, so there is no --labels
    classifies: bool = False  # MODEL is a classifier; has the option --labels
    may_classify: bool = False  # MODEL may be a classifier
    modality: Modality | None = None  # the only modality that it supports; None: any
    has_probe_grid: bool = False  # has the options --layers, --pools and --shots
    compares: bool = False  # accepts several MODELs, and opens them itself
    takes_image_features: bool = False  # MODEL may be one of IMAGE_FEATURES
    has_baselines: bool = False  # baselines are evaluated too; has the option --no-baselines
    uses: Uses = Uses(("encode",))  # the settings that it uses
    libraries: tuple[str, ...] = ()  # optional libraries that it requires
    example: str = "encode.pool=cls"  # an example of --set for --help

    @property
    def has_labels(self) -> bool:
        """Return whether the task has the option --labels."""
        return (self.trains or self.classifies) and not self.has_masks


TASKS = {
    "knn": Task(
        "k-nearest-neighbour accuracy of frozen features",
        has_probe_grid=True,
        takes_image_features=True,
        has_baselines=True,
        uses=Uses(("encode", "knn")),
        example="knn.k=10",
    ),
    "logistic": Task(
        "logistic regression on frozen features, with one of five L2 penalties; the classifier is saved in OUT",
        has_probe_grid=True,
        takes_image_features=True,
        has_baselines=True,
    ),
    "linear": Task(
        "train a linear classifier on the frozen features of random crops, as in the official code; the classifier is "
        "saved in OUT",
        resumes=True,
        has_baselines=True,
        uses=LINEAR,
        example="optim.peak_lr=0.1",
    ),
    "attentive": Task(
        "train a linear classifier and a query that pools the frozen patch tokens",
        modality="image",
        has_probe_grid=True,
        has_baselines=True,
        uses=Uses(("encode", "attentive")),
        example="attentive.steps=1000",
    ),
    "finetune": Task(
        "train the encoder with a classification head; the classifier is saved in OUT",
        resumes=True,
        has_baselines=True,
        uses=FINETUNE,
        libraries=("timm",),
        example="train.epochs=50",
    ),
    "segment": Task(
        "semantic segmentation: classify frozen patch features with a linear head, or by a vote of the nearest "
        "training patches",
        has_masks=True,
        modality="image",
        has_baselines=True,
        uses=Uses(("encode", "segment", "knn")),
        example="segment.head=knn",
    ),
    "robustness": Task(
        "accuracy of a classifier on adversarial images",
        trains=False,
        classifies=True,
        uses=Uses(("robustness", "encode.batch")),
        example="robustness.samples=1000",
    ),
    "ood": Task(
        "detect out-of-distribution samples with a frozen encoder or with a classifier",
        may_classify=True,
        uses=Uses(("encode", "knn")),
        libraries=("sklearn",),
    ),
    "compare": Task(
        "compare models and baselines with several probes, and test which of them differ significantly",
        modality="image",
        compares=True,
        uses=Uses(("encode", "knn", "attentive")),
    ),
}


@dataclass(frozen=True)
class Options:
    """Options of a task apart from its settings; see `task_runner.evaluate`. Raises UserError if a value is invalid, or
    if the task does not use an option."""

    task: str
    models: Sequence[str]  # one model; for `compare`, one or more
    val: Sequence[str]
    train: Sequence[str] = ()
    labels: str = "cls"
    modality: Modality | None = None
    resume: str = "no"
    layers: str | None = None  # "all", or numbers separated by commas
    pools: Sequence[Pool] = ()  # empty: the pooling in encode.pool
    shots: Sequence[int] = ()
    probes: Sequence[str] = PROBE_NAMES
    seeds: int = 3
    baselines: bool = True
    ood: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise UserError(f"{self.task}: no such task; choose from {', '.join(TASKS)}")
        task = TASKS[self.task]
        used = {
            "train": task.trains,
            "labels": task.has_labels,
            "modality": not task.classifies,
            "resume": task.resumes,
            "layers": task.has_probe_grid,
            "pools": task.has_probe_grid,
            "shots": task.has_probe_grid,
            "probes": task.compares,
            "seeds": task.compares,
            "baselines": task.has_baselines,
            "ood": self.task == "ood",
        }
        for name, is_used in used.items():
            if not is_used and getattr(self, name) != _default(name):
                raise UserError(f"{name}: {self.task} does not use it; leave it out")
        for name, is_needed in (("val", True), ("train", task.trains), ("ood", used["ood"])):
            if is_needed and not getattr(self, name):
                raise UserError(f"{name}: {self.task} needs shards")
        if not self.models or (len(self.models) > 1 and not task.compares):
            raise UserError(f"{self.task} evaluates one model, not {len(self.models)}; to compare several, use compare")
        allowed = (task.modality,) if task.modality else MODALITIES
        if self.modality not in (None, *allowed):
            raise UserError(f"modality {self.modality}: must be {' or '.join(allowed)} for {self.task}")
        if unknown := [probe for probe in self.probes if probe not in PROBE_NAMES]:
            raise UserError(f"probes {unknown[0]}: no such probe; choose from {', '.join(PROBE_NAMES)}")
        if unknown := [pool for pool in self.pools if pool not in POOLS]:
            raise UserError(f"pools {unknown[0]}: no such pooling; choose from {', '.join(POOLS)}")
        if not self.probes or self.seeds not in range(1, MOST_SEEDS + 1):
            raise UserError(f"compare needs at least one probe and from 1 to {MOST_SEEDS} seeds")
        if taken := [name for name in self.ood if name in ("train", "val")]:
            raise UserError(f"ood {taken[0]}: the result already uses this name for {taken[0]}; choose another name")
        if any(not isinstance(shots, int) or shots < 1 for shots in self.shots):
            raise UserError("shots: must be integers of at least 1")

    @property
    def model(self) -> str:
        """Return the model, or the first of several models."""
        return self.models[0]

    @property
    def shards(self) -> list[str]:
        """Return all shards in the options."""
        return [*self.train, *self.val, *(each for named in self.ood.values() for each in named)]

    @property
    def is_image_features(self) -> bool:
        """Return whether the model is one of IMAGE_FEATURES, and not a network."""
        return not TASKS[self.task].compares and self.model in IMAGE_FEATURES

    def evaluates_baselines(self, modality: Modality) -> bool:
        """Return whether the task also evaluates baselines. `modality`: the input of the encoder."""
        is_baseline = self.model.startswith(RANDOM) or self.is_image_features
        return self.baselines and TASKS[self.task].has_baselines and modality == "image" and not is_baseline

    @property
    def module(self) -> str:
        """Return the name of the module that runs the task."""
        uses_grid = self.task == "attentive" or bool(self.layers or self.pools or self.shots)
        return "probe_grid" if uses_grid else self.task


def _default(name: str) -> Any:
    return {} if name == "ood" else Options.__dataclass_fields__[name].default


def require_for(task: str, shards: Iterable[str], shots: Sequence[int] = ()) -> None:
    """Raise UserError if a library that a task or its shards require is not installed."""
    needs = dict.fromkeys(("tensorboard", *TASKS[task].libraries), task)
    require_libraries(needs | ({"scipy": "shots"} if shots else {}))
    object_store.require(*shards)


def named_sets(given: Sequence[Sequence[str]]) -> dict[str, list[str]]:
    """Return the shards by the name of their set, given the arguments of each --ood; the name of a single set may be
    "". Raises UserError if one of several sets has no name, or if two have the same name."""
    sets: dict[str, list[str]] = {}
    for first, *rest in given:
        match = _NAMED.fullmatch(first)
        name, shards = match.groups() if match else ("", first)
        if name in sets or (not name and len(given) > 1):
            raise UserError(f"--ood {first}: give each set a different name, such as --ood other={shards}")
        sets[name] = [shards, *rest]
    return sets
