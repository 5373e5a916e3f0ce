"""Settings of `python -m m3ae_fast.transfer`: a section per task, besides those shared with training."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field, model_validator

from m3ae_fast.config.load import apply_override, parse
from m3ae_fast.config.schema import (
    Batch,
    Beta,
    Count,
    DataConfig,
    DeepSpeedConfig,
    KnnConfig,
    LoopConfig,
    OptimConfig,
    Rate,
    RunConfig,
    ScheduleConfig,
    Section,
    TransformerLoopConfig,
)

CommonCorruption = Literal[
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic",
    "pixelate",
    "jpeg",
]
ExtraCorruption = Literal["speckle_noise", "gaussian_blur", "spatter", "saturate"]


class EncodeConfig(Section):
    """Features of the frozen encoder on unmasked input."""

    pool: Literal["mean", "cls"] = "mean"
    """`mean`: over all tokens but cls, after the final norm; `cls`: the cls token."""
    batch: Batch = 64
    """Samples per forward pass."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """`auto`: bf16 where the hardware multiplies it faster."""


class ProbeConfig(LoopConfig, ScheduleConfig):
    """A linear classifier on frozen features, trained by LARS.

    The defaults are the official recipe's for ImageNet, except for `encode.pool`, which is `cls` there. Small sets need
    a higher `peak_lr`: a step of LARS moves a weight by a fraction of its norm, so few steps move it little.
    """

    SECTION: ClassVar[str] = "probe"

    weight_decay: float = Field(0.0, ge=0)
    """Of the linear layer, its bias included."""
    momentum: Beta = 0.9
    """LARS's."""
    global_batch: Batch = 2048
    """Samples per optimiser step, over all ranks."""
    micro_batch: Batch | None = 64
    """Most samples per rank and forward pass; a rank's part of the batch is cut evenly."""
    peak_lr: float = Field(0.1, gt=0)
    """Learning rate after warm-up, for a batch of 256; multiplied by global_batch / 256."""
    warmup_epochs: float = Field(10, ge=0, le=1e6)
    """Length of the warm-up; at most the whole run."""

    @model_validator(mode="before")
    @classmethod
    def _default_length(cls, data: Any) -> Any:
        return {"epochs": 90} | data if isinstance(data, dict) and "steps" not in data else data


class FineTuneConfig(TransformerLoopConfig, OptimConfig):
    """Fine-tuning of the encoder with a classification head.

    The defaults are the official recipe's for ImageNet. As there, `peak_lr` is not multiplied by the batch.
    """

    SECTION: ClassVar[str] = "finetune"

    pool: Literal["mean", "cls"] = "cls"
    """What the head reads: `cls`, the cls token; `mean`, all other tokens."""
    layer_decay: float = Field(0.6, gt=0, le=1)
    """Learning rate of a layer as a fraction of the next layer's."""
    drop_path: Rate = 0.1
    """Stochastic depth of every block."""
    label_smoothing: Rate = 0.1
    """Label smoothing: the fraction of a label that is spread evenly over all classes."""
    mixup: float = Field(0.8, ge=0, le=100)
    """Alpha of mixup; 0: none. Images are mixed only where they are all that the encoder sees."""
    cutmix: float = Field(1.0, ge=0, le=100)
    """Alpha of cutmix; 0: none."""
    switch_prob: float = Field(0.5, ge=0, le=1)
    """Probability of cutmix where both are possible."""
    rand_augment: str | None = "rand-m9-mstd0.5-inc1"
    """timm's RandAugment of the training images; null: none."""
    ema: float | None = Field(None, gt=0, lt=1)
    """Decay of an average of the weights, which is then evaluated and saved; null: none."""
    deepspeed: DeepSpeedConfig | None = None
    """As in training; null: plain torch."""

    global_batch: Batch = 1024
    """Samples per optimiser step, over all ranks."""
    peak_lr: float = Field(1e-3, gt=0)
    """Learning rate after warm-up."""
    init_lr: float = Field(0.0, ge=0)
    """Learning rate of the first step."""
    end_lr: float = Field(0.0, ge=0)
    """Learning rate after the last step."""
    weight_decay: float = Field(0.05, ge=0)
    """Of matmul weights."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Adam's decay rates."""

    @model_validator(mode="before")
    @classmethod
    def _default_length(cls, data: Any) -> Any:
        return {"epochs": 100} | data if isinstance(data, dict) and "steps" not in data else data

    def lr_factor(self, global_batch: int) -> float:
        return 1.0


class RobustnessConfig(Section):
    """Accuracy on attacked and on corrupted images."""

    epsilons: list[Annotated[float, Field(gt=0, le=255)]] = [0.5, 1, 2, 4]
    """L-infinity bounds of PGD, in units of 1/255."""
    steps: Count = 10
    """Steps of PGD."""
    step_size: float = Field(0.25, gt=0)
    """Step size of PGD, as a fraction of epsilon."""
    corruptions: list[CommonCorruption | ExtraCorruption] = list(get_args(CommonCorruption))
    """Of ImageNet-C: its fifteen, over which errors are averaged there; speckle_noise, gaussian_blur, spatter and
    saturate are its four more. Their frost is a procedural texture here."""
    severities: list[Annotated[int, Field(ge=1, le=5)]] = [1, 2, 3, 4, 5]
    """From 1 to 5."""
    samples: Count | None = None
    """Held-out samples, spread evenly; null: all."""
    batch: Batch = 64
    """Samples per forward pass."""


class TransferConfig(Section):
    """A transfer task on a trained model."""

    run: RunConfig = RunConfig()
    data: DataConfig
    encode: EncodeConfig = EncodeConfig()
    knn: KnnConfig = KnnConfig()
    probe: ProbeConfig = ProbeConfig()
    finetune: FineTuneConfig = FineTuneConfig()
    robustness: RobustnessConfig = RobustnessConfig()


def transfer_config(given: dict, overrides: list[str]) -> TransferConfig:
    """The sections that the command line gives, with `section.key=value` overrides.

    Raises:
        UserError: a field is unknown, of the wrong type or impossible.
    """
    for override in overrides:
        apply_override(given, override)
    return parse(TransferConfig, given, "--set")
