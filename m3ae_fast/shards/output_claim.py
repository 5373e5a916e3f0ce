"""Exclusive use of an output folder by a single conversion."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from m3ae_fast.base.errors import UserError
from m3ae_fast.base.untrusted_file import parse_json

MANIFEST, CLASSES = "conversion.json", "classes.json"


@contextmanager
def claimed(out: Path, manifest: dict[str, Any], classes: Sequence[str] | None) -> Iterator[None]:
    """Create the folder `out`, or reuse it if it contains shards with the same `manifest`, and lock it for this
    process. `classes`: names of the classes, which are written to classes.json; None: no such file. Raises UserError if
    the folder contains other files, is in use by another process, or cannot be written."""
    path, text = out / MANIFEST, manifest_text(manifest)
    try:
        if out.exists() and not out.is_dir():
            raise UserError(f"{out}: is a file; specify a folder for the shards")
        if out.exists() and any(out.iterdir()) and not path.exists():
            raise UserError(
                f"{out}: is not empty, and contains no shards of an earlier conversion; specify a new folder"
            )
        out.mkdir(parents=True, exist_ok=True)
        with open(path, "a+", encoding="utf-8") as file:
            try:  # the manifest itself is locked: filelock would leave an additional file among the shards
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{out}: another process is writing shards to it; specify another folder") from None
            file.seek(0)
            before = file.read()
            if before and before != text:
                reason = _difference(before, manifest)
                raise UserError(
                    f"{out}: contains shards of another conversion ({reason}); specify a new folder, or remove this one"
                )
            if not before:
                file.write(text)
                file.flush()
            if classes is not None:
                (out / CLASSES).write_text(
                    json.dumps(list(classes), indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
                )
            yield
    except OSError as error:
        raise UserError(
            f"{out}: cannot be written ({error.strerror or error}); complete shards are kept: "
            "to continue, run the same command again"
        ) from None


def manifest_text(manifest: dict[str, Any]) -> str:
    """Return the content of conversion.json."""
    return json.dumps(manifest, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _difference(before: str, manifest: dict[str, Any]) -> str:
    try:
        was = parse_json(before)
        for part, values in manifest.items():
            for key, value in values.items():
                if was[part].get(key) != value:
                    return f"{key} was {was[part].get(key)!r} and is now {value!r}"
    except (ValueError, LookupError, AttributeError, TypeError):
        pass
    return f"its {MANIFEST} differs"
