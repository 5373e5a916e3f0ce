"""Images with exact masks: emoji, whose alpha channels are the masks, on crops of clip art.

Shapes: S x S pixels of an image.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from lab.labelled.emoji import VERSION, Emoji
from lab.recipe import CLIPART, drawn
from lab.study import shards
from m3ae_fast.base.atomic_file import write_text_atomically
from m3ae_fast.base.errors import UserError
from m3ae_fast.shards.making import make

SPLITS = {"train": 2, "val": 1}  # number of images of each emoji of a vendor
FOREGROUND, CATEGORIES = "foreground", "categories"  # masks: emoji or background; category of the emoji or background
MASKS = (FOREGROUND, CATEGORIES)
SIDE = 48  # S
EMOJI_SIDES = (16, 40)  # smallest and largest side of an emoji in pixels
CROPPED = (0.3, 0.7)  # smallest and largest side of a crop of clip art, as a fraction of the side of the clip art
WHITE, MOST_WHITE, TRIES = 250, 0.5, 8  # level of a white pixel; maximum fraction of a crop; number of crops to try
OPAQUE = 128  # smallest alpha of the pixels that belong to an emoji


class Drawing(NamedTuple):
    """An emoji without skin tone, as drawn by one vendor."""

    key: str  # VENDOR-CODEPOINTS
    caption: str
    category: str
    png: bytes


def prepare(packages: Path, folder: Path, *, download: bool) -> list[str]:
    """Write the images and their masks, and from them the shards MASKS/train-*.tar and MASKS/val-*.tar, unless they
    exist. Return the names of the categories, which are the classes from 1.

    Args:
        packages: folder of the packages emoji-datasource-VENDOR-VERSION.tgz.
        folder: output folder.
        download: whether to download the packages, to sub-folders of `packages`.

    Raises:
        UserError: a package is missing, or cannot be downloaded or read.
    """
    done = folder / "categories.json"
    if done.exists():
        return json.loads(done.read_text(encoding="utf-8"))
    drawings: dict[str, list[Drawing]] = {split: [] for split in SPLITS}
    for vendor in shards.VENDORS:
        package = packages / f"emoji-datasource-{vendor}-{VERSION}.tgz"
        if not download and not package.exists():
            raise UserError(f"--packages {packages}: has no {package.name}; leave the option out to download it")
        source = Emoji(vendor, None if download else package, packages)
        for split, own in drawings.items():
            own += _plain(source, vendor, split)
    classes = sorted({drawing.category for own in drawings.values() for drawing in own})
    rows = []
    for split, own in drawings.items():
        backgrounds = [sample.image for sample in shards.read(CLIPART, (split,))]
        for drawing in own:
            for number in range(SPLITS[split]):
                name = f"{split}/{drawing.key}-{number}"
                _write(folder, name, drawing, backgrounds, 1 + classes.index(drawing.category))
                rows.append((f"{name}.png", drawing.caption, drawing.key.partition("-")[2]))
    table = io.StringIO()
    csv.writer(table).writerows([("image", "caption", "emoji"), *rows])
    write_text_atomically(folder / "captions.csv", table.getvalue())
    for masks in MASKS:
        make(
            folder / "images",
            out=folder / masks,
            captions=folder / "captions.csv",
            masks=folder / "masks" / masks,
            quality=95,
            workers=1,
        )
    write_text_atomically(done, json.dumps(classes) + "\n")
    return classes


def _plain(source: Emoji, vendor: str, split: str) -> Iterator[Drawing]:
    """Yield the drawings of a split, without variants of skin tone and without parts of emoji."""
    for number in range(source.splits[split]):
        found = source.read(split, number)
        about = found.about
        if shards.is_plain(shards.Sample("", b"", None, about)):
            yield Drawing(f"{vendor}-{about['emoji']}", found.caption or "", about["category"], found.image)


def _write(folder: Path, name: str, drawing: Drawing, backgrounds: Sequence[bytes], label: int) -> None:
    """Write an image and its masks. The name of the image determines the background and the place of the emoji."""
    image, opaque_SS = laid(drawing.png, backgrounds, np.random.default_rng(drawn("collage", name)))
    masks = {FOREGROUND: opaque_SS, CATEGORIES: label * opaque_SS}
    for path, content in {"images": image, **{f"masks/{m}": Image.fromarray(ids) for m, ids in masks.items()}}.items():
        file = folder / path / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        content.save(file)


def laid(png: bytes, backgrounds: Sequence[bytes], random: np.random.Generator) -> tuple[Image.Image, np.ndarray]:
    """Return an image of an emoji at a random place on a crop of a random background, and a mask of the emoji, uint8
    [S, S] with values 0 and 1. The centre of the emoji may be anywhere in the image, whose edges may cut off parts of
    the emoji. As a result, no position is covered by an emoji in most images; otherwise, the position of a patch would
    predict its class."""
    image = background(backgrounds, random)
    side = int(random.integers(EMOJI_SIDES[0], EMOJI_SIDES[1] + 1))
    left, top = (int(random.integers(SIDE)) - side // 2 for _ in range(2))
    # premultiplied, so that the colours of transparent pixels have no effect
    emoji = Image.open(io.BytesIO(png)).convert("RGBA").convert("RGBa")
    emoji = emoji.resize((side, side), Image.Resampling.BICUBIC).convert("RGBA")
    image.paste(emoji, (left, top), emoji)
    alpha = Image.new("L", (SIDE, SIDE))
    alpha.paste(emoji.getchannel("A"), (left, top))
    return image, (np.asarray(alpha) >= OPAQUE).astype(np.uint8)


def background(images: Sequence[bytes], random: np.random.Generator) -> Image.Image:
    """Return a random crop of one of the images, S x S: the first crop that is not mainly white, or the one with the
    fewest white pixels."""
    crops = []
    for _ in range(TRIES):
        image = Image.open(io.BytesIO(images[random.integers(len(images))])).convert("RGB")
        side = round(random.uniform(*CROPPED) * min(image.size))
        left, top = (int(random.integers(each - side + 1)) for each in image.size)
        crop = image.crop((left, top, left + side, top + side)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        crops.append((float((np.asarray(crop).min(2) >= WHITE).mean()), crop))
        if crops[-1][0] <= MOST_WHITE:
            return crop
    return min(crops, key=lambda each: each[0])[1]
