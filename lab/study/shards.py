"""Shards of the study, made from those of lab.labelled: small pictures, in parts that are never mixed."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from m3ae_fast.base.atomic_file import whole_file, write_whole
from m3ae_fast.base.errors import UserError
from m3ae_fast.shards.tar_member import add_member

VENDORS = ("twitter", "google")
FOLDS, VALIDATION = 3, 3  # a seed's test emoji are a fold; the part after these is for choosing settings
PARTS = FOLDS + 1
CLOTHES = {"probe": 5_000, "validation": 5_000, "images": 50_000}  # of the training pictures; `images` train no probe
TEST, LABELS = "test", "labels.json"
_ALONE = "Component"  # a category of five skin tones and hair, not of pictures


class Sample(NamedTuple):
    """A sample of a shard."""

    key: str
    image: bytes
    caption: str | None
    about: dict[str, Any]


def prepare(data: Path, folder: Path, side: int) -> None:
    """Write emoji-VENDOR-PART.tar, fashion-PART.tar and labels.json into `folder`, unless they are there.

    Emoji have no skin tones but the plain one, so that no picture is another in other colours; both vendors' pictures
    of an emoji are in the same part. Larger pictures are scaled to `side` x `side`: decoding them takes too long.

    Args:
        data: has the folders fashion, twitter and google, as lab.labelled writes them.

    Raises:
        UserError: one of them has no shards, or those of an earlier version.
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
                raise UserError(f"{data / vendor}: was made by an earlier version; make it again with lab.labelled")
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
    write_whole(folder / LABELS, json.dumps(labels) + "\n")


def is_plain(sample: Sample) -> bool:
    """Return whether an emoji is a picture without a skin tone."""
    return not sample.about["tone"] and sample.about["category"] != _ALONE


def part_of(emoji: str) -> int:
    """Return the part of the emoji of these code points."""
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
    """Write a shard of each part."""
    for name, samples in parts.items():
        with whole_file(folder / f"{name}.tar") as partial, tarfile.open(partial, "w") as tar:
            for sample in samples:
                files = {"jpg": scaled(sample.image, side)}
                files |= {} if sample.caption is None else {"txt": sample.caption.encode()}
                for suffix, content in files.items():
                    add_member(tar, f"{sample.key}.{suffix}", content)


def scaled(jpeg: bytes, side: int) -> bytes:
    """Return a picture of at most `side` x `side` pixels."""
    image = Image.open(io.BytesIO(jpeg))
    if max(image.size) <= side:
        return jpeg
    out = io.BytesIO()
    image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC).save(out, "JPEG", quality=95)
    return out.getvalue()
