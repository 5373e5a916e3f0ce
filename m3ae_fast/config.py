"""The run's configuration: one strict JSON file, typed sections, `--set` overrides, errors that name fields.

The official M3AE hyper-parameters are the defaults (arXiv 2205.14204 and its public code).
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, Strict, ValidationError, model_validator

from m3ae_fast.errors import UserError

MAX_VOCAB = 1 << 24
# (emb_dim, depth, num_heads); the decoder is the same for all: 512 wide, 8 deep, 16 heads
SIZES = {"small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16), "huge": (1280, 32, 16)}


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


T = TypeVar("T", bound=Section)
Channels = Annotated[tuple[float, ...], Strict(False)]  # one number a channel; a JSON array is no tuple when strict
# Upper bounds beyond all use, so that a slip of the keyboard is an error and no overflow or endless start.
Size = Annotated[int, Field(gt=0, le=1 << 16)]  # widths, pixels, tokens
Layers = Annotated[int, Field(gt=0, le=1024)]
Batch = Annotated[int, Field(gt=0, le=1 << 24)]  # samples
Count = Annotated[int, Field(gt=0, le=1 << 40)]


class RunConfig(Section):
    dir: Path = Path("runs/m3ae")  # checkpoints, metrics, TensorBoard events and pictures go here
    seed: int = Field(42, ge=0, lt=1 << 63)


class ModelConfig(Section):
    """Everything that defines the network. `size` fills the widths and depths that are not given."""

    size: Literal["small", "base", "large", "huge"] | None = "large"
    emb_dim: Size
    depth: Layers
    num_heads: Size
    dec_emb_dim: Size = 512
    dec_depth: Layers = 8
    dec_num_heads: Size = 16
    mlp_ratio: float = Field(4, gt=0, le=64)
    output_head_depth: int = Field(0, ge=0, le=1024)  # hidden layers of the output heads
    use_type_embedding: bool = True
    drop: float = Field(0.0, ge=0, lt=1)
    att_drop: float = Field(0.0, ge=0, lt=1)
    drop_path: float = Field(0.0, ge=0, lt=1)
    image_size: Size = 256  # pixels
    patch_size: Size = 16  # pixels
    channels: Literal[1, 3, 4] = 3
    image_mean: Channels = (0.5762, 0.5503, 0.5213)  # cc12m's, of pixels / 255
    image_std: Channels = (0.3207, 0.3169, 0.3307)
    text_length: Size = 64  # tokens; longer captions are cut
    vocab_size: int = Field(30522, ge=0, le=MAX_VOCAB)  # 0 builds an image-only MAE without text weights

    @model_validator(mode="before")
    @classmethod
    def _fill_from_size(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        size = data.get("size", "large")
        preset = dict(zip(("emb_dim", "depth", "num_heads"), SIZES.get(size, ()))) if isinstance(size, str) else {}
        return preset | data

    @model_validator(mode="after")
    def _possible(self) -> ModelConfig:
        for width, heads in (("emb_dim", "num_heads"), ("dec_emb_dim", "dec_num_heads")):
            if getattr(self, width) % getattr(self, heads):
                raise ValueError(f"{width} {getattr(self, width)} does not divide by {heads} {getattr(self, heads)}")
            if getattr(self, width) % 4:
                raise ValueError(f"{width} {getattr(self, width)} is no multiple of 4, as sin-cos positions need")
            if int(getattr(self, width) * self.mlp_ratio) == 0:
                raise ValueError(
                    f"mlp_ratio {self.mlp_ratio:g} leaves no hidden layer for {width} {getattr(self, width)}"
                )
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} does not divide by patch_size {self.patch_size}")
        for name in ("image_mean", "image_std"):
            if len(getattr(self, name)) != self.channels:
                raise ValueError(f"{name} has {len(getattr(self, name))} values for {self.channels} channels")
        if min(self.image_std) <= 0:
            raise ValueError("image_std must be above 0")
        return self

    @property
    def has_dropout(self) -> bool:
        return max(self.drop, self.att_drop, self.drop_path) > 0

    @property
    def patches_per_image(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def patch_dim(self) -> int:
        """Values in a patch: rows x columns x channels."""
        return self.patch_size**2 * self.channels


class MaskingConfig(Section):
    image_ratio: float = Field(0.75, ge=0, le=1)
    text_ratio: float = Field(0.75, ge=0, le=1)
    per: Literal["sample", "batch"] = "sample"  # "batch": one mask for the whole batch, as the official code draws it


class LossConfig(Section):
    image_weight: float = Field(1.0, ge=0)
    text_weight: float = Field(0.5, ge=0)
    image_all_tokens: bool = False  # loss on all patches, not only the masked ones
    text_all_tokens: bool = False
    norm_pix: bool = False  # MAE's per-patch standardised targets


class SourceConfig(Section):
    shards: str | list[str]  # brace patterns, globs, pipe: commands, URLs
    weight: float | None = Field(None, gt=0, le=1e12)  # relative share of the samples; none: by size
    modality: Literal["auto", "paired", "image", "text"] = "auto"


class DataConfig(Section):
    train: list[SourceConfig] = Field(min_length=1)
    val: list[SourceConfig] = []
    tokenizer: str | None = None  # a tokenizer.json, a BERT vocab.txt or a hub name
    crop_scale: tuple[float, float] = (0.2, 1.0)  # share of the area that RandomResizedCrop keeps
    flip: bool = True
    shuffle_shards: int = Field(16, gt=0, le=1 << 24)  # shards whose samples are shuffled together
    workers: int | None = Field(None, ge=0, le=1024)  # loader processes a rank; none: what the cores allow
    prefetch: int = Field(4, gt=0, le=1024)  # batches each worker prepares ahead
    cache_dir: Path | None = None  # copies of remote shards, indexes of read-only folders
    max_bad_fraction: float = Field(0.1, ge=0, le=1)  # more broken samples than this stop the run

    @model_validator(mode="after")
    def _possible(self) -> DataConfig:
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_scale {[low, high]} must be two shares with 0 < low <= high <= 1")
        for name in ("train", "val"):
            weights = [source.weight for source in getattr(self, name)]
            if any(w is None for w in weights) and any(w is not None for w in weights):
                raise ValueError(f"{name}: give every source a weight, or none")
        return self


Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimConfig(Section):
    peak_lr: float = Field(1.5e-4, gt=0)  # for a batch of 256; scaled by global_batch / 256
    init_lr: float = Field(0.0, ge=0)  # scaled likewise
    end_lr: float = Field(0.0, ge=0)  # scaled likewise
    warmup_epochs: float = Field(5, ge=0, le=1e6)
    weight_decay: float = Field(0.05, ge=0)
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    clip_grad: float | None = Field(None, gt=0)  # global norm


class TrainConfig(Section):
    global_batch: Batch = 4096  # samples an optimiser step, over all ranks
    micro_batch: Batch | None = None  # samples a rank and forward pass; none: no accumulation
    epochs: float | None = Field(None, gt=0, le=1e6)
    steps: Count | None = None  # instead of epochs
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 where the hardware multiplies it faster
    activation_checkpointing: bool = False
    compile: bool = False  # torch.compile of the transformer blocks
    log_every: Count = 10  # steps
    eval_every: Count | None = None  # steps; none: at the end alone
    eval_samples: Count = 1024  # held-out samples an evaluation looks at
    save_every: Count = 1000  # steps
    keep: Count = 2  # checkpoints kept
    pictures: int = Field(6, ge=0, le=1000)  # samples in reconstructions.png

    @model_validator(mode="after")
    def _possible(self) -> TrainConfig:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give epochs or steps, and not both")
        return self


_SET_ELSEWHERE = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.global_batch / (train.micro_batch x ranks)",
    "gradient_clipping": "optim.clip_grad",
    "optimizer": "optim",
    "scheduler": "optim",
    "bf16": "train.precision",
    "fp16": "train.precision",
}


class Config(Section):
    run: RunConfig = RunConfig()
    model: ModelConfig = Field(default_factory=lambda: ModelConfig(size="large"))
    masking: MaskingConfig = MaskingConfig()
    loss: LossConfig = LossConfig()
    data: DataConfig
    optim: OptimConfig = OptimConfig()
    train: TrainConfig
    deepspeed: dict[str, Any] | None = {}  # passed to DeepSpeed; null: plain torch

    @model_validator(mode="after")
    def _possible(self) -> Config:
        zero = self._zero
        if not isinstance(zero, dict) or not any(zero.get("stage", 0) is stage for stage in range(4)):
            raise ValueError("deepspeed.zero_optimization must be an object with a stage of 0, 1, 2 or 3")
        if not isinstance(zero.get("offload_optimizer", {}), dict | None):
            raise ValueError("deepspeed.zero_optimization.offload_optimizer must be an object with a device")
        for key, owner in _SET_ELSEWHERE.items():
            if key in (self.deepspeed or {}):
                raise ValueError(f"deepspeed.{key} is set from {owner}; remove it from the deepspeed section")
        return self

    @property
    def _zero(self) -> Any:
        return (self.deepspeed or {}).get("zero_optimization", {})

    @property
    def zero_stage(self) -> int:
        return self._zero.get("stage", 0)

    @property
    def offloads_optimizer(self) -> bool:
        """Whether Adam runs on the CPU while the model is elsewhere (ZeRO-Offload)."""
        return ((self._zero.get("offload_optimizer") or {}).get("device") or "none") != "none"


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a JSON config file and apply `section.key=value` overrides (values are JSON, or else plain strings).

    Raises:
        UserError: the file is missing or no JSON, or a field is unknown, of the wrong type or impossible.
    """
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_object)
    except OSError as error:
        raise UserError(f"config {path}: cannot be read ({error.strerror}); give --config an existing file") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"config {path}: is no JSON ({error})") from None
    if not isinstance(data, dict):
        raise UserError(f"config {path}: must hold one JSON object")
    for override in overrides or []:
        _apply(data, override)
    return parse(Config, data, f"config {path}")


def parse(section: type[T], data: Any, where: str) -> T:
    """Validate plain JSON data. Raises UserError with one line that names the first wrong field."""
    text = json.dumps(data)
    if "\\u0000" in text:  # no file name may have one
        raise UserError(f"{where}: holds a null character")
    try:
        return section.model_validate_json(text)
    except ValidationError as error:
        raise UserError(f"{where}: {_describe(section, error)}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of two values for one key JSON would silently take the last."""
    data = dict(pairs)
    if len(data) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return data


def _apply(data: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise UserError(f"--set {override}: write it as section.key=value")
    try:
        value = json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError):
        value = text
    *parents, last = name.split(".")
    node: Any = data
    for parent in parents:
        node = node.setdefault(parent, {}) if isinstance(node, dict) else _item(node, parent, override)
        if node is None:
            raise UserError(f"--set {override}: {parent} is null in the file; set it as a whole")
    if isinstance(node, list):
        _item(node, last, override)
        node[int(last)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise UserError(f"--set {override}: {'.'.join(parents)} is a value, not a section")


def _item(node: Any, key: str, override: str) -> Any:
    if isinstance(node, list) and key.isdecimal() and int(key) < len(node):
        return node[int(key)]
    raise UserError(f"--set {override}: there is no {key!r} at this place")


def _describe(section: type[Section], error: ValidationError) -> str:
    first, *others = error.errors()
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = _fields_at(section, first["loc"][:-1])
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1, cutoff=0.0)
        text = f"unknown key {where}" + (f"; did you mean {near[0]}?" if near else "")
    elif first["type"] == "missing":
        text = f"{where} is missing"
    else:
        message = first["msg"].removeprefix("Value error, ")
        message = message[:1].lower() + message[1:]
        got = "" if isinstance(first["input"], dict) else f" (got {json.dumps(first['input'], default=str)[:80]})"
        text = f"{where}: {message}{got}" if where else message
    return text + (f" (and {len(others)} more)" if others else "")


def _fields_at(section: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """Names of the fields of the section that `loc` points to."""
    for part in loc:
        if isinstance(part, int):
            continue
        annotation = section.model_fields[part].annotation
        section = next((t for t in (annotation, *getattr(annotation, "__args__", ())) if _is_section(t)), section)
    return list(section.model_fields)


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)
