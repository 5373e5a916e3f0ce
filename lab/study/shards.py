"""Shards of the study: small images, and captions that name no class."""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from PIL import Image

from m3ae_fast.whole_file import put_in_place

# The categories of data/openclipart/README.md; each of their words in the forms that captions have.
CLASS_WORDS = (
    r"animals?|buildings?|computers?|flags?|foods?|geograph(?:y|ic|ical)|offices?|people|persons?|plants?|"
    r"recreation(?:al|s)?|shapes?|signs?|symbols?|tools?|transport(?:ation|s)?"
)
# Letters alone bound a word: `AIGA_Symbol_Signs` has two of them.
_NAMED = re.compile(rf"_*(?<![a-z])(?:{CLASS_WORDS})(?![a-z])_*", re.IGNORECASE)


def names_class(caption: str) -> bool:
    """Return whether a class's word is in it, be it the sample's own class or another."""
    return _NAMED.search(caption) is not None


def without_classes(caption: str) -> str:
    """Return the caption without any class's words; empty where no letter or digit is left.

    >>> without_classes("France - Ile de France. europe, flag, sign, subnational, flags")
    'France - Ile de France. europe, subnational'
    """
    parts = (" ".join(part.split()) for part in _NAMED.sub(" ", caption).split(","))
    bare = re.sub(r"([.:;]),", r"\1", ", ".join(part for part in parts if part))
    return bare if re.search(r"[^\W_]", bare) else ""


def captions_of(shards: Iterable[Path]) -> Iterator[str]:
    """Return all captions, shard after shard."""
    for shard in shards:
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.name.endswith(".txt"):
                    yield _content(tar, member).decode()


def copy_shards(shards: Iterable[Path], folder: Path, side: int, *, nameless: bool = False) -> None:
    """Copy the shards in `folder`, those that are not there yet, with images of `side` x `side` pixels: decoding larger
    ones would take longer than training. `nameless`: with `without_classes` of the captions; a sample keeps no caption
    where nothing of it is left."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in shards:
        path, partial = folder / shard.name, folder / f".{shard.name}"
        if path.exists():
            continue
        with tarfile.open(shard) as whole, tarfile.open(partial, "w") as copy:
            for member in whole:
                data = _content(whole, member)
                if member.name.endswith(".jpg"):
                    data = _scaled(data, side)
                elif member.name.endswith(".txt") and nameless:
                    data = without_classes(data.decode()).encode()
                    if not data:
                        continue
                member.size = len(data)
                copy.addfile(member, io.BytesIO(data))
        put_in_place(partial, path)


def _scaled(jpeg: bytes, side: int) -> bytes:
    out = io.BytesIO()
    image = Image.open(io.BytesIO(jpeg)).convert("RGB")
    image.resize((side, side), Image.Resampling.BICUBIC).save(out, "JPEG", quality=95)
    return out.getvalue()


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    return file.read() if file else b""
