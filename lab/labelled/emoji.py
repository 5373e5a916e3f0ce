"""Emoji of one vendor, from npm's packages emoji-datasource-VENDOR: images of 64 pixels with names and categories.

Variants with skin tones, and the components of such variants, are left out, so that no image is a recoloured copy of
another. The same emoji are held out for every vendor; therefore, no held-out emoji occurs in the training samples of
any vendor.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lab.labelled.packages import fetch, is_held_out, read_members
from m3ae_fast.base.errors import UserError
from m3ae_fast.shards.sources.interface import Record, Records

VERSION = "16.0.0"
LICENCES = {  # licences of the images; those of the tables of names are MIT
    "twitter": "CC-BY 4.0, Twemoji, Copyright Twitter, Inc and other contributors",
    "google": "Apache 2.0, Noto Emoji, Copyright Google Inc",
}
_PARTS = "Component"  # the category of skin tones and hair styles


class Picture(NamedTuple):
    """The image of an emoji."""

    image: str  # file name
    caption: str
    about: dict[str, str]


class Emoji(Records):
    """Records of a vendor's emoji, with their category as class and their names as caption."""

    def __init__(self, vendor: str, package: Path | None, downloads: Path):
        """Open `package` or, if it is None, download it to `downloads` first. Raises UserError if the package cannot be
        downloaded or read."""
        command = ["npm", "pack", f"emoji-datasource-{vendor}@{VERSION}"]
        package = package or fetch(command, downloads / vendor, ".tgz")
        try:
            table = json.loads(read_members(package, "package", "emoji.json")["emoji.json"])
            pictures = {held: pictures_of(table, vendor, held) for held in (False, True)}
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{package}: is not emoji-datasource-{vendor} ({error!r})") from None
        self._images = read_members(package, f"package/img/{vendor}/64", ".png")
        self._pictures = {
            split: [p for p in pictures[held] if p.image in self._images]
            for split, held in (("train", False), ("val", True))
        }
        self.classes = sorted({emoji["category"] for emoji in table} - {_PARTS})
        super().__init__({split: np.ones(len(own), np.int64) for split, own in self._pictures.items()})
        licence = LICENCES[vendor]
        self.identity = {"kind": f"emoji-{vendor}", "package": package.name, "licence": licence}

    def name(self, split: str, number: int) -> str:
        return f"emoji {self._pictures[split][number].image}"

    def read(self, split: str, number: int) -> Record:
        picture = self._pictures[split][number]
        label = self.classes.index(picture.about["category"])
        return Record(self._images[picture.image], picture.caption, label, dict(picture.about))


def pictures_of(table: list[dict[str, Any]], vendor: str, held_out: bool) -> list[Picture]:
    """Return a vendor's images of the emoji in one split, in the order of the table."""
    found = []
    for emoji in table:
        if is_held_out(emoji["unified"]) != held_out or emoji["category"] == _PARTS or not emoji[f"has_img_{vendor}"]:
            continue
        about = {"emoji": emoji["unified"], "category": emoji["category"], "subcategory": emoji["subcategory"]}
        names = [emoji["name"].lower(), *(name.replace("_", " ") for name in emoji["short_names"])]
        found.append(Picture(emoji["image"], ", ".join(dict.fromkeys(names)), about))
    return found
