"""The program `m3ae-fast` (or `python -m m3ae_fast`), which runs one of its commands, or lists them."""

from __future__ import annotations

import runpy
import sys

from m3ae_fast.base.environment import configure_libraries
from m3ae_fast.base.errors import exit_cleanly

COMMANDS = {
    "pretrain": "train a model on your images with one command: make shards, choose settings, train, evaluate, export",
    "train": "train a model on shards with a config; on several GPUs: torchrun --nproc-per-node N -m m3ae_fast train",
    "shards": "make shards from folders, HDF5 files and Hugging Face datasets; index them; train a tokenizer",
    "embed": "write the features of shards or of a folder of images as .npz or .parquet",
    "neighbours": "find the images of a folder that are most similar to an image",
    "evaluate": "evaluate a model: k-NN, linear probe, fine-tuning, segmentation, out-of-distribution, ...",
    "draw": "draw reconstructions and attention maps of a run or of an exported model",
    "convert": "convert weights (of a run, official M3AE or MAE, or timm) to a folder, to timm's format, or to ONNX",
    "report": "print the status of a run, and write its curves, figures and results to a page, report.html",
}
DEVELOPER_TOOLS = {"verify": "compare the model with golden files of the official implementation"}
_HELP = ("-h", "--help", "help")
MODULES = {name: f"m3ae_fast.cli.{name}" for name in (*COMMANDS, *DEVELOPER_TOOLS)} | {"train": "m3ae_fast.train"}


def usage() -> str:
    """Return the list of commands."""
    width = max(map(len, MODULES))

    def lines(commands: dict[str, str]) -> list[str]:
        return [f"  {name:{width}}  {what}" for name, what in commands.items()]

    first = [
        "usage: m3ae-fast COMMAND [OPTIONS]   (or python -m m3ae_fast COMMAND [OPTIONS])",
        "       m3ae-fast --version",
        "",
        "Begin with `m3ae-fast pretrain photos/ --out run`. Each command has its own --help.",
    ]
    return "\n".join([*first, "", *lines(COMMANDS), "", "developer tools:", *lines(DEVELOPER_TOOLS)])


def run() -> int:
    """Run the command that sys.argv names, and return the exit status."""
    return exit_cleanly(_run)


def _run() -> int:
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in _HELP:
        words = [word for word in sys.argv[2:] if word not in _HELP]
        if words:  # such as `m3ae-fast help train`
            sys.argv = [sys.argv[0], *words, "--help"]
            return _run()
        print(usage())
        return 0
    if name == "--version":
        from m3ae_kernels.version import __version__

        print(f"m3ae-fast {__version__}")
        return 0
    if name not in MODULES:
        from m3ae_fast.cli.command_line import refuse

        refuse(f"there is no command {name!r}; m3ae-fast --help lists the commands")
    configure_libraries()
    is_module = any(pair == ("-m", "m3ae_fast") for pair in zip(sys.orig_argv, sys.orig_argv[1:]))
    sys.argv = [f"{'python -m m3ae_fast' if is_module else 'm3ae-fast'} {name}", *sys.argv[2:]]
    runpy.run_module(MODULES[name], run_name="__main__", alter_sys=False)
    return 0


if __name__ == "__main__":
    sys.exit(run())
