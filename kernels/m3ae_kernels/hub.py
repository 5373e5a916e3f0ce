"""Write the library in the layout that Hugging Face's `kernels` package loads from the Hub or from a folder.

    python -m m3ae_kernels.hub FOLDER

writes FOLDER/build/torch-universal, which contains no compiled code and supports every backend of torch. Upload FOLDER
as it is, or try it with `kernels.get_local_kernel(Path(FOLDER))`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from pathlib import Path

from .version import __version__

NAME = "m3ae-kernels"
VARIANT = Path("build", "torch-universal")


def write(folder: Path) -> Path:
    """Write the build variant below `folder` and return its path.

    Raises:
        FileExistsError: the path already exists.
    """
    package = Path(__file__).parent
    variant = folder / VARIANT
    own = variant / NAME.replace("-", "_")
    shutil.copytree(package, own, ignore=shutil.ignore_patterns("__pycache__"))
    metadata = {
        # The import name of the copy is unique, so that several versions can be used in one process.
        "id": f"{own.name}_{_digest(own)}",
        "name": NAME,
        "version": int(__version__.split(".")[0]),
        "license": "MIT",
        "python-depends": [],
        "backend": {"type": "cpu"},
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    return variant


def _digest(folder: Path) -> str:
    """Return a digest of the names and contents of all files."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            total.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return total.hexdigest()[:12]


def main(arguments: list[str] | None = None) -> int:
    """Write the build variant, print its path, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m m3ae_kernels.hub", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder to which build/ is written")
    args = parser.parse_args(arguments)
    try:
        print(write(args.folder))
    except OSError as error:
        parser.error(f"{args.folder} cannot be written: {error.strerror}: {error.filename}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
