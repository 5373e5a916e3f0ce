"""python -m benchmarks.gpu.wheels [--python 3.12] [--download FOLDER]: lists the requirements of the trainer that a
container image with torch lacks, or downloads their wheels with all dependencies (5 MB) for a machine without network:
pip install --no-index --no-deps FOLDER/*.whl"""

from __future__ import annotations

import argparse
import platform
import re
import subprocess
import sys
import zipfile
from collections.abc import Collection
from email.parser import HeaderParser
from pathlib import Path

from benchmarks.alone import ROOT

# packages that container images with torch contain: torch, in the version for the image's driver, and its dependencies
THERE = {
    "torch", "torchvision", "triton", "numpy", "einops", "filelock", "fsspec", "huggingface_hub", "jinja2",
    "matplotlib", "msgpack", "ninja", "packaging", "pillow", "psutil", "py-cpuinfo", "pyarrow", "pyyaml", "rich",
    "safetensors", "tensorboard", "tokenizers", "tqdm", "typing-extensions",
}  # fmt: skip


def needed(also: Collection[str] = ()) -> list[str]:
    """Return the requirements in pyproject.toml's dependencies and its extra `train`, without the packages in `THERE`
    that are not in `also`."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lists = re.findall(r"^(?:dependencies|train) = \[(.*?)\]$", text, re.DOTALL | re.MULTILINE)
    found = re.findall(r'"([^"]+)"', "".join(lists))
    return [line for line in found if _name(line) not in THERE or _name(line) in also]


def download(folder: Path, python: str, also: Collection[str] = ()) -> int:
    """Download wheels for a version of Python to `folder`. Return 0, or the exit code of the first call of pip that
    fails."""
    folder.mkdir(parents=True, exist_ok=True)
    todo, done = needed(also), THERE - set(also)
    while todo:
        line = todo.pop(0)
        if _name(line) in done:
            continue
        done.add(_name(line))
        before = set(folder.iterdir())
        command = _command(line, python, folder)
        print("+ " + " ".join(command), flush=True)
        if code := subprocess.call(command):
            return code
        for wheel in set(folder.iterdir()) - before:
            todo += _requirements(wheel, python)
    return 0


def _command(line: str, python: str, folder: Path) -> list[str]:
    """Return the command that obtains the wheel of one requirement. DeepSpeed, which is published only as source, is
    built."""
    pip = [sys.executable, "-m", "pip"]
    if _name(line) == "deepspeed":
        return [*pip, "wheel", "--no-deps", "--wheel-dir", str(folder), line]
    target = ["--only-binary", ":all:", "--python-version", python, "--implementation", "cp"]
    target += ["--abi", "cp" + python.replace(".", ""), "--abi", "abi3", "--abi", "none"]
    for tag in ("manylinux_2_28", "manylinux2014"):
        target += ["--platform", f"{tag}_{platform.machine()}"]
    return [*pip, "download", "--no-deps", "--dest", str(folder), *target, line]


def _requirements(wheel: Path, python: str) -> list[str]:
    """Return the requirements of a wheel on Linux, without its extras."""
    from packaging.requirements import Requirement

    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
        headers = HeaderParser().parsestr(archive.read(metadata).decode())
    found = map(Requirement, headers.get_all("Requires-Dist", []))
    there = {"python_version": python, "platform_system": "Linux", "sys_platform": "linux", "extra": ""}
    return [f"{need.name}{need.specifier}" for need in found if not need.marker or need.marker.evaluate(there)]


def _name(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement)[0].lower()


def main(arguments: list[str] | None = None) -> int:
    """Print the list or download the wheels, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.wheels", description=__doc__.split(":")[1].strip())
    own = f"{sys.version_info.major}.{sys.version_info.minor}"
    parser.add_argument(
        "--python", default=own, metavar="VERSION", help=f"Python version of the other machine (default: {own})"
    )
    parser.add_argument("--download", type=Path, metavar="FOLDER", help="folder to which the wheels are downloaded")
    parser.add_argument(
        "--also",
        nargs="+",
        default=(),
        choices=sorted(THERE),
        metavar="NAME",
        help="further packages that the other machine lacks",
    )
    args = parser.parse_args(arguments)
    if not re.fullmatch(r"3\.\d+", args.python):
        parser.error(f"--python {args.python}: must be a version such as 3.12")
    if args.download is None:
        print("\n".join(needed(args.also)))
        return 0
    if code := download(args.download, args.python, args.also):
        return code
    print(f"on the other machine: pip install --no-index --no-deps {args.download}/*.whl")
    return 0


if __name__ == "__main__":
    sys.exit(main())
