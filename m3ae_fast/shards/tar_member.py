"""Adding files to a shard that is being written."""

from __future__ import annotations

import io
import tarfile


def add_member(shard: tarfile.TarFile, name: str, content: bytes) -> None:
    """Write a file to a shard. Its header contains only its name and size, so that equal samples give equal bytes."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    shard.addfile(member, io.BytesIO(content))
