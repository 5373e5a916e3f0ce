"""Interpretation of the sub-folders of a folder of images as splits, such as train/ and val/, and classes.

The folders at some depth are splits if all of them have names of splits: `root/train/CLASS` and `root/val/CLASS`, as
for torchvision's ImageFolder, but also `root/CLASS/train` or `root/images/train2017`. Of the other folders, the
uppermost are the classes. A folder called "test" is a class, and not a split, if the folders next to it are classes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from m3ae_fast.base.errors import UserError

TRAIN, VAL, TEST = "train", "val", "test"
# usual names of held-out splits, in order of preference for evaluation
HELD_OUT = (VAL, "validation", "valid", "dev", TEST, "testing")
_FOLDERS = {TRAIN: TRAIN, "training": TRAIN, VAL: VAL, "valid": VAL, "validation": VAL, "dev": VAL}
_FOLDERS |= {TEST: TEST, "testing": TEST}
_LETTER = r"[^\W\d_]"
_HELD_OUT = re.compile(rf"(?<!{_LETTER})(val|valid|validation|test)(?!{_LETTER})", re.IGNORECASE)
_SHOWN = 5  # number of names in a message


def split_of_folder(name: str) -> str | None:
    """Return the split of a folder if the letters in its name form the name of a split, as in Val or train2017;
    otherwise None."""
    return _FOLDERS.get("".join(filter(str.isalpha, name)).lower())


def split_of_file(name: str) -> str | None:
    """Return VAL or TEST if a file's name contains val, valid, validation or test as a word, as in food-val-0.tar; VAL
    if it contains both; None for other names. A word is delimited by any characters except letters."""
    words = {word.lower() for word in _HELD_OUT.findall(name)}
    return None if not words else TEST if words == {TEST} else VAL


@dataclass(frozen=True)
class Layout:
    """The split and class of each directory. `notes`: notes for the user."""

    splits: dict[str, str]  # split of the images in each directory; directories outside all splits are missing
    names: dict[str, str | None]  # class of the images in each directory
    classes: list[str] | None  # None: the folders are not classes
    notes: list[str] = field(default_factory=list)
    outside: str | None = None  # a directory whose images are in no class folder, although other images are


def understand(root: str, directories: Collection[str], known: Sequence[str] | None, flat: bool) -> Layout:
    """Return the layout of a folder.

    Args:
        root: path of the folder, which is shown in messages. If this folder itself is named val, its images form the
            split val.
        directories: the directories that contain images, relative to `root`; "" for `root` itself.
        known: the classes in the order of their labels; None: the sorted names of the folders.
        flat: whether to ignore the meaning of sub-folders as splits and classes.

    Raises:
        UserError: split folders and other folders are mixed at one level, or folders are not among the `known` classes.
    """
    own = os.path.basename(os.path.abspath(root))
    own_split = (own.lower() != "dev" and split_of_folder(own)) or TRAIN  # ~/dev is not a folder of held-out images
    if flat:
        return Layout(dict.fromkeys(directories, own_split), dict.fromkeys(directories), None)
    directories = sorted(directories)
    level = _level_of_splits(root, directories)
    if level is None:
        splits = dict.fromkeys(directories, own_split)
        inner = {directory: directory for directory in directories}
    else:
        parts = {directory: directory.split("/") for directory in directories if directory}
        splits = {directory: split_of_folder(names[level]) or TRAIN for directory, names in parts.items()}
        inner = _without_wrapper({each: "/".join(names[:level] + names[level + 1 :]) for each, names in parts.items()})
    names = {directory: below.partition("/")[0] or None for directory, below in inner.items()}
    found: dict[str, set[str | None]] = {split: set() for split in splits.values()}
    for directory, split in splits.items():
        found[split].add(names[directory])
    return _with_classes(root, splits, names, found, known)


def _level_of_splits(root: str, directories: Collection[str]) -> int | None:
    """Return the depth at which folders are splits; None if there are no splits."""
    nested = [directory.split("/") for directory in directories if directory]
    for level in range(min(map(len, nested), default=0)):
        names = {parts[level] for parts in nested}
        kinds = {split_of_folder(name) for name in names}
        is_divided = TRAIN in kinds and len(kinds - {TRAIN, None}) > 0
        if None not in kinds:
            if is_divided or (len(kinds) == len(names) and "" not in directories):
                return level
        elif is_divided and not level:
            splits = [name for name in names if split_of_folder(name)]
            raise UserError(
                f"{root}: {listed(splits)} are names of splits, but other folders are next to them "
                f"({listed(names - {*splits})}); move the others elsewhere, or rename the splits if they are classes"
            )
    return None


def _without_wrapper(inner: dict[str, str]) -> dict[str, str]:
    """Return the directories' paths without the outer folders that contain all images."""
    common = os.path.commonpath(list(inner.values())) if all(inner.values()) else ""
    return {each: below[len(common) :].lstrip("/") for each, below in inner.items()}


def _with_classes(
    root: str,
    splits: dict[str, str],
    names: dict[str, str | None],
    found: dict[str, set[str | None]],
    known: Sequence[str] | None,
) -> Layout:
    """Return the layout. Folders are classes if there are at least two of them, and if every split that has class
    folders has all of its images in such folders."""
    order = [split for split in (TRAIN, VAL, TEST) if split in found]
    splits = {each: splits[each] for split in order for each in splits if splits[each] == split}
    used = sorted({name for own in found.values() for name in own if name is not None})
    mixed = next((each for each in splits if names[each] is None and len(found[splits[each]]) > 1), None)
    if known is not None:
        unknown = [name for name in used if name not in known]
        if unknown or mixed is not None or not used:
            wrong = f"the folder {unknown[0]!r}, which is not a class" if unknown else "images outside class folders"
            raise UserError(f"--classes: {root} contains {wrong}; move each image into the folder of a class")
    elif mixed is not None or len(used) < 2:
        return Layout(splits, dict.fromkeys(names), None, outside=mixed)
    split_like = [name for name in used if split_of_folder(name)] if len(order) == 1 else []
    notes = [f"{name} is interpreted as a class, like the folders next to it" for name in split_like]
    if bare := [split for split in order if found[split] == {None}]:
        notes.append(f"the images of {listed(bare)} have no class, because they are not in class folders")
    labelled = [split for split in order if split not in bare]
    for split in labelled if len(labelled) > 1 else ():
        others = {name for other in labelled if other != split for name in found[other]}
        if own := sorted(name for name in found[split] if name is not None and name not in others):
            notes.append(f"only {split} has the class{'es' * (len(own) > 1)} {listed(own)}")
    return Layout(splits, names, list(known) if known is not None else used, notes)


def listed(names: Iterable[str]) -> str:
    """Return the names as a comma-separated list; only the first few if there are many."""
    names = sorted(map(printable, names))
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def printable(path: str) -> str:
    """Return a path as text, with a replacement character for bytes that are not UTF-8."""
    return os.fsencode(path).decode("utf-8", "replace")
