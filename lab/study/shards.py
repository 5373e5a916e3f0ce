"""Shards of the study, which are created from those of lab.labelled: small images, in disjoint parts."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from m3ae_fast.base.atomic_file import atomic_write, write_text_atomically
from m3ae_fast.base.errors import UserError
from m3ae_fast.shards.tar_member import add_member

VENDORS = ("twitter", "google")
FOLDS, VALIDATION = 3, 3  # number of folds, of which each seed tests one; index of the part for choosing settings
PARTS = FOLDS + 1
# parts of the training images; probes are not trained on `images`
CLOTHES = {"probe": 5_000, "validation": 5_000, "images": 50_000}
TEST, LABELS = "test", "labels.json"
_ALONE = "Component"  # a category of skin tones and hair styles, which are not independent images


class Sample(NamedTuple):
    """A sample in a shard."""

    key: str
    image: bytes
    caption: str | None
    about: dict[str, Any]


def prepare(data: Path, folder: Path, side: int) -> None:
    """Write emoji-VENDOR-PART.tar, fashion-PART.tar and labels.json to `folder`, unless they exist.

    Variants of emoji with skin tones are left out, so that no image is a recoloured copy of another. The images of an
    emoji by both vendors are in the same part. Larger images are scaled to `side` x `side`, because decoding them would
    take too long.

    Args:
        data: folder with the sub-folders fashion, twitter and google, as written by lab.labelled.
        folder: output folder.
        side: maximum side of an image in pixels.

    Raises:
        UserError: a sub-folder has no shards, or shards of an earlier version.
    """
    if (folder / LABELS).exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    labels: dict[str, dict[str, str]] = {}
    for vendor in VENDORS:
        parts: dict[str, list[Sample]] = {f"emoji-{vendor}-{part}": [] for part in range(PARTS)}
        for sample in read(data / vendor, ("train", "val")):
            about = sample.about
            if "tone" not in about:
                raise UserError(f"{data / vendor}: was made by an earlier version; create it again with lab.labelled")
            if not is_plain(sample):
                continue
            key = f"{vendor}-{about['emoji']}"
            labels[key] = {name: about[name] for name in ("emoji", "category", "subcategory")}
            parts[f"emoji-{vendor}-{part_of(about['emoji'])}"].append(sample._replace(key=key))
        write(folder, parts, side)
    clothes = sorted(read(data / "fashion", ("train",)), key=lambda sample: _hash(sample.key))
    parts = {}
    for name, count in CLOTHES.items():
        parts[f"fashion-{name}"], clothes = clothes[:count], clothes[count:]
    parts[f"fashion-{TEST}"] = list(read(data / "fashion", ("val",)))
    for name, samples in parts.items():
        parts[name] = [sample._replace(key=f"{name}-{sample.key}") for sample in samples]
        labels |= {sample.key: {"emoji": sample.key, "category": sample.about["name"]} for sample in parts[name]}
    write(folder, parts, side)
    write_text_atomically(folder / LABELS, json.dumps(labels) + "\n")


def is_plain(sample: Sample) -> bool:
    """Return whether a sample is an independent emoji without skin tone."""
    return not sample.about["tone"] and sample.about["category"] != _ALONE


def part_of(emoji: str) -> int:
    """Return the part that contains the emoji with these code points."""
    return _hash(emoji) % PARTS


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, person=b"lab.study").digest(), "big")


def read(folder: Path, splits: tuple[str, ...]) -> Iterator[Sample]:
    """Yield the samples of a folder's shards. Raises UserError if there are no shards."""
    paths = [path for split in splits for path in sorted(folder.glob(f"{split}-*.tar"))]
    if not paths:
        raise UserError(f"{folder}: has no {splits[0]}-*.tar; make them with python -m lab.labelled")
    for path in paths:
        with tarfile.open(path) as tar:
            files: dict[str, dict[str, bytes]] = {}
            for member in tar:
                key, _, suffix = member.name.partition(".")
                content = tar.extractfile(member)
                files.setdefault(key, {})[suffix] = content.read() if content else b""
        for key, own in files.items():
            caption = own["txt"].decode() if "txt" in own else None
            yield Sample(key, own["jpg"], caption, json.loads(own.get("json", b"{}")))


def write(folder: Path, parts: dict[str, list[Sample]], side: int) -> None:
    """Write a shard for each part."""
    for name, samples in parts.items():
        with atomic_write(folder / f"{name}.tar") as partial, tarfile.open(partial, "w") as tar:
            for sample in samples:
                files = {"jpg": scaled(sample.image, side)}
                files |= {} if sample.caption is None else {"txt": sample.caption.encode()}
                for suffix, content in files.items():
                    add_member(tar, f"{sample.key}.{suffix}", content)


def write_labelled(shard: Path, samples: Iterable[tuple[str, bytes, int]]) -> None:
    """Write a shard of labelled images. `samples`: key, JPEG file and class number of each image."""
    with atomic_write(shard) as partial, tarfile.open(partial, "w") as tar:
        for key, image, label in samples:
            add_member(tar, f"{key}.jpg", image)
            add_member(tar, f"{key}.cls", str(label).encode())


def scaled(jpeg: bytes, side: int) -> bytes:
    """Return the image with at most `side` x `side` pixels, as JPEG."""
    image = Image.open(io.BytesIO(jpeg))
    if max(image.size) <= side:
        return jpeg
    out = io.BytesIO()
    image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC).save(out, "JPEG", quality=95)
    return out.getvalue()
