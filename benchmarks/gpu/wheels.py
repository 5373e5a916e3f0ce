"""python -m benchmarks.gpu.wheels [--python 3.12] [--download FOLDER]: what the trainer needs beside torch, triton and
numpy; and their wheels, to be carried to a machine without network: pip install --no-index --find-links FOLDER ..."""

from __future__ import annotations

import argparse
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.alone import ROOT

THERE = ("torch", "torchvision", "triton", "numpy")  # a machine with a GPU has its own, built for its driver


def needed() -> list[str]:
    """Return the requirements of pyproject.toml's dependencies and extra `train`, but for what such a machine has."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lists = re.findall(r"^(?:dependencies|train) = \[(.*?)\]$", text, re.DOTALL | re.MULTILINE)
    found = re.findall(r'"([^"]+)"', "".join(lists))
    return [line for line in found if re.split(r"[^\w.-]", line)[0].lower() not in THERE]


def commands(packages: Sequence[str], python: str, folder: Path) -> list[list[str]]:
    """Return the commands that fill `folder`: DeepSpeed, which comes as source alone, is built here; of everything that
    it and the others need, wheels for that Python are downloaded, but for what such a machine has."""
    pip = [sys.executable, "-m", "pip"]
    sources = [line for line in packages if line.startswith("deepspeed")]
    wheels = [line for line in packages if line not in sources] + [*DEEPSPEED_NEEDS]
    abi = "cp" + python.replace(".", "")
    target = ["--only-binary", ":all:", "--python-version", python, "--implementation", "cp", "--abi", abi]
    target += ["--abi", "abi3", "--abi", "none"]
    machine = platform.machine()
    for tag in (f"manylinux_2_28_{machine}", f"manylinux2014_{machine}"):
        target += ["--platform", tag]
    built = [[*pip, "wheel", "--no-deps", "--wheel-dir", str(folder), line] for line in sources]
    return [*built, [*pip, "download", "--dest", str(folder), *target, *wheels]]


# What DeepSpeed asks for, which pip does not learn from a wheel that it did not download; but for torch and numpy.
DEEPSPEED_NEEDS = ("einops", "hjson", "msgpack", "ninja", "packaging", "psutil", "py-cpuinfo", "pydantic>=2", "tqdm")


def main(arguments: list[str] | None = None) -> int:
    """Print the list, or download; return the exit code of pip."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.wheels", description=__doc__.split(":")[1].strip())
    own = f"{sys.version_info.major}.{sys.version_info.minor}"
    parser.add_argument("--python", default=own, metavar="VERSION", help=f"of the other machine (default {own})")
    parser.add_argument("--download", type=Path, metavar="FOLDER", help="where to put the wheels")
    args = parser.parse_args(arguments)
    if not re.fullmatch(r"3\.\d+", args.python):
        parser.error(f"--python {args.python}: such as 3.12")
    if args.download is None:
        print("\n".join(needed()))
        return 0
    for command in commands(needed(), args.python, args.download):
        print("+ " + " ".join(command), flush=True)
        if code := subprocess.call(command):
            return code
    print(f"there: pip install --no-index --find-links {args.download} --no-deps {args.download}/*.whl")
    return 0


if __name__ == "__main__":
    sys.exit(main())
