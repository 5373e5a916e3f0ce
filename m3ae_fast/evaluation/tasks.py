"""The evaluation tasks and their options. This module does not import torch, so that `--help` is fast.

The fields of a task's class are its options on the command line and its arguments in Python, with the string below a
field as the help. A new option is a field, which the task reads from `job.options`. An option that changes the samples
is read in `Job.open_labelled`, because a grid (`--layers`, `--pools`, `--shots`) runs `probe_grid.py` in place of the
task's module. A new task needs a class, its entry in `TASKS`, a module in this package with a function `run(job)`, and
a section of EvaluationConfig if it has settings. A new frozen probe also needs an entry in `PROBES` of
`heads/probes.py`, and its name in `Probe` if `compare` is to offer it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from m3ae_fast.base import object_store
from m3ae_fast.base.errors import UserError
from m3ae_fast.base.libraries import require_libraries
from m3ae_fast.config.arguments import (
    SHARDS,
    CommaList,
    Labels,
    Option,
    Resume,
    Shards,
    WithSettings,
    names,
    output,
)
from m3ae_fast.config.evaluation import FINETUNE, LINEAR, Uses
from m3ae_fast.config.poolings import POOLS, Pool
from m3ae_fast.weights.model_name import CLASSIFIER_HELP, FEATURES_HELP, IMAGE_FEATURES, MODEL_HELP, RANDOM

DRAWS = 5  # number of draws for each number of shots

Probe = Literal["knn", "logistic", "attentive"]  # probes that `compare` can use
PROBE_NAMES: tuple[Probe, ...] = get_args(Probe)
Modality = Literal["image", "text", "paired"]
_NAMED = re.compile(r"([A-Za-z0-9_-]+)=(.+)", re.DOTALL)  # NAME=SHARDS, the first value of an option --ood


def _model_names(value: Any) -> list[str]:
    try:
        return names(value)
    except ValueError as error:
        how = "write the model with its method save_pretrained(FOLDER), and pass FOLDER"
        raise UserError(f"model: {error}; {how}") from None


def _layers(value: Any) -> Any:
    if value is None or value == "all":
        return value
    items = value.split(",") if isinstance(value, str) else value if isinstance(value, Sequence) else [value]
    if not items or not all(str(item).isdecimal() and int(item) for item in items):
        raise ValueError("must be all, or numbers of blocks from 1, such as 1,2")
    return sorted({int(item) for item in items})


def _pools(value: Any) -> Any:
    return POOLS if value == "all" else value


def named_sets(given: Any) -> Any:
    """Return the shards by the name of their set: of a mapping, or of the arguments of each --ood. The name of a single
    set may be "". Raises UserError if one of several sets has no name, or if two have the same name."""
    if isinstance(given, Mapping):
        return {name: names(shards) for name, shards in given.items()}
    if not isinstance(given, Sequence) or any(isinstance(each, str) for each in given):
        raise ValueError('must be a dict of shards by the name of their set, such as {"other": "other-*.tar"}')
    sets: dict[str, list[str]] = {}
    for first, *rest in given:
        match = _NAMED.fullmatch(first)
        name, shards = match.groups() if match else ("", first)
        if name in sets or (not name and len(given) > 1):
            raise UserError(f"ood {first}: give each set a different name, such as --ood other={shards}")
        sets[name] = [shards, *rest]
    return sets


Model = Annotated[str, Option("model", metavar="MODEL")]
Models = Annotated[
    Sequence[str], BeforeValidator(_model_names), Field(min_length=1), Option("model", metavar="MODEL", nargs="+")
]
_GRID = "layers, poolings and few samples"
Layers = Annotated[
    Literal["all"] | Sequence[int] | None, BeforeValidator(_layers), Option(metavar="all|N,N", group=_GRID)
]
Pools = Annotated[Sequence[Pool], CommaList, BeforeValidator(_pools), Option(metavar="all|NAME,NAME", group=_GRID)]
Shots = Annotated[
    Sequence[Annotated[int, Field(gt=0)]], CommaList, AfterValidator(sorted), Option(metavar="N,N", group=_GRID)
]
OutsideSets = Annotated[
    Mapping[str, Shards],
    BeforeValidator(named_sets),
    Field(min_length=1),
    Option(nargs="+", action="append", metavar="[NAME=]SHARDS"),
]


class Task(WithSettings):
    """A task and its options. The module of its name has a function `run(job)`, which returns the result, or None if
    the task was stopped before its end."""

    uses: ClassVar[Uses] = Uses(("encode",))  # the settings that it uses
    LIBRARIES: ClassVar[tuple[str, ...]] = ()  # optional libraries that it requires

    val: Shards = Field(description=f"held-out samples in {SHARDS}")
    out: Annotated[Path, BeforeValidator(output()), Option(metavar="OUT")]
    """output folder, which must not contain a result"""

    @classmethod
    def name(cls) -> str:
        """Return the name of the task."""
        return cls.__name__.lower()

    @classmethod
    def about(cls) -> str:
        """Return the description of the task."""
        text = " ".join((cls.__doc__ or "").split()).removesuffix(".")
        return text[:1].lower() + text[1:]

    @classmethod
    def unknown(cls, name: str) -> str:
        if any(name in other.model_fields for other in TASKS.values()):
            return f"{name}: {cls.name()} does not use it; leave it out"
        return super().unknown(name)

    @property
    def uses_now(self) -> Uses:
        """Return the settings that the task uses with these options."""
        return self.uses

    @property
    def module(self) -> str:
        """Return the name of the module that runs the task."""
        return self.name()

    @property
    def shards(self) -> list[str]:
        """Return all shards in the options."""
        return [*self.val]

    def require(self) -> None:
        """Raise UserError if a library that the task or its shards require is not installed."""
        require_libraries(dict.fromkeys(("tensorboard", *self.LIBRARIES), self.name()))
        object_store.require(*self.shards)


class OneModel(Task):
    """A task that evaluates one model."""

    TAKES_IMAGE_FEATURES: ClassVar[bool] = False  # whether the model may be one of IMAGE_FEATURES

    model: Model = Field(description=MODEL_HELP)

    @field_validator("model", mode="before")
    @classmethod
    def _is_one_model(cls, value: Any) -> str:
        models = _model_names(value)
        if len(models) != 1:
            raise UserError(f"{cls.name()} evaluates one model, not {len(models)}; to compare several, use compare")
        if models[0] in IMAGE_FEATURES and not cls.TAKES_IMAGE_FEATURES:
            *others, last = (name for name, task in TASKS.items() if getattr(task, "TAKES_IMAGE_FEATURES", False))
            raise UserError(
                f"{models[0]}: {cls.name()} needs a network; {', '.join(others)} and {last} accept {models[0]} "
                f"(a folder of this name is ./{models[0]})"
            )
        return models[0]

    @property
    def is_image_features(self) -> bool:
        """Return whether the model is one of IMAGE_FEATURES, and not a network."""
        return self.model in IMAGE_FEATURES


class WithTraining(Task):
    """A task with training samples."""

    train: Shards = Field(description=f"training samples in {SHARDS}")

    @property
    def shards(self) -> list[str]:
        return [*self.train, *super().shards]


class WithLabels(Task):
    """A task whose samples have labels, and not masks."""

    labels: Labels = "cls"
    """source of the labels: cls (integers in KEY.cls; default) or json.FIELD (a field of KEY.json)"""


class WithModality(Task):
    """A task whose encoder may see captions."""

    modality: Modality | None = None
    """input of the encoder (default: image)"""


class WithResume(WithLabels):
    """A task that can be resumed from a checkpoint."""

    resume: Resume = "no"
    """auto: continue from the last checkpoint in OUT, if any; no (default): start a new run; PATH: continue from that
    checkpoint or run folder"""


class WithBaselines(OneModel):
    """A task that evaluates baselines too."""

    baselines: bool = True
    """evaluate the baselines, which are random weights and features that are computed without a network
    (default: they are evaluated, unless MODEL is a baseline or the encoder sees captions)"""

    def evaluates_baselines(self, modality: Modality) -> bool:
        """Return whether baselines are evaluated. `modality`: the input of the encoder."""
        is_baseline = self.model.startswith(RANDOM) or self.is_image_features
        return self.baselines and modality == "image" and not is_baseline


class WithGrid(OneModel, WithLabels):
    """A task that can train probes on the features of several layers and poolings, and on few samples."""

    layers: Layers = None
    """evaluate the features after each of these blocks, numbered from 1, in one pass over the images; OUT contains
    accuracies by depth, but no classifier (default: the last block)"""
    pools: Pools = ()
    """evaluate the features of each of these poolings in one pass over the images; OUT contains no classifier
    (default: only the pooling of encode.pool)"""
    shots: Shots = ()
    """few-shot evaluation: numbers of training samples per class, such as 1,5,10; for each number, samples are drawn
    several times (default: use all samples)"""

    @model_validator(mode="after")
    def _has_layers_and_poolings(self) -> WithGrid:
        if self.is_image_features and (self.layers is not None or self.pools):
            raise UserError(f"{self.model}: has no layers and no poolings; leave out layers and pools")
        return self

    @property
    def module(self) -> str:
        return "probe_grid" if self.layers or self.pools or self.shots else super().module

    def require(self) -> None:
        super().require()
        if self.shots:
            require_libraries({"scipy": "shots"})


class PooledProbe(WithGrid, WithBaselines, WithModality, WithTraining):
    """A probe of pooled features."""

    TAKES_IMAGE_FEATURES = True

    model: Model = Field(
        description=f"{MODEL_HELP}; or {', '.join(IMAGE_FEATURES)} for features that are computed from the images "
        "without a network"
    )

    @model_validator(mode="after")
    def _has_images(self) -> PooledProbe:
        if self.is_image_features and self.modality not in (None, "image"):
            raise UserError(f"{self.model}: is computed from images, not from captions; leave out modality")
        return self


class Knn(PooledProbe):
    """Measure the k-nearest-neighbour accuracy of frozen features."""

    uses = Uses(("encode", "knn"))


class Logistic(PooledProbe):
    """Fit logistic regression to frozen features, with one of five L2 penalties; the classifier is saved in OUT."""


class Linear(WithResume, WithBaselines, WithModality, WithTraining):
    """Train a linear classifier on the frozen features of random crops, as in the official code; the classifier is
    saved in OUT."""

    uses = LINEAR


class Attentive(WithGrid, WithBaselines, WithTraining):
    """Train a linear classifier and a query that pools the frozen patch tokens."""

    uses = Uses(("encode", "attentive"))

    pools: Pools = ()
    """also train linear classifiers on the features of each of these poolings, in the same training steps as the
    attentive probes and with the same hyper-parameters; OUT contains no classifier (default: only attentive probes)"""

    @property
    def module(self) -> str:
        return "probe_grid"


class Finetune(WithResume, WithBaselines, WithModality, WithTraining):
    """Train the encoder with a classification head; the classifier is saved in OUT."""

    uses = FINETUNE
    LIBRARIES = ("timm",)


class Segment(WithBaselines, WithTraining):
    """Segment images: classify frozen patch features with a linear head, or by a vote of the nearest training
    patches."""

    uses = Uses(("encode", "segment", "knn"))


class Robustness(OneModel, WithLabels):
    """Measure the accuracy of a classifier on adversarial images."""

    uses = Uses(("robustness", "encode.batch"))

    model: Model = Field(description=CLASSIFIER_HELP)


class Ood(OneModel, WithModality, WithLabels, WithTraining):
    """Detect out-of-distribution samples with a frozen encoder or with a classifier."""

    uses = Uses(("encode", "knn"))
    LIBRARIES = ("sklearn",)

    model: Model = Field(description=f"{MODEL_HELP}; or {CLASSIFIER_HELP}")
    modality: Modality | None = None
    """input of the encoder (default: image, or the input of the classifier)"""
    ood: OutsideSets
    """out-of-distribution samples; for several sets, repeat the option with a different NAME for each set; in Python: a
    dict of shards by NAME"""

    @field_validator("ood")
    @classmethod
    def _has_own_names(cls, given: Mapping[str, Sequence[str]]) -> Mapping[str, Sequence[str]]:
        if taken := [name for name in given if name in ("train", "val")]:
            raise UserError(f"ood {taken[0]}: the result already uses this name for {taken[0]}; choose another name")
        return given

    @property
    def shards(self) -> list[str]:
        return [*super().shards, *(each for shards in self.ood.values() for each in shards)]


class Compare(WithLabels, WithTraining):
    """Compare models and baselines with several probes, and test which of them differ significantly."""

    uses = Uses(("encode", "knn", "attentive"))

    model: Models = Field(
        description=f"{MODEL_HELP}; {FEATURES_HELP}. Without --train, --val and --out: the OUT folders of two or more "
        "tasks on the same samples"
    )
    probes: Annotated[Sequence[Probe], CommaList, Field(min_length=1), Option(metavar="NAME,NAME")] = PROBE_NAMES
    """probes to run (default: all)"""
    seeds: Annotated[int, Field(ge=1, le=100)] = 3
    """number of random seeds for the probes and for the randomly initialised model"""

    @property
    def uses_now(self) -> Uses:
        return Uses(("encode", *self.probes))


TASKS: dict[str, type[Task]] = {
    task.name(): task for task in (Knn, Logistic, Linear, Attentive, Finetune, Segment, Robustness, Ood, Compare)
}


def named_task(name: str, **options: Any) -> Task:
    """Return a task with its options. Raises UserError if there is no such task, or if an option is invalid."""
    if name not in TASKS:
        raise UserError(f"{name}: no such task; choose from {', '.join(TASKS)}")
    return TASKS[name](**options)
