"""Every setting of a training run with its default: typed, strict sections whose fields have documented meanings.

The defaults are the hyper-parameters of the official M3AE (arXiv 2205.14204 and its public code), except `masking.per`:
the official code has one mask per device, whereas here, each sample has its own. The string below a field is its
description; `python docs/write_settings.py` generates docs/config.md from these strings.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, Strict, model_validator

from m3ae_fast.base.wording import counted
from m3ae_fast.config.knn import KnnConfig
from m3ae_fast.config.poolings import POOLINGS, Pool
from m3ae_fast.config.section import Batch, Beta, Channels, Count, Layers, NamedPath, Rate, Section, Size
from m3ae_fast.config.value_range import Range, check_range

MAX_VOCAB = 1 << 24
# Number of values per patch with HOG targets. It is defined in m3ae_kernels.hog too, which cannot be imported here,
# because that would import torch.
ORIENTATIONS = 9
MAX_CHANNELS = 256  # more than any imaging spectrometer in use has
LONGEST = 800  # maximum number of epochs to which a time limit extends a run; MAE trains for this number of epochs
MAX_POSITIONS = 1 << 27  # maximum number of elements in a table of position embeddings: 512 MB
# (emb_dim, depth, num_heads) of the encoder; all sizes have the same decoder: width 512, depth 8, 16 heads
SIZES = {"small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16), "huge": (1280, 32, 16)}


class RunConfig(Section):
    """The run folder, seed and loggers."""

    dir: NamedPath = Path("runs/m3ae")
    """Folder for checkpoints, metrics, TensorBoard events and reconstructions."""
    seed: int = Field(42, ge=0, lt=1 << 63)
    """Seed of initial weights, sample order, crops and masks."""
    loggers: list[Literal["tensorboard", "wandb"]] = ["tensorboard"]
    """Loggers in addition to metrics.jsonl. W&B reads WANDB_PROJECT, WANDB_ENTITY and WANDB_MODE."""
    stall_timeout: float = Field(300, gt=0)
    """Stall timeout in seconds: if a rank or data loader makes no progress for this long, the run exits with code 75.
    At start-up, ranks have 1,800 s to join the process group."""


class ModelConfig(Section):
    """Settings that define the network."""

    size: Literal["small", "base", "large", "huge"] | None = "large"
    """Preset for `emb_dim`, `depth` and `num_heads`; explicit values of these settings take precedence."""
    emb_dim: Size
    """Width of the encoder: a multiple of 4 and of `num_heads`."""
    depth: Layers
    """Number of encoder blocks."""
    num_heads: Size
    """Number of attention heads in each encoder block."""
    dec_emb_dim: Size = 512
    """Width of the decoder: a multiple of 4 and of `dec_num_heads`."""
    dec_depth: Layers = 8
    """Number of decoder blocks."""
    dec_num_heads: Size = 16
    """Number of attention heads in each decoder block."""
    dec_attention: Literal["self", "cross"] = "self"
    """Attention of the decoder. `self`: visible and masked tokens attend to each other, as in the official M3AE.
    `cross`: each masked token attends only to the encoder's output (CrossMAE, arXiv 2401.14391), which needs fewer
    FLOPs."""
    mlp_ratio: float = Field(4, gt=0, le=64)
    """Hidden width of the MLP in each block, as a multiple of the block's width."""
    output_head_depth: int = Field(0, ge=0, le=1024)
    """Number of hidden layers of the output heads."""
    use_type_embedding: bool = True
    """Whether a learned embedding of the modality is added to image and text tokens."""
    drop_path: Rate = 0.0
    """Stochastic depth: probability that a sample skips a residual branch of a block."""
    image_size: Size = 256
    """Height and width of a square image, in pixels; a multiple of `patch_size`."""
    patch_size: Size = 16
    """Height and width of a patch, in pixels."""
    resize: Literal["square", "native"] = "square"
    """Resizing of the images. `square`: images are cropped and scaled to `image_size`. `native`: the aspect ratio is
    kept, and images with `min_patches` to `max_patches` patches are not resized, except that both sides are rounded to
    multiples of the patch size."""
    max_patches: Size | None = None
    """With `resize: native`: maximum number of patches per image; larger images are downscaled. The longer side is
    limited to 2 √`max_patches` patches, so images with an aspect ratio above 4:1 have fewer patches. null: the number
    of patches of a square image."""
    min_patches: Size = 1
    """With `resize: native`: minimum number of patches per image; smaller images are upscaled."""
    native_positions: Literal["absolute", "centred"] = "absolute"
    """With `resize: native` and computed position embeddings: coordinates of the patches. `absolute`: rows and columns
    are counted from the upper left corner of the image; `centred`: the image is centred in the grid of a square image.
    Stored embeddings are instead interpolated to each image's rows and columns, as in timm."""
    channels: int = Field(3, ge=1, le=MAX_CHANNELS)
    """Number of image channels: 1 for grey, 3 for RGB, 4 for RGBA. TIFF and .npy files may have any number of channels,
    for example the spectral bands of a satellite image, or red, green, blue and depth."""
    image_dtype: Literal["uint8", "uint16", "float32"] = "uint8"
    """Data type of the pixels. Black is 0; white is 255 for uint8, 65,535 for uint16 and 1 for float32. With float32,
    values may lie outside the range from black to white. `value_range` sets which values of a file are black and
    white."""
    image_mean: Channels = (0.5762, 0.5503, 0.5213)
    """Mean of the pixels, one value per channel, with black = 0 and white = 1. The default is the mean of CC12M."""
    image_std: Channels = (0.3207, 0.3169, 0.3307)
    """Standard deviation of the pixels, one positive value per channel, in the same units as the mean. The default is
    the standard deviation of CC12M."""
    value_range: Range | None = None
    """Pixel values that map to black and white in images with more than 8 bits per channel, such as [0, 4095]; `dtype`
    uses the full range of the file's data type (0 to 1 for floats). null: such images are rejected."""
    text_length: Size = 64
    """Maximum number of text tokens; longer captions are truncated."""
    vocab_size: int = Field(30522, ge=0, le=MAX_VOCAB)
    """Number of tokens in the tokenizer's vocabulary. 0: an image-only MAE without text weights, which ignores the
    captions of its shards."""
    image_targets: Literal["pixels", "hog", "vqgan", "features"] = "pixels"
    """Targets of masked patches. `pixels`: the pixels, as in the official M3AE. `hog`: a histogram of oriented
    gradients, nine numbers per patch (as in MaskFeat, arXiv 2112.09133), without `loss.norm_pix`. `vqgan`: token ids of
    a frozen VQGAN (`data.image_tokenizer`). `features`: features of a frozen model (`loss.teacher`)."""
    target_width: Size | None = None
    """With `image_targets: features`: number of features per patch, which is the width of the teacher. null: determined
    from the teacher when the run starts."""
    codebook_size: int = Field(1024, gt=0, le=MAX_VOCAB)
    """Number of token ids in the VQGAN's codebook; used only with `image_targets: vqgan`."""
    gelu: Literal["tanh", "exact"] = "tanh"
    """Variant of GELU: the tanh approximation, as in the official M3AE, or the exact function, as in MAE and timm."""
    positions: Literal["sincos", "stored"] = "sincos"
    """Position embeddings of patches. `sincos`: computed. `stored`: read from the weights, as in MAE. Neither kind is
    trained."""
    mean_pool: Literal["after_norm", "before_norm"] = "after_norm"
    """Order of mean pooling and the final LayerNorm. `after_norm`: features are averaged over tokens after the
    LayerNorm; `before_norm`: they are averaged before it, as in fine-tuned MAEs (timm's `fc_norm`)."""
    pool: Pool = "mean"
    """Pooling of the features of images in `encode`, `embed`, evaluations and exports, if no other pooling is set
    there; see `encode.pool`. Texts and pairs use `mean` in place of a grid."""
    init_from: str | None = None
    """Export folder or Hugging Face model id whose weights initialise a new run. The decoder is randomly initialised if
    the export contains no decoder, if its decoder has a different `dec_attention`, or if `image_targets` is `features`
    and its decoder was trained for other targets."""

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
        for dim_name, heads_name in (("emb_dim", "num_heads"), ("dec_emb_dim", "dec_num_heads")):
            dim, heads = getattr(self, dim_name), getattr(self, heads_name)
            if dim % heads:
                raise ValueError(f"{dim_name} {dim} is not divisible by {heads_name} {heads}")
            if dim % 4:
                raise ValueError(f"{dim_name} {dim} is not a multiple of 4, which sin-cos position embeddings require")
            if int(dim * self.mlp_ratio) == 0:
                raise ValueError(f"mlp_ratio {self.mlp_ratio:g} gives a hidden width of 0 for {dim_name} {dim}")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not divisible by patch_size {self.patch_size}")
        if self.resize == "native":
            if self.min_patches > self.most_patches:
                raise ValueError(f"min_patches {self.min_patches} is more than max_patches {self.most_patches}")
            if self.image_targets == "vqgan":
                raise ValueError("image_targets vqgan needs resize square, because a VQGAN needs images of one size")
            if self.image_targets == "features":
                raise ValueError(
                    "image_targets features needs resize square, because a teacher needs images of one size"
                )
            if self.image_targets == "hog":
                raise ValueError(
                    "image_targets hog needs resize square, because native images are stored as separate patches, but "
                    "the gradients of a patch depend on its neighbours"
                )
        places = max(self.position_side**2, self.text_length)
        width = max(self.emb_dim, self.dec_emb_dim)
        if places * width > MAX_POSITIONS:
            raise ValueError(
                f"the position embeddings of {places:,} patches or tokens with width {width} have more than "
                f"{MAX_POSITIONS:,} elements; "
                "raise patch_size, or lower image_size or text_length"
            )
        for name in ("image_mean", "image_std"):
            if len(getattr(self, name)) != self.channels:
                raise ValueError(
                    f"{name} has {counted(len(getattr(self, name)), 'value')} for {counted(self.channels, 'channel')}; "
                    f"m3ae-fast shards stats SHARDS --channels {self.channels} prints the values of your images"
                )
        if min(self.image_std) <= 0:
            raise ValueError("image_std must be above 0")
        check_range("value_range", self.value_range)
        if self.image_targets == "vqgan" and self.channels != 3:
            raise ValueError(f"image_targets vqgan needs 3 channels, not {self.channels}")
        if self.image_targets == "vqgan" and self.image_dtype != "uint8":
            raise ValueError(f"image_targets vqgan needs image_dtype uint8, not {self.image_dtype}")
        return self

    def default_pool(self, *, texts: bool) -> Pool:
        """Return the pooling that is used if no other is set: `pool`, or "mean" if `pool` is for images only and there
        are `texts`."""
        return "mean" if texts and POOLINGS[self.pool].needs_images else self.pool

    @property
    def patches_per_image(self) -> int:
        """Return the number of patches of an image that is resized to a square."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def most_patches(self) -> int:
        """Return the maximum number of patches of an image."""
        square = self.resize == "square"
        return self.patches_per_image if square or self.max_patches is None else self.max_patches

    @property
    def longest_side(self) -> int:
        """Return the maximum number of patches along a side of an image."""
        if self.resize == "square":
            return self.image_size // self.patch_size
        return min(self.most_patches, 2 * math.isqrt(self.most_patches - 1) + 2)  # twice the rounded-up square root

    @property
    def position_side(self) -> int:
        """Return the number of rows, and of columns, of the table of position embeddings."""
        return self.image_size // self.patch_size if self.positions == "stored" else self.longest_side

    @property
    def patch_dim(self) -> int:
        """Return the number of values in a patch: rows x columns x channels."""
        return self.patch_size**2 * self.channels

    @property
    def image_output_dim(self) -> int:
        """Return the number of outputs of the image head per patch. Raises ValueError if it is still unknown."""
        if self.image_targets == "features" and self.target_width is None:
            raise ValueError("model.target_width is not set: it is known only after the teacher has been opened")
        sizes = {"pixels": self.patch_dim, "hog": ORIENTATIONS, "vqgan": self.codebook_size}
        return (sizes | {"features": self.target_width or 0})[self.image_targets]


class MaskingConfig(Section):
    """Masking of patches and text tokens."""

    image_ratio: float = Field(0.75, ge=0, le=1)
    """Fraction of the patches that are masked."""
    text_ratio: float = Field(0.75, ge=0, le=1)
    """Fraction of the text tokens that are masked."""
    image_predicted: float = Field(1.0, gt=0, le=1)
    """Fraction of the masked patches that enter the decoder and the loss in training. Evaluations and reconstructions
    always predict all masked patches. Values below 1 are intended for `model.dec_attention: cross`; with `self`, they
    make the features worse."""
    text_predicted: float = Field(1.0, gt=0, le=1)
    """Fraction of the masked text tokens that enter the decoder and the loss in training; see `image_predicted`."""
    per: Literal["sample", "batch"] = "sample"
    """Sampling of the masks. `sample`: one mask for each sample; `batch`: one mask for the whole batch, whereas the
    official code has one for each device. In both cases, the masked tokens that are predicted are selected separately
    for each sample."""


class LossConfig(Section):
    """Loss weights and reductions."""

    image_weight: float = Field(1.0, ge=0)
    """Weight of the image loss in the total loss."""
    text_weight: float = Field(0.5, ge=0)
    """Weight of the text loss in the total loss."""
    image_all_tokens: bool = False
    """Whether the image loss includes visible patches."""
    text_all_tokens: bool = False
    """Whether the text loss includes visible tokens."""
    norm_pix: bool = False
    """Whether pixel targets are standardised per patch, as in MAE (with the unbiased variance)."""
    teacher: str | None = Field(None, min_length=1)
    """With `model.image_targets: features`: the frozen model whose features are the targets. It is a run, a checkpoint,
    an export, a name on the Hugging Face Hub, a timm model (`timm:NAME`, `timm:NAME=FILE` with weights in a file, or
    `timm:local-dir:FOLDER`), or a vision model of transformers: `transformers:NAME` or `transformers:FOLDER`."""
    per: Literal["sample", "batch"] = "sample"
    """Reduction of the losses: `sample` averages over the tokens of each sample, then over samples; `batch` averages
    over all tokens, as in MAE."""


class SourceConfig(Section):
    """A data source: shards with the same weight and settings."""

    shards: str | list[str]
    """Tar files: paths, brace patterns, globs, URLs or `pipe:` commands; or a manifest of them, `NAME.npy`."""
    weight: float | None = Field(None, gt=0, le=1e12)
    """Sampling weight of this source, relative to the other sources; null: its number of samples."""
    loss_weight: float = Field(1.0, ge=0, le=1e6)
    """Factor by which the losses of these samples are multiplied; the denominator of the mean does not change."""
    modality: Literal["auto", "any", "paired", "image", "text"] = "auto"
    """Modalities that are used from each sample. `any`: all modalities of the sample. `auto`: the modality of a
    shard's samples (`paired`, `image` or `text`) if it is the same for all of them; otherwise `any`. With `auto`, an
    image-only model (`model.vocab_size` 0) uses only the images."""
    caption_fraction: float = Field(1.0, ge=0, le=1)
    """Fraction of the pairs that keep their caption; the remaining pairs are used as images without text. The pairs are
    selected by a hash of their keys, so they are the same in every run, and a larger fraction includes the pairs of a
    smaller fraction."""

    @model_validator(mode="after")
    def _possible(self) -> SourceConfig:
        if self.caption_fraction < 1 and self.modality in ("image", "text"):
            raise ValueError(
                f"caption_fraction {self.caption_fraction:g} needs pairs, but modality is {self.modality!r}"
            )
        return self


class DataConfig(Section):
    """Training and held-out samples."""

    train: list[SourceConfig] = Field(min_length=1)
    """Data sources of the training samples."""
    val: list[SourceConfig] = []
    """Data sources of the held-out samples."""
    tokenizer: str | None = None
    """Text tokenizer: a tokenizer.json, a BERT vocab.txt or a name on the Hugging Face Hub; null: captions are not
    used."""
    show_channels: Annotated[tuple[int, int, int], Strict(False)] | None = None
    """Indices, from 0, of the channels that figures show as red, green and blue. null: the first three channels if
    there are 3 or 4, otherwise the first channel as grey."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Smallest and largest fraction of an image's area that RandomResizedCrop keeps: 0 < smallest ≤ largest ≤ 1."""
    flip: bool = True
    """Whether images are flipped horizontally with probability 0.5."""
    repeats: int = Field(1, gt=0, le=1 << 16)
    """Number of views (crops and masks) of each sample per epoch. Each sample is decoded once per epoch, and the number
    of steps per epoch is multiplied by this value. With a teacher (`model.image_targets: features`), the views of a
    sample have the same crop and different masks, so that the teacher computes the features once for all of them."""
    shuffle_shards: int = Field(128, gt=0, le=1 << 24)
    """Total number of shards in the shuffle windows of all lanes (see `lanes`). A shuffle window is a group of shards
    whose samples a lane shuffles together."""
    lanes: int = Field(64, gt=0, le=1 << 16)
    """Maximum number of lanes, the parallel sub-streams into which the training stream is divided; each node reads only
    some of them ([explanation](guide/remote-shards.md#partitioning-of-shards-over-nodes)). The actual number of lanes
    is the largest divisor of N that is at most this value and at most the number of shards. N is `train.global_batch`,
    divided by its greatest common divisor with `repeats`."""
    workers: int | None = Field(None, ge=0, le=1024)
    """Number of data-loader processes per rank; null: derived from the number of CPU cores."""
    cache_dir: NamedPath | None = None
    """Cache folder for shards that are remote or on a network file system, and for the indexes of shards in read-only
    folders; null: `~/.cache/m3ae_fast`."""
    cache_gb: float | None = Field(None, gt=0, le=1e9)
    """Maximum size of the shard cache per node, in GB; null: the cache grows until only a tenth of the disk is free."""
    image_tokenizer: NamedPath | None = None
    """Folder of the converted VQGAN whose token ids are the image targets (`model.image_targets: vqgan`)."""
    image_tokens: Literal["device", "workers"] = "device"
    """Process that computes the image token ids. `device`: the training process, on its device. `workers`: the
    data-loader workers."""
    max_bad_fraction: float = Field(0.1, ge=0, le=1)
    """Maximum fraction of unusable samples. If it is exceeded, the run stops with an error."""

    @model_validator(mode="after")
    def _possible(self) -> DataConfig:
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_scale {[low, high]} must be two fractions with 0 < low <= high <= 1")
        for name in ("train", "val"):
            weights = [source.weight for source in getattr(self, name)]
            if any(w is None for w in weights) and any(w is not None for w in weights):
                raise ValueError(f"{name}: set a weight for all sources or for none")
        return self


class OptimConfig(Section):
    """Optimiser and learning rate schedule. The defaults are those of the official code: AdamW with linear warm-up and
    cosine decay."""

    peak_lr: float = Field(1.5e-4, gt=0)
    """Learning rate after the warm-up, for a batch of 256. It is multiplied by `train.global_batch` / 256, and the
    product is logged as `lr`."""
    end_lr: float = Field(0.0, ge=0)
    """Learning rate after the last step. It is scaled in the same way as `peak_lr`."""
    warmup_epochs: float = Field(5, ge=0, le=1e6)
    """Length of the warm-up, in epochs; at most the whole run."""
    weight_decay: float = Field(0.05, ge=0)
    """Weight decay of weight matrices and, as in the official code, of LayerNorm scales."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Adam's decay rates of the first and the second moment, per step."""
    clip_grad: float | None = Field(None, gt=0)
    """Maximum global gradient norm; larger gradients are scaled down to it. null: no clipping."""
    name: Literal["adamw", "muon"] = "adamw"
    """Optimiser. `muon` orthogonalises the updates of the weight matrices in the blocks and at the decoder's input, and
    uses AdamW for everything else (Jordan et al. 2024; arXiv 2502.16982); it cannot be used with ZeRO stage 3 or an
    offloaded optimiser."""
    muon_momentum: Beta = 0.95
    """With `name: muon`: decay rate of the momentum, per step."""
    muon_lr_ratio: float = Field(2.0, gt=0, le=1e3)
    """With `name: muon`: learning rate of the matrices that Muon updates, as a multiple of AdamW's learning rate. With
    a ratio of 1, their updates have the typical size of AdamW updates; orthogonalised updates tolerate larger learning
    rates."""
    layer_decay: float = Field(1.0, gt=0, le=1)
    """Layer-wise learning rates, for a run that starts from trained weights (`model.init_from`). Each layer of the
    encoder has this fraction of the learning rate of the layer above it; the lowest layer is that of the embeddings.
    The encoder's final LayerNorm and the decoder have the full learning rate, which is logged as `lr`. 1: all layers
    have the full learning rate. Values below 1 cannot be combined with Muon."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """Schedule of the learning rate after the warm-up. `cosine`: cosine decay. `wsd` (warm-up, stable, decay): a
    constant learning rate until a decay at the end, so that a run can be extended from the checkpoint before the
    decay."""
    decay_fraction: float = Field(0.2, gt=0, le=1)
    """With `schedule: wsd`: fraction of the steps during which the learning rate decays. The learning rate is
    multiplied by 1 minus the square root of the decay's progress (arXiv 2405.18392)."""

    @property
    def decay(self) -> float | None:
        """Return the length of the decay at the end of the run, as a fraction of the run's steps; None for a cosine
        schedule, which has no constant learning rate before the decay."""
        return self.decay_fraction if self.schedule == "wsd" else None


class KnnProbeConfig(KnnConfig):
    """k-NN classification of labelled samples while the model trains. The features of a sample are the mean over all
    its tokens except cls."""

    train: list[SourceConfig] = Field(min_length=1)
    """Data sources of the training samples, which are the neighbours."""
    val: list[SourceConfig] = Field(min_length=1)
    """Data sources of the samples to classify."""
    labels: str = "cls"
    """Source of the labels: `cls` (integers in KEY.cls), or `json.FIELD` (a field of KEY.json)."""
    every: Count | None = None
    """Number of optimiser steps between probes; null: only at the start and the end."""


class TrainConfig(Section):
    """Length, batch size and precision of the run, and the intervals between log lines, evaluations and checkpoints."""

    global_batch: Batch = 4096
    """Number of samples per optimiser step, over all ranks."""
    micro_batch: Batch | None = None
    """Maximum number of samples per rank in each forward pass. Larger per-rank batches are split evenly into
    micro-batches with gradient accumulation; null: no gradient accumulation."""
    epochs: float | None = Field(None, gt=0, le=1e6)
    """Length of the run, in epochs; alternative to `steps`. One of the two must be set."""
    steps: Count | None = None
    """Length of the run, in optimiser steps; alternative to `epochs`."""
    log_every: Count = 10
    """Number of optimiser steps between log lines."""
    eval_every: Count | None = None
    """Number of optimiser steps between evaluations; null: only at the start and the end."""
    save_every: Count = 1000
    """Number of optimiser steps between checkpoints."""
    keep: Count = 2
    """Number of most recent checkpoints to keep."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Dtype of the computations: `bf16`, `fp32`, or `auto` (bf16 if it is faster than fp32 on this hardware)."""
    ema: float | None = Field(None, gt=0, lt=1)
    """Decay per step of an exponential moving average of the weights, such as 0.9999. Export and evaluation use the
    average. null: no average."""
    activation_checkpointing: bool = False
    """Whether activations are recomputed in the backward pass, which reduces memory usage and increases the time per
    step by about a third."""
    compile: bool = False
    """Whether torch.compile compiles the transformer blocks."""
    hours: float | None = Field(None, gt=0, le=1e5)
    """Duration of the run in hours, including evaluations. The number of steps, whose initial value is given by `steps`
    or `epochs`, is adjusted during training so that the run ends after this time, but never to more than 800 epochs or
    the initial value, whichever is larger. null: no time limit."""
    eval_samples: Count = 1024
    """Number of held-out samples in each evaluation."""
    pictures: int = Field(6, ge=0, le=1000)
    """Number of samples in reconstructions.png and attention.png, which are drawn with every checkpoint; 0: no
    figures."""
    probe: KnnProbeConfig | None = None
    """k-NN probe during training, whose accuracy is logged as `val_knn_top1`; null: no probe."""

    @model_validator(mode="after")
    def _one_length(self) -> TrainConfig:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("set epochs or steps, not both; set one of them to null")
        return self


class OffloadConfig(Section):
    """Offloading of tensors from the memory of the GPU to the memory of another device."""

    device: Literal["none", "cpu"] = "none"
    """Device whose memory holds the offloaded tensors: `cpu`, or `none` for no offloading."""


class ZeroConfig(Section):
    """Partitioning and communication of ZeRO. The settings have the same names as in DeepSpeed."""

    stage: int = Field(0, ge=0, le=3)
    """ZeRO stage, which determines what is partitioned over ranks. 0: nothing; 1: the optimiser state; 2: also the
    gradients; 3: also the weights."""
    reduce_bucket_size: Annotated[int, Field(gt=0, le=1 << 34), Strict(False)] = 50_000_000
    """Number of gradient elements that are reduced in one collective."""
    allgather_bucket_size: Annotated[int, Field(gt=0, le=1 << 34), Strict(False)] = 50_000_000
    """Number of parameters that are gathered in one collective."""
    offload_optimizer: OffloadConfig | None = None
    """Stages 1 to 3: offloading of the optimiser's state and step; null: no offloading."""
    offload_param: OffloadConfig | None = None
    """Stage 3: offloading of the weights; null: no offloading."""
    stage3_prefetch_bucket_size: Annotated[int, Field(ge=0, le=1 << 40), Strict(False)] = 50_000_000
    """Stage 3: number of parameters that are gathered in advance."""

    @model_validator(mode="after")
    def _possible(self) -> ZeroConfig:
        if self.offload_param is not None and self.offload_param.device != "none" and self.stage < 3:
            raise ValueError(f"offload_param needs stage 3, not {self.stage}")
        if self.offloads_optimizer and self.stage == 0:
            raise ValueError("offload_optimizer needs stage 1, 2 or 3")
        return self

    @property
    def offloads_optimizer(self) -> bool:
        """Return whether the optimiser runs on the CPU while the model is on another device (ZeRO-Offload, arXiv
        2101.06840)."""
        return self.offload_optimizer is not None and self.offload_optimizer.device != "none"


class DeepSpeedConfig(Section):
    """Settings of DeepSpeed that are not derived from the other sections."""

    zero_optimization: ZeroConfig = ZeroConfig()
    """Settings of ZeRO. On one rank, stages 0 to 2 without offloading have nothing to partition: plain torch then takes
    the same steps, and the other settings of the section have no effect."""
    communication_data_type: Literal["fp32", "bf16"] = "fp32"
    """Dtype in which gradients are summed over ranks. `bf16` halves the number of bytes that are sent, but rounds the
    sums. The sum is computed by all-reduce or, at stage 3, by reduce-scatter, which sends half as many bytes."""

    def is_needed(self, ranks: int) -> bool:
        """Return whether DeepSpeed takes the steps on this number of ranks. A single rank has nothing to partition or
        to reduce, so plain torch takes the same steps instead, unless the stage is 3 or tensors are offloaded."""
        zero = self.zero_optimization
        return ranks > 1 or zero.stage == 3 or zero.offloads_optimizer


class Config(Section):
    """Settings of a pre-training run."""

    run: RunConfig = RunConfig()
    model: ModelConfig = Field(default_factory=lambda: ModelConfig.model_validate({"size": "large"}))
    masking: MaskingConfig = MaskingConfig()
    loss: LossConfig = LossConfig()
    data: DataConfig
    optim: OptimConfig = OptimConfig()
    train: TrainConfig
    deepspeed: DeepSpeedConfig | None = DeepSpeedConfig()
    """`null` in place of the section selects plain torch with data parallelism (DDP)."""

    @model_validator(mode="after")
    def _possible(self) -> Config:
        if self.train.epochs is None and self.train.steps is None:
            raise ValueError("train: set the length of the run: epochs or steps")
        targets = self.model.image_targets
        if targets == "vqgan" and self.data.image_tokenizer is None:
            raise ValueError("data.image_tokenizer: model.image_targets vqgan needs the folder of a VQGAN")
        if targets == "features" and self.loss.teacher is None:
            raise ValueError(
                "loss.teacher: model.image_targets features needs a teacher (with pretrain: --teacher MODEL)"
            )
        if targets != "features" and self.loss.teacher is not None:
            raise ValueError(f"loss.teacher needs model.image_targets features, not {targets}")
        if targets == "features" and self.data.repeats > 1 and self.masking.per == "batch":
            raise ValueError(
                f"data.repeats {self.data.repeats} with a teacher gives the views of a sample the same crop, and "
                "masking.per batch the same mask, so that they are equal: set masking.per to sample, or data.repeats "
                "to 1"
            )
        if targets != "pixels" and self.loss.norm_pix:
            raise ValueError(
                f"loss.norm_pix standardises pixels, but model.image_targets is {targets}: set loss.norm_pix to false"
            )
        if self.model.dec_attention == "cross" and (self.loss.image_all_tokens or self.loss.text_all_tokens):
            raise ValueError(
                "model.dec_attention cross predicts only masked tokens: set loss.image_all_tokens and "
                "loss.text_all_tokens to false, or model.dec_attention to self"
            )
        self._check_layer_decay()
        if self.optim.name == "muon" and self.zero and (self.zero.stage == 3 or self.zero.offloads_optimizer):
            what = "stage 3" if self.zero.stage == 3 else "offload_optimizer"
            raise ValueError(
                f"optim.name muon needs whole matrices on the GPU, but {what} of ZeRO partitions or offloads them: "
                "set zero_optimization.stage to 0, 1 or 2 without offload_optimizer, or optim.name to adamw"
            )
        shown = self.data.show_channels or (0,)
        if not 0 <= min(shown) <= max(shown) < self.model.channels:
            raise ValueError(f"data.show_channels {list(shown)}: the model has channels 0 to {self.model.channels - 1}")
        return self._without_captions()

    def _check_layer_decay(self) -> None:
        """Raise ValueError if optim.layer_decay is set and cannot be combined with other settings."""
        decay = self.optim.layer_decay
        if decay == 1:
            return
        if self.model.init_from is None:
            raise ValueError(
                f"optim.layer_decay {decay:g} needs a run that starts from trained weights: set model.init_from (with "
                "pretrain: --from MODEL), or optim.layer_decay to 1"
            )
        if self.optim.name == "muon":
            raise ValueError(
                f"optim.layer_decay {decay:g} cannot be combined with Muon, whose learning rate is the same in all "
                "layers: set optim.name to adamw, or optim.layer_decay to 1"
            )

    def _without_captions(self) -> Config:
        """Return the config without the settings of captions if the model is image-only; otherwise return it unchanged.
        In sources with `modality: auto`, the modality becomes `image` and `caption_fraction` becomes 1.
        `masking.text_predicted` becomes 1."""
        if self.model.vocab_size:
            return self

        def images(sources: list[SourceConfig]) -> list[SourceConfig]:
            update = {"modality": "image", "caption_fraction": 1.0}
            return [s.model_copy(update=update) if s.modality == "auto" else s for s in sources]

        update = {"train": images(self.data.train), "val": images(self.data.val)}
        masking = self.masking.model_copy(update={"text_predicted": 1.0})
        return self.model_copy(update={"data": self.data.model_copy(update=update), "masking": masking})

    @property
    def zero(self) -> ZeroConfig | None:
        """Return the settings of ZeRO; None with plain torch."""
        return None if self.deepspeed is None else self.deepspeed.zero_optimization
