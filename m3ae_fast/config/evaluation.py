"""Settings of `m3ae-fast evaluate`: one section per task, in addition to the sections shared with training."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

from m3ae_fast.base.errors import UserError
from m3ae_fast.config.knn import KnnConfig
from m3ae_fast.config.load import apply_override, parse
from m3ae_fast.config.messages import section_of, settings_called
from m3ae_fast.config.poolings import FOR_TEXTS, POOLINGS, Pool, described
from m3ae_fast.config.section import Batch, Count, Rate, Section, Size
from m3ae_fast.config.settings import DataConfig, DeepSpeedConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from m3ae_fast.config.value_range import Range, check_range

_COMMON = ("run", "data", "model")  # sections of which every task reads at least some settings
_ALWAYS = (  # the settings of these sections that every task reads
    *("run", "model", "data.train", "data.val", "data.tokenizer", "data.workers", "data.cache_dir", "data.cache_gb"),
    "data.max_bad_fraction",
)
# the settings used only by tasks that train on random crops
CROPS = ("data.crop_scale", "data.flip", "data.repeats", "data.shuffle_shards", "data.lanes")
SHOWN = "data.show_channels"  # the setting used only by tasks whose figures contain images


class ImageConfig(Section):
    """Settings of the model's images that an evaluation may change. null: as in training; see
    [model](config.md#model)."""

    value_range: Range | None = None
    """Pixel values that map to black and white in images with more than 8 bits per channel."""
    resize: Literal["square", "native"] | None = None
    """Resizing of the images."""
    max_patches: Size | None = None
    """With `resize: native`: maximum number of patches per image."""
    min_patches: Size | None = None
    """With `resize: native`: minimum number of patches per image."""

    @model_validator(mode="after")
    def _possible(self) -> ImageConfig:
        check_range("value_range", self.value_range)
        return self


class EncodeConfig(Section):
    """Features that the frozen encoder computes from unmasked input."""

    pool: Pool | None = Field(
        None,
        description=f"Pooling of the output tokens, after the final LayerNorm: {described('`')}. null: of the poolings "
        "with at most 4,096 features, the tasks `knn`, `logistic` and `compare` use the one with which logistic "
        "regression is most accurate on held-out training samples; with `--layers` or `--shots`, and in all other "
        "tasks, the pooling is the model's own, `model.pool`.",
    )
    batch: Batch = 64
    """Number of samples per forward pass."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Dtype of the encoder's computations; see `train.precision`."""

    @property
    def fixed_pool(self) -> Pool:
        """Return `pool`, or "mean" if it is null."""
        return self.pool or "mean"

    def of_model(self, model: ModelConfig, *, texts: bool) -> EncodeConfig:
        """Return the same settings, with the pooling of a model if `pool` is null. `texts`: whether texts are encoded,
        alone or with images."""
        return self.model_copy(update={"pool": self.pool or model.default_pool(texts=texts)})


class AttentiveProbeConfig(Section):
    """Attentive probe: one learnable query attends to the frozen patch tokens, and a linear classifier follows. Both
    parts are trained with AdamW. At initialisation, the attention is equivalent to mean pooling."""

    heads: Count | None = None
    """Number of attention heads; null: the number of heads of the encoder."""
    batch: Batch | None = None
    """Number of samples per optimiser step; null: derived from the number of training samples, as for the linear
    probe."""
    steps: Count | None = None
    """Length of the run, in optimiser steps; null: derived from the number of training samples, as for the linear
    probe."""
    peak_lr: float | None = Field(None, gt=0)
    """Learning rate after the warm-up; null: the best of five candidates on a held-out tenth of the training
    samples."""
    weight_decay: float = Field(0.0, ge=0)
    """Weight decay of all weights."""
    online: bool | None = None
    """true: in each step, newly sampled crops are encoded, and their patch tokens are discarded after the step. false:
    the patch tokens of all images are computed once and stored. null: the tokens are stored if they fit into memory.
    With `--shots`, they are always stored."""


class FineTuneConfig(Section):
    """Fine-tuning of the encoder with a classification head. The defaults are those of the official recipe for
    ImageNet."""

    pool: Literal["mean", "cls"] = "cls"
    """Input of the head: `cls`, the cls token; `mean`, the mean of all other tokens."""
    drop_path: Rate = 0.1
    """Stochastic depth: probability that a sample skips a residual branch of a block. The probability is the same in
    all blocks."""
    label_smoothing: Rate = 0.1
    """Label smoothing: fraction of a label that is spread evenly over all classes."""
    mixup: float = Field(0.8, ge=0, le=100)
    """Alpha of mixup between consecutive samples of a lane of the training stream; 0: no mixup. Images are mixed only
    if the input of the encoder contains no text."""
    cutmix: float = Field(1.0, ge=0, le=100)
    """Alpha of CutMix; 0: no CutMix."""
    switch_prob: float = Field(0.5, ge=0, le=1)
    """Probability that CutMix is used instead of mixup, if both are enabled."""
    rand_augment: str | None = "rand-m9-mstd0.5-inc1"
    """RandAugment of the training images, as a string in timm's format; null: no RandAugment."""


class RobustnessConfig(Section):
    """Accuracy on adversarial examples (PGD)."""

    epsilons: list[Annotated[float, Field(gt=0, le=255)]] = [0.5, 1, 2, 4]
    """L-infinity bounds of the perturbations of PGD, in units of 1/255."""
    steps: Count = 10
    """Number of PGD steps."""
    step_size: float = Field(0.25, gt=0)
    """Step size of PGD, as a fraction of epsilon."""
    samples: Count | None = None
    """Number of held-out samples to use, spread evenly over the dataset; null: all samples."""

    @model_validator(mode="after")
    def _possible(self) -> RobustnessConfig:
        shown = [f"{each:g}" for each in self.epsilons]
        if twice := [each for each in shown if shown.count(each) > 1]:
            raise ValueError(f"epsilons contains {twice[0]} twice; remove one of the two")
        return self


class SegmentConfig(Section):
    """Semantic segmentation using frozen patch features."""

    head: Literal["linear", "knn"] = "linear"
    """Classifier of the patches: `linear`, a linear head, trained with AdamW; `knn`, a weighted vote of the nearest
    training patches, which needs no training (`knn.k`, `knn.temperature`)."""
    ignore_label: int | None = Field(255, ge=0, le=255)
    """Class id of the mask pixels that are excluded from training and from the metrics; null: no pixels are
    excluded."""
    steps: Count = 1000
    """Number of optimiser steps for training the linear head."""
    batch: Batch = 32
    """Number of images per optimiser step."""
    peak_lr: float = Field(1e-3, gt=0)
    """Learning rate after the warm-up. It then decays to 0 with a cosine schedule."""
    weight_decay: float = Field(1e-4, ge=0)
    """Weight decay of the linear head."""
    bank_patches: Count = 50_000
    """With `head: knn`: maximum number of training patches that are searched for neighbours; the patches are sampled
    evenly over the images."""


class EvaluationConfig(Section):
    """Settings of a task of `m3ae-fast evaluate`, or of `m3ae-fast embed`. The sections `run`, `data`, `optim`, `train`
    and `deepspeed` are those of pre-training."""

    run: RunConfig = RunConfig()
    data: DataConfig
    model: ImageConfig = ImageConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    deepspeed: DeepSpeedConfig | None = None
    encode: EncodeConfig = EncodeConfig()
    knn: KnnConfig = KnnConfig()
    attentive: AttentiveProbeConfig = AttentiveProbeConfig()
    finetune: FineTuneConfig = FineTuneConfig()
    segment: SegmentConfig = SegmentConfig()
    robustness: RobustnessConfig = RobustnessConfig()

    @model_validator(mode="after")
    def _possible(self) -> EvaluationConfig:
        pool = self.encode.pool
        if pool and POOLINGS[pool].needs_images and any(each.modality == "text" for each in self.data.train):
            raise ValueError(f"encode.pool: {pool} needs images, but captions are encoded; use {FOR_TEXTS}")
        return self


@dataclass(frozen=True)
class Uses:
    """The settings that a task or program uses, in addition to the settings that every task uses."""

    names: tuple[str, ...] = ("encode",)  # sections, and single settings of other sections, such as "train.epochs"
    # defaults by setting, which replace those of pre-training
    defaults: Mapping[str, Any] = field(default_factory=dict)
    # notes by setting, for the documentation: how the default is derived, or how the meaning differs from pre-training
    notes: Mapping[str, str] = field(default_factory=dict)

    @property
    def sections(self) -> list[str]:
        """Return the names of all sections with a used setting, except the sections that every task uses."""
        found = dict.fromkeys(name.partition(".")[0] for name in self.names)
        return [name for name in found if name not in _COMMON]

    def __contains__(self, name: object) -> bool:
        """Return whether a section or a setting, such as "train.epochs", is used."""
        return any(name == each or str(name).startswith(f"{each}.") for each in (*self.names, *_ALWAYS))

    def keys(self, section: str) -> list[str]:
        """Return the keys of the used settings of a section."""
        return [key for key in section_class(section).model_fields if f"{section}.{key}" in self]

    def default(self, name: str) -> str:
        """Return the default of a setting and the note on it, as Markdown; "" if the setting is as in pre-training."""
        value = [f"`{json.dumps(self.defaults[name])}`"] if name in self.defaults else []
        return ", ".join([*value, *([self.notes[name]] if name in self.notes else [])])

    def values(self, config: EvaluationConfig) -> dict[str, Any]:
        """Return the settings of `config` that are used, as plain JSON data by section."""
        used = {name: keys for name in EvaluationConfig.model_fields if (keys := self.keys(name))}
        data = config.model_dump(mode="json")
        return {name: data[name] and {key: data[name][key] for key in keys} for name, keys in used.items()}


def section_class(name: str) -> type[BaseModel]:
    """Return the class of a section."""
    kind = section_of(EvaluationConfig.model_fields[name].annotation)
    assert kind is not None
    return kind


_SCHEDULE = ("optim.peak_lr", "optim.end_lr", "optim.warmup_epochs", "optim.weight_decay")
_LOOP = (
    *("train.global_batch", "train.micro_batch", "train.epochs", "train.steps"),
    *("train.log_every", "train.eval_every", "train.save_every", "train.keep"),
)
_DERIVED = "derived from the number of training samples"  # by heads/training_defaults.py

LINEAR = Uses(
    ("encode", *_SCHEDULE, *_LOOP, *CROPS),
    {"optim.weight_decay": 0.0, "train.micro_batch": 64},
    {
        "optim.peak_lr": _DERIVED,
        "optim.warmup_epochs": "a ninth of the run",
        "optim.weight_decay": "for all parameters of the linear layer",
        "train.global_batch": _DERIVED,
        "train.epochs": _DERIVED,
        "train.eval_every": "one evaluation per epoch, but at most about 100 per run",
    },
)
FINETUNE = Uses(
    (
        *("finetune", *_SCHEDULE, "optim.betas", "optim.clip_grad", "optim.layer_decay"),
        *(*_LOOP, "train.precision", "train.ema", "train.activation_checkpointing", "train.compile", "deepspeed"),
        *CROPS,
    ),
    {"optim.peak_lr": 1e-3, "optim.weight_decay": 0.05, "optim.betas": [0.9, 0.999], "optim.layer_decay": 0.6},
    {
        "optim.peak_lr": "not multiplied by the batch size",
        "optim.warmup_epochs": "a twentieth of the run",
        "optim.weight_decay": "for weight matrices only",
        "optim.layer_decay": "as in the official code: the lowest layer consists of the cls token and the final "
        "LayerNorm, and the embeddings have the full learning rate",
        "train.global_batch": _DERIVED,
        "train.epochs": _DERIVED,
        "train.eval_every": "at most about ten evaluations per run and one per epoch, or fewer if they would take more "
        "than a twentieth of the run",
        "deepspeed": "`null`, which is plain torch",
    },
)


def evaluation_config(given: dict[str, Any], overrides: Iterable[str], reader: str, uses: Uses) -> EvaluationConfig:
    """Return the config of an evaluation.

    Args:
        given: sections as plain JSON data, which are modified.
        overrides: settings to change, in the form `section.key=value`.
        reader: name of the program or task that uses the config.
        uses: the settings that the program or task uses.

    Raises:
        UserError: a setting is invalid, or is not used.
    """
    for override in overrides:
        apply_override(given, override)
    for section, values in given.items():
        for key in values if isinstance(values, dict) else ():
            _require_used(section, key, reader, uses)
    for name, value in uses.defaults.items():
        section, _, key = name.partition(".")
        if isinstance(values := given.setdefault(section, {}), dict):
            values.setdefault(key, value)
    return parse(EvaluationConfig, given, "overrides")


def _require_used(section: str, key: str, reader: str, uses: Uses) -> None:
    """Raise UserError if the reader does not use a setting. If the section is unknown, or if the reader uses the
    section but the key is unknown, no error is raised, because `parse` will report the unknown name. An exception is a
    key that the reader uses in another section: an error is raised, which suggests that section."""
    used = uses.keys(section) if section in EvaluationConfig.model_fields else []
    meant = [name for name in settings_called(EvaluationConfig, key) if name in uses]
    if key in used or not (meant or section in EvaluationConfig.model_fields):
        return
    if not meant and used and (section in uses or key not in section_class(section).model_fields):
        return
    if meant:
        hint = f"did you mean {' or '.join(meant)}?"
    elif used:
        hint = f"of {section}, it uses only {', '.join(used)}"
    else:
        hint = f"it uses only the sections {', '.join((*uses.sections, *_COMMON))}"
    raise UserError(f"override {section}.{key}: {reader} does not use this setting; {hint}")
