"""Fetches packages with the clients of their registries, and reads the files in them."""

from __future__ import annotations

import io
import subprocess
import tarfile
from pathlib import Path
from typing import IO

from m3ae_fast.base.errors import UserError

_AR, _HEADER = b"!<arch>\n", 60  # bytes


def fetch(command: list[str], folder: Path, suffix: str) -> Path:
    """Run a client in `folder` and return the package, of this suffix, that it leaves there. Raises UserError if it
    fails."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except OSError as error:
        raise UserError(
            f"{command[0]}: {error.strerror}; get the package elsewhere and name it with --package"
        ) from None
    found = sorted(folder.glob(f"*{suffix}"))
    if done.returncode or not found:
        told = (done.stderr.strip() or f"leaves no {suffix}").splitlines()[-1][:200]
        raise UserError(f"{' '.join(command)}: {told}; get the package elsewhere and name it with --package")
    return found[-1]


def read_members(package: Path, folder: str, suffix: str) -> dict[str, bytes]:
    """Return the files below `folder` whose names end so, by their path in it: of a Debian package, or of a tar.

    Raises:
        UserError: the package cannot be read, or has none.
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
        raise UserError(f"{package}: has no {folder}/*{suffix}; it is another package, or another version of it")
    return found


def _tar_of(file: IO[bytes]) -> IO[bytes]:
    """Return the tar of a Debian package's files, which is an ar archive's last member; any other file as it is."""
    if file.read(len(_AR)) != _AR:
        file.seek(0)
        return file
    while header := file.read(_HEADER):
        name, size = header[:16].decode().strip(), int(header[48:58])
        if name.startswith("data.tar"):
            return io.BytesIO(file.read(size))
        file.seek(size + size % 2, io.SEEK_CUR)
    raise ValueError("no data.tar in it")
