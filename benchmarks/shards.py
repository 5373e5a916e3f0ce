"""Synthetic shards, with images of about the size of photographs."""

from __future__ import annotations

import tarfile
from io import BytesIO
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from m3ae_fast.shards.tar_member import add_member

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def make_shards(
    folder: Path, shards: int, samples: int, size: tuple[int, int], *, vocab: int, words: tuple[int, int]
) -> None:
    """Write shards FOLDER/0.tar and so on, and a vocabulary FOLDER/vocab.txt.

    Args:
        folder: the output folder.
        shards: number of shards.
        samples: total number of samples.
        size: height and width of the JPEGs.
        vocab: number of tokens in the vocabulary.
        words: minimum and maximum number of tokens per caption.
    """
    rng = torch.Generator().manual_seed(0)
    tokens = [*SPECIAL, *(f"w{i}" for i in range(vocab - len(SPECIAL)))]
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    for shard in range(shards):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for i in range(shard, samples, shards):
                image = _jpeg(size, rng)
                length = int(torch.randint(words[0], words[1] + 1, (), generator=rng))
                ids = torch.randint(len(SPECIAL), vocab, (length,), generator=rng).tolist()
                for ending, data in (("jpg", image), ("txt", " ".join(tokens[i] for i in ids).encode())):
                    add_member(tar, f"{i:05}.{ending}", data)


def jpeg(pixels_CHW: Tensor, quality: int) -> bytes:
    """Return an RGB image, uint8 [3, H, W], as a JPEG file."""
    file = BytesIO()
    Image.fromarray(pixels_CHW.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality)
    return file.getvalue()


def _jpeg(size: tuple[int, int], rng: torch.Generator) -> bytes:
    """Return a JPEG of blurred shapes with noise, which takes about 50 kB at 400 x 500 pixels."""
    blurred = torch.rand(1, 3, 25, 32, generator=rng) * 255
    image = F.interpolate(blurred, size, mode="bicubic")[0] + 8 * torch.randn(1, *size, generator=rng)
    return jpeg(image.clamp(0, 255).to(torch.uint8), 85)
