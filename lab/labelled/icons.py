"""Icons from npm's packages @tabler/icons-png and @tabler/icons: grey images with names and categories.

Icons of one family, such as alarm, alarm-off and the filled alarm, are held out together.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lab.labelled.packages import fetch, is_held_out, read_members
from m3ae_fast.base.errors import UserError
from m3ae_fast.shards.sources.interface import Record, Records

VERSION = "3.48.0"
LICENCE = "MIT, Copyright 2020-2026 Pawel Kuna"
LEAST = 20  # categories with fewer icons are left out
_TABLE = "icons.json"


class Icon(NamedTuple):
    """The image of an icon."""

    file: str  # STYLE/NAME.png
    category: str
    style: str

    @property
    def name(self) -> str:
        return Path(self.file).stem


class Icons(Records):
    """Records of all icons, with their category as class, and their name and style as caption."""

    def __init__(self, package: Path | None, downloads: Path):
        """Open `package`, a folder with both packages, or download them to `downloads` first if it is None. Raises
        UserError if a package cannot be downloaded or read."""
        folder = package or downloads
        if package is None:
            for name in ("icons-png", "icons"):
                fetch(["npm", "pack", f"@tabler/{name}@{VERSION}"], downloads, ".tgz")
        images, table = folder / f"tabler-icons-png-{VERSION}.tgz", folder / f"tabler-icons-{VERSION}.tgz"
        self._images = read_members(images, "package/icons", ".png")
        try:
            content = json.loads(read_members(table, "package", _TABLE)[_TABLE])
            categories = {name: about["category"] for name, about in content.items()}
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{table}: is not @tabler/icons ({error!r})") from None
        icons = [Icon(file, categories[Path(file).stem], Path(file).parent.name) for file in sorted(self._images)
                 if Path(file).stem in categories]  # fmt: skip
        counts = {category: sum(icon.category == category for icon in icons) for category in set(categories.values())}
        self.classes = sorted(category for category, count in counts.items() if count >= LEAST)
        kept = [icon for icon in icons if icon.category in self.classes]
        self._icons = {
            split: [icon for icon in kept if is_held_out(family_of(icon.name, categories)) == held]
            for split, held in (("train", False), ("val", True))
        }
        super().__init__({split: np.ones(len(own), np.int64) for split, own in self._icons.items()})
        self.identity = {"kind": "tabler-icons", "package": images.name, "licence": LICENCE}

    def name(self, split: str, number: int) -> str:
        return f"icon {self._icons[split][number].file}"

    def read(self, split: str, number: int) -> Record:
        icon = self._icons[split][number]
        caption = f"{icon.name.replace('-', ' ')}, {icon.style}"
        about = {"name": icon.name, "category": icon.category, "style": icon.style}
        return Record(self._images[icon.file], caption, self.classes.index(icon.category), about)


def family_of(name: str, names: dict[str, str]) -> str:
    """Return the family of an icon: the shortest prefix of its words that is the name of an icon itself."""
    words = name.split("-")
    prefixes = ("-".join(words[:count]) for count in range(1, len(words) + 1))
    return next((prefix for prefix in prefixes if prefix in names), name)
