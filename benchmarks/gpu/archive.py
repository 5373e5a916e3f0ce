"""Packing of the records, logs and tables of all stages into one small archive, which can be copied to another machine
and back. Compiler caches, shards and traces are left out."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

ARCHIVE = "records.tar.gz"
RECORD = "record.json"
KINDS = (".json", ".jsonl", ".txt")
LARGEST = 8 << 20  # maximum size of a file in bytes; of a larger log, only the end is kept


def pack(folder: Path) -> Path:
    """Write the archive of `folder` atomically, and return its path."""
    path, partial = folder / ARCHIVE, folder / f".{ARCHIVE}"
    with tarfile.open(partial, "w:gz") as archive:
        for record in sorted(folder.glob(f"*/{RECORD}")):
            for file in sorted(record.parent.rglob("*")):
                if file.is_file() and file.suffix in KINDS:
                    with file.open("rb") as content:
                        info = archive.gettarinfo(arcname=str(file.relative_to(folder)), fileobj=content)
                        if info.size > LARGEST:
                            content.seek(-LARGEST, os.SEEK_END)
                            info.size = LARGEST
                        archive.addfile(info, content)
    partial.replace(path)
    return path


def unpack(folder: Path) -> list[str]:
    """Extract the stages in the archive of `folder` that have no record in the folder, and return their names."""
    path = folder / ARCHIVE
    if not path.exists():
        return []
    with tarfile.open(path) as archive:
        there = {record.parent.name for record in folder.glob(f"*/{RECORD}")}
        members = [member for member in archive.getmembers() if Path(member.name).parts[0] not in there]
        for member in members:
            target, content = folder / member.name, archive.extractfile(member)
            if content is None or not target.resolve().is_relative_to(folder.resolve()):
                raise ValueError(f"{path} has a member {member.name}, which no stage writes")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content.read())  # before Python 3.11.4, extractall has no filter
            os.utime(target, (member.mtime, member.mtime))  # the latest tuning takes precedence
    return sorted({Path(member.name).parts[0] for member in members})
