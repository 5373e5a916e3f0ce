"""Which file system a folder is on."""

from __future__ import annotations

from pathlib import Path

import psutil

_NETWORK = ("nfs", "lustre", "gpfs", "ceph", "cifs", "smb", "beegfs", "wekafs", "afs", "panfs", "fuse.")
_LOCAL = ("fuse.fuse-overlayfs", "fuse.mergerfs")  # whose files are on disks of this machine


def network_file_system(path: Path) -> str:
    """Return the type of the file system that `path` is on, such as "nfs4", where it is one of a network; else ""."""
    own = path.resolve()
    mounts = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    kind = next((mounts[parent] for parent in (own, *own.parents) if parent in mounts), "")
    return kind if kind.startswith(_NETWORK) and kind not in _LOCAL else ""
