"""A file in a shard that is being written."""

from __future__ import annotations

import io
import tarfile


def add_member(shard: tarfile.TarFile, name: str, content: bytes) -> None:
    """Write a file into a shard. Its header holds name and size alone, so that equal samples give equal bytes."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    shard.addfile(member, io.BytesIO(content))
