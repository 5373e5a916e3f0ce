"""The frozen image tokenizer for discretised targets: MaskGIT's VQGAN (arXiv 2202.04200, after arXiv 2012.09841).

The architecture is that of the official M3AE code (github.com/young-geng/m3ae_public, m3ae/vqgan.py). Blocks and
convolutions are listed in the order of their use, as flax numbers them.

Shapes: B images, H x W pixels, h x w codes (H / stride), L = h * w, E width of a code, K codes.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from m3ae_fast.base.errors import UserError
from m3ae_fast.base.output_folder import CONFIG_FILE, MODEL_FILE, output_folder, read_tensors, write_tensors
from m3ae_fast.base.untrusted_file import read_json
from m3ae_fast.batch.packed import PackedBatch
from m3ae_fast.config import ModelConfig
from m3ae_fast.model.pretrained import build, is_encoder

GROUPS, EPS = 32, 1e-6  # number of groups and epsilon of all GroupNorms
CHUNK = 8  # number of images encoded at a time; the first level takes 32 MB per image of 256 x 256 pixels


@dataclass(frozen=True)
class VQGANConfig:
    """Sizes of a VQGAN. The defaults are those of the published tokenizer."""

    filters: int = 128
    num_res_blocks: int = 2
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    embedding_dim: int = 256
    codebook_size: int = 1024

    @property
    def stride(self) -> int:
        """Return the number of pixels per code in each direction."""
        return 2 ** (len(self.channel_multipliers) - 1)

    @property
    def widths(self) -> list[int]:
        """Return the number of channels of each level, from the finest to the coarsest."""
        return [self.filters * multiplier for multiplier in self.channel_multipliers]


class ResBlock(nn.Module):
    """A residual block, [B, width_in, H, W] -> [B, width, H, W]: two sequences of norm, swish and convolution. If the
    width changes, the shortcut is a convolution of the block's own OUTPUT, and the input is not added at all."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, width_in, EPS)
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(GROUPS, width, EPS)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(width, width, 1, bias=False) if width_in != width else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (x if self.shortcut is None else self.shortcut(y))


def _res_blocks(width: int, widths: list[int], count: int) -> nn.ModuleList:
    """Return `count` blocks for each of `widths`. The input of the first block has `width` channels."""
    every = [w for w in widths for _ in range(count)]
    return nn.ModuleList(ResBlock(before, after) for before, after in zip([width, *every], every))


class Encoder(nn.Module):
    """The encoder, [B, 3, H, W] -> [B, E, h, w]."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        widths = config.widths
        self.config = config
        self.conv_in = nn.Conv2d(3, config.filters, 3, padding=1, bias=False)
        self.blocks = _res_blocks(config.filters, [*widths, widths[-1]], config.num_res_blocks)
        self.norm = nn.GroupNorm(GROUPS, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.embedding_dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        levels, per_level = len(self.config.widths), self.config.num_res_blocks
        for i, block in enumerate(self.blocks):
            x = block(x)
            level, last = divmod(i + 1, per_level)
            if not last and level < levels:
                x = F.avg_pool2d(x, 2)
        return self.conv_out(F.silu(self.norm(x)))


class Decoder(nn.Module):
    """The decoder, [B, E, h, w] -> [B, 3, H, W]."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        widths = config.widths[::-1]  # from the coarsest to the finest
        self.config = config
        self.blocks = _res_blocks(widths[0], [widths[0], *widths], config.num_res_blocks)
        into = [config.embedding_dim, *widths[:-1], widths[-1]]
        out = [widths[0], *widths[:-1], 3]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in zip(into, out))
        self.norm = nn.GroupNorm(GROUPS, widths[-1], EPS)

    def forward(self, x: Tensor) -> Tensor:
        first, *ups, last = self.convs
        x = first(x)
        per_level = self.config.num_res_blocks
        for i, block in enumerate(self.blocks):
            x = block(x)
            level, within = divmod(i + 1, per_level)
            # upsample after the last block of each level except the finest; the first group of blocks is no level
            if not within and 2 <= level <= len(ups) + 1:
                x = ups[level - 2](F.interpolate(x, scale_factor=2, mode="nearest"))
        return last(F.silu(self.norm(x)))


class VQGAN(nn.Module):
    """Maps images to ids of a codebook, and back."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.codebook = nn.Parameter(torch.empty(config.codebook_size, config.embedding_dim))
        nn.init.kaiming_uniform_(self.codebook)
        self.requires_grad_(False).eval()

    def features(self, images: Tensor) -> Tensor:
        """Return features before quantisation, in the dtype of the weights: [B, 3, H, W] floating-point in [0, 1] ->
        [B, h, w, E]."""
        return self.encoder(images.to(self.codebook.dtype)).permute(0, 2, 3, 1)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Return the ids of the nearest codes by squared distance: int32 [B, L], row-major. `images`: [B, 3, H, W],
        uint8 or floating-point in [0, 1]; H and W must be multiples of the stride."""
        height, width = (size // self.config.stride for size in images.shape[-2:])
        ids_BL = torch.empty(len(images), height * width, dtype=torch.int32, device=images.device)
        for start in range(0, len(images), CHUNK):
            ids_BL[start : start + CHUNK] = self._encode(images[start : start + CHUNK])
        return ids_BL

    def _encode(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):
            x = images.to(self.codebook.dtype)
            z_NE = self.features(x / 255 if images.dtype == torch.uint8 else x).flatten(0, 2)
            # |z|^2 is the same for all codes
            distance_NK = self.codebook.square().sum(1) - 2 * z_NE @ self.codebook.T
        return distance_NK.argmin(1).view(len(images), -1)

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        """Return the images [B, 3, H, W], nearly within [0, 1], in the dtype of the weights, for the code ids, int
        [B, h, w]."""
        return self.decoder(self.codebook[ids.long()].permute(0, 3, 1, 2).contiguous())

    def check_fits(self, patch_size: int, codebook_size: int, where: str) -> None:
        """Raise UserError if a code does not cover exactly one patch, or if the codebook sizes of VQGAN and model
        differ."""
        stride = self.config.stride
        if patch_size != stride:
            raise UserError(
                f"{where}: each code covers {stride} x {stride} pixels, but model.patch_size is {patch_size}; "
                f"set model.patch_size to {stride}"
            )
        if codebook_size != self.config.codebook_size:
            raise UserError(
                f"{where}: has {self.config.codebook_size} codes, but model.codebook_size is {codebook_size}; "
                f"set model.codebook_size to {self.config.codebook_size}"
            )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors to `folder`, atomically. Raises UserError if the folder holds other
        files or cannot be written."""
        with output_folder(folder) as path:
            write_tensors(path / MODEL_FILE, self.state_dict())
            text = json.dumps({"kind": "vqgan", **asdict(self.config)}, indent=2)
            (path / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> VQGAN:
        """Load a VQGAN written by `save_pretrained`. Raises UserError if a file is missing, damaged or of another
        model."""
        folder = Path(folder).expanduser()
        try:
            data = read_json(folder / CONFIG_FILE)
            if data.pop("kind", None) != "vqgan":
                raise ValueError("its config.json is not that of a VQGAN")
            config = VQGANConfig(**data | {"channel_multipliers": tuple(data["channel_multipliers"])})
            state = read_tensors(folder / MODEL_FILE)
            if config.num_res_blocks * len(config.widths) > len(state):
                raise ValueError(f"its config.json requires more blocks than there are weights ({len(state)})")
            if is_encoder(state):
                raise ValueError("it contains only an encoder, without codebook and decoder")
            return build(lambda: cls(config), state, str(folder))
        except (
            OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, SafetensorError
        ) as error:  # fmt: skip
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{folder}: is not a converted VQGAN ({reason}); specify the folder of a converted VQGAN"
            ) from None


def with_image_targets(batch: PackedBatch, vqgan: VQGAN, config: ModelConfig) -> PackedBatch:
    """Return `batch` with image targets, int32 [I]: for each row of the image loss, the token id of its patch, or 0
    for a padding row, whose weight is 0. `batch` and `vqgan` must be on the same device.

    The VQGAN expects pixels in [0, 1], so normalised floating-point images are converted back. (The official code
    passes normalised images to it.)
    """
    images = batch.images
    if images.is_floating_point():
        mean, std = (images.new_tensor(values).view(-1, 1, 1) for values in (config.image_mean, config.image_std))
        images = images * std + mean
    ids_I = vqgan.encode(images).flatten().index_select(0, batch.image_patch_ids.to(torch.int64))
    return replace(batch, image_targets=ids_I * (batch.image_row_weight != 0))
