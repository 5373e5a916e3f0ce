"""The image files below a folder, and the .txt files and label masks that belong to them."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from m3ae_fast.base.bad_samples import BadSample
from m3ae_fast.base.errors import UserError
from m3ae_fast.images.bands import ReaderMissing
from m3ae_fast.images.decoding import own_bands
from m3ae_fast.images.suffixes import is_image, listed_suffixes
from m3ae_fast.shards.sources.folder_layout import listed, printable, split_of_folder
from m3ae_fast.shards.sources.interface import read_file


def find_files(folder: str, flat: bool = False) -> Iterator[str]:
    """Yield the paths of files below `folder`, except hidden files. Links to folders are followed, because two classes
    may be links to the same folder. Within a class or split, each folder is visited only once, because links may form a
    cycle. Raises UserError if a folder cannot be listed."""
    seen = set()
    for parent, folders, files in os.walk(folder, onerror=_refuse, followlinks=True):
        real, below = os.path.realpath(parent), os.path.relpath(parent, folder)
        top = below.split("/")
        place = ("" if flat else "/".join(top[: 2 if split_of_folder(top[0]) else 1]), real)
        if place in seen or (below != "." and real == os.path.realpath(folder)):
            folders.clear()
            continue
        seen.add(place)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            if not name.startswith("."):
                yield os.path.relpath(os.path.join(parent, name), folder)


def _refuse(error: OSError) -> None:
    raise UserError(f"{error.filename}: cannot be listed ({error.strerror})")


def find_images(folder: Path, masks: Path | None, flat: bool) -> tuple[list[str], list[str]]:
    """Return the sorted paths of all files below a folder except the masks, and the sorted paths of the images. Raises
    UserError if there is no image, or if a library that is needed to read the images is not installed."""
    files = sorted(find_files(str(folder), flat))
    if masks is not None:
        own = os.path.relpath(os.path.realpath(masks), os.path.realpath(folder)) + os.sep
        files = [path for path in files if not path.startswith(own)]
    images = [path for path in files if is_image(path)]
    if not images:
        raise UserError(f"{folder}: contains no images ({listed_suffixes()})")
    _require_reader(str(folder), images)
    return files, images


def _require_reader(folder: str, paths: Sequence[str]) -> None:
    """Raise UserError if the first TIFF can be read only by tifffile, and tifffile is not installed."""
    first = next((path for path in paths if path.lower().endswith((".tif", ".tiff"))), None)
    if first is None:
        return
    try:
        own_bands(read_file(os.path.join(folder, first)))
    except ReaderMissing as error:
        raise UserError(f"{folder}/{printable(first)}: {error}") from None
    except BadSample:
        pass  # an invalid file is reported later, together with all others


def find_texts(images: Sequence[str], files: Collection[str]) -> dict[str, str]:
    """Return the path of NAME.txt or NAME.TXT next to NAME.jpg, by image, for the images that have one. `files`: paths
    of all files. A broken link is included, because it was meant to be a caption."""
    texts = {path for path in files if path.endswith((".txt", ".TXT"))}
    found = {}
    for image in images:
        stem = os.path.splitext(image)[0]
        if text := next((stem + end for end in (".txt", ".TXT") if stem + end in texts), None):
            found[image] = text
    return found


def mask_of(masks: Path, image: str) -> Path:
    """Return the path of an image's label mask in the folder `masks`. `image`: path of the image relative to the folder
    of images."""
    return masks / (os.path.splitext(image)[0] + ".png")


def missing_masks(masks: Path, images: Sequence[str]) -> list[str]:
    """Return a list that contains a note if some images have no mask. Raises UserError if no image has a mask."""
    missing = [path for path in images if not os.path.lexists(mask_of(masks, path))]
    if len(missing) == len(images):
        raise UserError(
            f"--masks {masks}: contains no mask for any of the images; an expected path is, for example, "
            f"{printable(str(mask_of(masks, images[0])))}"
        )
    if not missing:
        return []
    return [f"{len(missing):,} of {len(images):,} images, such as {printable(missing[0])}, have no mask in {masks}"]


def linked_and_empty(folder: str, directories: Collection[str]) -> Iterator[str]:
    """Yield a note if links make several directories of images the same folder, and a note if there are folders without
    images next to folders with images."""
    first: dict[str, str] = {}
    again = {}
    for directory in sorted(directories, key=lambda each: (os.path.islink(os.path.join(folder, each)), each)):
        kept = first.setdefault(os.path.realpath(os.path.join(folder, directory)), directory)
        if kept != directory:
            again[directory] = kept
    if again:
        link, kept = next(iter(again.items()))
        more = f"; the same applies to {listed([*again][1:])}" if len(again) > 1 else ""
        yield f"{printable(link)} links to {printable(kept)}, so its images count twice{more}"
    filled = set(directories)
    for directory in directories:
        while directory := os.path.dirname(directory):
            filled.add(directory)
    found = []
    for parent in {os.path.dirname(each) for each in filled if each}:
        with os.scandir(os.path.join(folder, parent)) as entries:
            names = [each.name for each in entries if each.is_dir(follow_symlinks=False) and each.name[0] != "."]
        found += [path for path in (os.path.join(parent, name) for name in names) if path not in filled]
    if found:
        yield f"{listed(found)}: no images, although neighbouring folders have some"
