"""Download of packages with the clients of their registries, and reading of their files."""

from __future__ import annotations

import hashlib
import io
import subprocess
import tarfile
from pathlib import Path
from typing import IO

from m3ae_fast.base.errors import UserError

HELD_OUT = 0.2  # fraction of the emoji, and of the families of icons, that are held out
_AR, _HEADER = b"!<arch>\n", 60  # magic number, and bytes of a member's header


def fetch(command: list[str], folder: Path, suffix: str) -> Path:
    """Run a client in `folder`, and return the path of the downloaded package with this suffix. Raises UserError if the
    client fails."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except OSError as error:
        raise UserError(
            f"{command[0]}: {error.strerror}; get the package elsewhere and pass it with --package"
        ) from None
    found = sorted(folder.glob(f"*{suffix}"))
    if done.returncode or not found:
        reason = (done.stderr.strip() or f"wrote no {suffix} file").splitlines()[-1][:200]
        raise UserError(f"{' '.join(command)}: {reason}; get the package elsewhere and pass it with --package")
    return found[-1]


def read_members(package: Path, folder: str, suffix: str) -> dict[str, bytes]:
    """Return the files in a Debian package or a tar that are below `folder` and have the suffix, by their path relative
    to `folder`.

    Raises:
        UserError: the package cannot be read, or contains no such file.
    """
    try:
        with open(package, "rb") as file, tarfile.open(fileobj=_tar_of(file)) as tar:
            inside = [m for m in tar if m.isfile() and m.name.removeprefix("./").startswith(f"{folder}/")]
            wanted = {
                m.name.removeprefix("./").removeprefix(f"{folder}/"): m for m in inside if m.name.endswith(suffix)
            }
            found = {name: content.read() for name, m in wanted.items() if (content := tar.extractfile(m))}
    except (OSError, EOFError, tarfile.TarError, ValueError) as error:
        raise UserError(f"{package}: cannot be read ({error}); download it again") from None
    if not found:
        raise UserError(f"{package}: has no {folder}/*{suffix}; it is a different package or version")
    return found


def is_held_out(group: str) -> bool:
    """Return whether the samples of this group, such as an emoji's code points, are held out."""
    return int.from_bytes(hashlib.blake2b(group.encode(), digest_size=8).digest(), "big") < HELD_OUT * 2**64


def _tar_of(file: IO[bytes]) -> IO[bytes]:
    """Return the tar with the files of a Debian package, which is the last member of an ar archive; other files are
    returned unchanged."""
    if file.read(len(_AR)) != _AR:
        file.seek(0)
        return file
    while header := file.read(_HEADER):
        name, size = header[:16].decode().strip(), int(header[48:58])
        if name.startswith("data.tar"):
            return io.BytesIO(file.read(size))
        file.seek(size + size % 2, io.SEEK_CUR)
    raise ValueError("no data.tar in it")
