"""Published sets of corrupted images, such as ImageNet-C, with a folder of shards for each corruption and severity."""

from __future__ import annotations

from pathlib import Path

from m3ae_fast.base.errors import UserError

_LAYOUT = "CORRUPTION/SEVERITY/*.tar, with severities from 1 to 5, such as gaussian_noise/1/val-00000.tar"


def published_sets(folder: Path) -> dict[str, dict[int, list[str]]]:
    """Return the shards by corruption and severity, both sorted. Folders of corruptions may be grouped, as in the
    archives of ImageNet-C: noise/gaussian_noise/1. Raises UserError if there are no corruptions, or if a severity has
    no shards."""
    if not folder.is_dir():
        raise UserError(f"--corrupted {folder}: no such folder; expected a folder with shards in {_LAYOUT}")
    found: dict[str, dict[int, list[str]]] = {}
    for path in sorted([*folder.glob("*/[1-5]"), *folder.glob("*/*/[1-5]")]):
        shards = sorted(map(str, path.glob("*.tar")))
        if not shards:
            raise UserError(f"--corrupted {folder}: {path} has no shards; make them from a folder of images")
        if path.name in map(str, found.get(kind := path.parent.name, ())):
            raise UserError(
                f"--corrupted {folder}: has two folders for {kind} at severity {path.name}, one of which is {path}"
            )
        found.setdefault(kind, {})[int(path.name)] = shards
    if not found:
        raise UserError(f"--corrupted {folder}: has no shards of the form {_LAYOUT}")
    return found
