"""Clean the captions of data/openclipart: `python -m lab.openclipart` rewrites its shards in place.

Titles in the SVG files are often the names of collections ("Various Cliparts", "AIGA_Symbol_Signs. EPS converted
from"), and keywords are often artefacts of programs ("mapsym", "hash(0x8a091c0)"). Names of collections are replaced by
the words of the image's file name; artefacts, names of authors and repetitions are removed. A second run changes
nothing.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path

from m3ae_fast.base.atomic_file import atomic_write

FOLDER = Path("data/openclipart")
COLLECTION = re.compile(
    r"(?:various cliparts|etiquette icons|aiga_symbol_signs|uk roadsigns|road signs|r16 sib?mission|blueberry - iconset"
    r"|gold-theme|plastik-icon-theme|advertising|map symbols|sallite|homes clipart|australian maps|clipart by .*)",
    re.IGNORECASE,
)
SUFFIX = re.compile(r" - (?:rpg map elements|body part)$", re.IGNORECASE)  # suffixes of titles
NOISE = re.compile(  # parts of a caption that are removed if they match completely
    r"eps converted from|made with inkscape|aiga symbols|(?:map|music|network|weather|signal)sym|map symbols|appicon"
    r"|lemon theme icon|mime-?types|stickmen|hash\(0x\w+\)|architetto francesco rollandin"
    r"|collection of satellite engineering related clipart|stock|unsorted"
    r"|part of hotel icons collection",
    re.IGNORECASE,
)
_NO_WORDS = (
    "aiga aj architetto bb benji bwh cm dsk fldr francesc fs ganson gnome mime nicola nicu stock symbol yve zazou"
)
NO_WORDS = set(_NO_WORDS.split())  # authors, collections and units in file names
SHORT = {"tv", "pc", "cd", "bus", "car", "bar", "cow", "cat", "dog", "sun", "hub", "ship", "tea"}


def words_of(source: str) -> str:
    """Return the words in the name of an image's file or, if there are none, of its folder."""
    *_, folder, name = source.split("/")
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    found = [word.lower() for word in re.split(r"[\W_\d]+", name)]
    found = [word for word in found if (len(word) > 2 or word in SHORT) and word not in NO_WORDS]
    return " ".join(found) or folder.replace("_", " ").replace("-", " ").rstrip("s")


def clean(caption: str, source: str, keywords: Sequence[str]) -> str:
    """Return the cleaned caption. `source`, `keywords`: path and keywords of the image in the library."""
    title, *rest = re.split(r"\.\s+", caption.strip().rstrip("."))
    if COLLECTION.fullmatch(title):
        title = words_of(source)
    title = re.sub(r"(?<=[^\W\d_])#?\d+$", "", SUFFIX.sub("", title))
    *descriptions, words = rest or [""]
    if all(NOISE.fullmatch(word.strip()) for word in words.split(",")):
        words = ",".join(keywords)
    kept: list[str] = []
    for part in (title, *descriptions, *words.split(",")):
        part = part.replace("_", " ").strip()
        if part and not NOISE.fullmatch(part) and part.lower() not in (one.lower() for one in kept):
            kept.append(part)
    sentences = 1 + sum(part in kept for part in descriptions)
    return ". ".join([*kept[:sentences], ", ".join(kept[sentences:])]).rstrip(". ")


def rewrite(shard: Path) -> tuple[int, int]:
    """Clean the captions of a shard in place, and return the number of changed captions and of all captions."""
    with tarfile.open(shard) as tar:
        members = [(info, tar.extractfile(info).read()) for info in tar]
    about = {info.name.split(".")[0]: json.loads(data) for info, data in members if info.name.endswith(".json")}
    changed = captions = 0
    with atomic_write(shard) as path, tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for info, data in members:
            if info.name.endswith(".txt"):
                own = about[info.name.split(".")[0]]
                text = clean(data.decode(), own["source"], own["keywords"]).encode()
                captions, changed = captions + 1, changed + (text != data)
                info.size, data = len(text), text
            tar.addfile(info, io.BytesIO(data))
    return changed, captions


if __name__ == "__main__":
    for shard in sorted(FOLDER.glob("*.tar")):
        print(f"{shard}: %d of %d captions changed" % rewrite(shard))
