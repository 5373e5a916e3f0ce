"""Settings of `m3ae-fast evaluate`: one section per task, in addition to the sections shared with training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from m3ae_fast.base.errors import UserError
from m3ae_fast.config.load import apply_override, parse
from m3ae_fast.config.messages import settings_called
from m3ae_fast.config.schema import (
    GRIDS,
    Batch,
    Beta,
    Count,
    DataConfig,
    DeepSpeedConfig,
    KnnConfig,
    LoopConfig,
    OptimConfig,
    Pool,
    Rate,
    RunConfig,
    ScheduleConfig,
    Section,
    TransformerLoopConfig,
)

_COMMON = ("run", "data")  # sections that every task reads


class EncodeConfig(Section):
    """Features that the frozen encoder computes from unmasked input."""

    pool: Pool | None = None
    """Pooling of the features after the final LayerNorm: `mean`, the mean over all tokens except cls; `cls`, the cls
    token; `grid2` and `grid4`, the means over the patches of each cell of a grid of 2 x 2 or 4 x 4 cells, one after
    another, so that the features show where something is. Grids have 4 and 16 times as many features, and need
    images. null: for `knn` and `logistic`, the pooling with which logistic regression is most accurate on held-out
    training samples, among those with at most 4,096 features; for other tasks, `mean`."""
    batch: Batch = 64
    """Number of samples per forward pass."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Dtype of the computations: `bf16`, `fp32`, or `auto` (bf16 if it is faster than fp32 on this hardware)."""

    @property
    def fixed_pool(self) -> Pool:
        """Return `pool`, or "mean" if it is null."""
        return self.pool or "mean"


class LinearProbeConfig(LoopConfig, ScheduleConfig):
    """A linear classifier on frozen features, trained with LARS.

    Settings that are null are derived from the number of training samples by this
    [rule](guide/evaluating.md#default-hyper-parameters-by-dataset-size). For ImageNet, the rule gives the official
    hyper-parameters, except for `encode.pool`, which is `cls` in the official code. A resumed run keeps the values that
    were derived at its start.
    """

    SECTION: ClassVar[str] = "linear"
    LENGTH_FOLLOWS: ClassVar[bool] = True

    weight_decay: float = Field(0.0, ge=0)
    """Weight decay of the linear layer, including its bias."""
    momentum: Beta = 0.9
    """Momentum of LARS."""
    global_batch: Batch | None = None  # type: ignore[assignment]
    """Number of samples per optimiser step, over all ranks; null: a value from 256 to 2,048, derived from the number of
    training samples."""
    micro_batch: Batch | None = 64
    """Maximum number of samples per rank in each forward pass. Larger per-rank batches are split evenly into
    micro-batches with gradient accumulation; null: no gradient accumulation."""
    peak_lr: float | None = Field(None, gt=0)  # type: ignore[assignment]
    """Learning rate after the warm-up, for a batch of 256. It is multiplied by `global_batch` / 256. null: derived from
    the number of training samples."""
    warmup_epochs: float | None = Field(None, ge=0, le=1e6)  # type: ignore[assignment]
    """Length of the warm-up, in epochs; at most the whole run. null: a ninth of the run."""
    epochs: float | None = Field(None, gt=0, le=1e6)
    """Length of the run, in epochs; alternative to `steps`. null: 90 or more, derived from the number of training
    samples."""
    eval_every: Count | None = None
    """Number of optimiser steps between evaluations; null: one evaluation per epoch, but at most about
    100 per run."""


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


class FineTuneConfig(TransformerLoopConfig, OptimConfig):
    """Fine-tuning of the encoder with a classification head.

    The defaults are those of the official recipe for ImageNet. As in that recipe, `peak_lr` is not multiplied by the
    batch size. Settings that are null are derived from the number of training samples, as for the linear probe.
    """

    SECTION: ClassVar[str] = "finetune"
    LENGTH_FOLLOWS: ClassVar[bool] = True

    pool: Literal["mean", "cls"] = "cls"
    """Input of the head: `cls`, the cls token; `mean`, the mean of all other tokens."""
    layer_decay: float = Field(0.6, gt=0, le=1)
    """Learning rate of a layer, as a fraction of the learning rate of the next layer."""
    drop_path: Rate = 0.1
    """Stochastic depth: probability that a sample skips a residual branch of a block. The probability is the same in
    all blocks."""
    label_smoothing: Rate = 0.1
    """Label smoothing: fraction of a label that is spread evenly over all classes."""
    mixup: float = Field(0.8, ge=0, le=100)
    """Alpha of mixup between consecutive samples of the training stream; 0: no mixup. Images are mixed only if the
    input of the encoder contains no text."""
    cutmix: float = Field(1.0, ge=0, le=100)
    """Alpha of CutMix; 0: no CutMix."""
    switch_prob: float = Field(0.5, ge=0, le=1)
    """Probability that CutMix is used instead of mixup, if both are enabled."""
    rand_augment: str | None = "rand-m9-mstd0.5-inc1"
    """RandAugment of the training images, as a string in timm's format; null: no RandAugment."""
    ema: float | None = Field(None, gt=0, lt=1)
    """Decay per step of an exponential moving average of the weights. The average is evaluated and saved. null: no
    average."""
    deepspeed: DeepSpeedConfig | None = None
    """Settings of DeepSpeed, as in training; null: plain torch with data parallelism (DDP)."""

    global_batch: Batch | None = None  # type: ignore[assignment]
    """Number of samples per optimiser step, over all ranks; null: a value from 64 to 1,024, derived from the number of
    training samples."""
    eval_every: Count | None = None
    """Number of optimiser steps between evaluations; null: about ten evaluations per run, or fewer if ten would take
    more than a twentieth of the run."""
    epochs: float | None = Field(None, gt=0, le=1e6)
    """Length of the run, in epochs; alternative to `steps`. null: 100 or more, derived from the number of training
    samples."""
    warmup_epochs: float | None = Field(None, ge=0, le=1e6)  # type: ignore[assignment]
    """Length of the warm-up, in epochs; at most the whole run. null: a twentieth of the run."""
    peak_lr: float = Field(1e-3, gt=0)
    """Learning rate after the warm-up."""
    end_lr: float = Field(0.0, ge=0)
    """Learning rate after the last step."""
    weight_decay: float = Field(0.05, ge=0)
    """Weight decay of weight matrices."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Adam's decay rates of the first and the second moment, per step."""

    def lr_factor(self, global_batch: int) -> float:
        return 1.0


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
    batch: Batch = 64
    """Number of samples per forward pass."""

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
    """Settings of a task of `m3ae-fast evaluate`, or of `m3ae-fast embed`."""

    run: RunConfig = RunConfig()
    data: DataConfig
    encode: EncodeConfig = EncodeConfig()
    knn: KnnConfig = KnnConfig()
    linear: LinearProbeConfig = LinearProbeConfig()
    attentive: AttentiveProbeConfig = AttentiveProbeConfig()
    finetune: FineTuneConfig = FineTuneConfig()
    segment: SegmentConfig = SegmentConfig()
    robustness: RobustnessConfig = RobustnessConfig()

    @model_validator(mode="after")
    def _possible(self) -> EvaluationConfig:
        if self.encode.pool in GRIDS and any(source.modality == "text" for source in self.data.train):
            raise ValueError(f"encode.pool: {self.encode.pool} needs images, but captions are encoded; use mean or cls")
        return self


def evaluation_config(
    given: dict, overrides: list[str], reader: tuple[str, Sequence[str]] | None = None
) -> EvaluationConfig:
    """Return the config of an evaluation.

    Args:
        given: sections as plain JSON data, which are modified.
        overrides: settings to change, in the form `section.key=value`.
        reader: name of a program or task, and the sections that it reads in addition to `_COMMON`; None: all sections
            are read.

    Raises:
        UserError: a setting is invalid, or would be ignored by the reader.
    """
    for override in overrides:
        if reader:
            _require_read(override, *reader)
        apply_override(given, override)
    return parse(EvaluationConfig, given, "overrides")


def _require_read(override: str, reader: str, sections: Sequence[str]) -> None:
    name = override.partition("=")[0]
    if name.startswith((*sections, *_COMMON)):
        return
    meant = [
        each for each in settings_called(EvaluationConfig, name.rpartition(".")[2]) if each.startswith((*sections,))
    ]
    if meant or name.partition(".")[0] in EvaluationConfig.model_fields:
        other = (
            f"did you mean {' or '.join(meant)}?"
            if meant
            else f"it uses only the sections {', '.join((*sections, *_COMMON))}"
        )
        raise UserError(f"override {name}: {reader} does not use this setting; {other}")
