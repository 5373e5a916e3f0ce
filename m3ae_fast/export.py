"""python -m m3ae_fast.export RUN OUT: the weights of a run as a folder that M3AE.from_pretrained(OUT) loads.

It holds model.safetensors, config.json, the tokenizer, how images are prepared, and a model card.

  --weights last     of a run with train.ema the last weights, not their moving average
  --format timm      the image encoder alone, for timm.create_model("local-dir:OUT", pretrained=True)
  --format onnx      the image encoder alone, as the files OUT, which ends in .onnx, and OUT's name with .int8.onnx
                     With --train and --val, labelled shards: the k-NN accuracy of both beside torch's, and images/s
  --push OWNER/NAME  also uploads OUT to the Hugging Face hub (log in with `hf auth login` first)
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m3ae_fast.command_line import add_labels, program
from m3ae_fast.errors import UserError, exit_cleanly

if TYPE_CHECKING:  # torch is imported by what needs it, not by --help
    from m3ae_fast.open_model import SavedRun
    from m3ae_fast.weights.pretrained import Pretrained

# sections of the config that the card shows; the others name this machine's folders
_SHOWN = ("masking", "loss", "optim", "train")


def export(
    run: str | Path, out: str | Path, format: str = "m3ae", name: str | None = None, weights: str = "average"
) -> Pretrained:
    """Write float32 weights of a run (its last checkpoint) or of one checkpoint to the folder `out`.

    Args:
        run: a run folder or a checkpoint, or an export, to change its format or to push it.
        out: a new folder, or an earlier export, which is replaced.
        format: "m3ae", "timm" for the image encoder as timm's VisionTransformer, or "onnx" for that as the file `out`.
        name: what the model card calls the model; None: as the folder.
        weights: "average", of a run with `train.ema`, or "last".

    Returns:
        What was read.

    Raises:
        UserError: there is no checkpoint, it is damaged, or `out` cannot be written.
    """
    from m3ae_fast.open_model import is_run, run_weights, saved_run
    from m3ae_fast.weights.card import model_card
    from m3ae_fast.weights.output_folder import CONFIG_FILE
    from m3ae_fast.weights.pretrained import write_pretrained

    if not is_run(Path(run)) and (Path(run) / CONFIG_FILE).is_file():
        found, about = _read_export(run), ""
    else:
        saved, average = saved_run(Path(run)), weights == "average"
        found, about = run_weights(saved, average=average), _run_section(saved, average)
    if format != "m3ae" and found.config.resize == "native":
        size = found.config.image_size
        square = f"it takes square images of {size} x {size} pixels; images of other shapes need format m3ae"
        found = replace(found, notes=(*found.notes, square))
    if format == "onnx":
        from m3ae_fast.convert.onnx_model import write_onnx

        files = write_onnx(out, found.config, found.state)
        return replace(found, notes=(*found.notes, *map(str, files)))
    if format == "timm":
        from m3ae_fast.convert.timm_model import write_timm

        write_timm(out, found.config, found.state)
    else:
        card = model_card(name or Path(out).resolve().name, found.config, about)
        write_pretrained(out, found, card)
    return found


def _read_export(folder: str | Path) -> Pretrained:
    import torch

    from m3ae_fast.model.m3ae import M3AE
    from m3ae_fast.weights.pretrained import check_weights, read_pretrained

    found = replace(read_pretrained(folder), kind=f"export {folder}")
    with torch.device("meta"):
        check_weights(M3AE(found.config), found.state, str(folder))
    return found


def _run_section(run: SavedRun, average: bool) -> str:
    """Return Markdown: data, steps, the last metrics up to this checkpoint, settings. `average`: of which weights."""
    info, config = run.info, run.info.config
    data = [f"- `{_public(shards)}`" for shards in _shards(config.get("data") or {})]
    lines = ["## Training", "", f"{info.step:,} steps, {info.samples:,} samples seen, of", "", *data, ""]
    if average and run.ema:
        what = f"a moving average with decay {run.ema:g}; the metrics are of the last weights"
        lines += [f"These weights are {what}.", ""]
    metrics = _last_metrics(run)
    if metrics:
        lines += ["| metric | value | after step |", "|---|--:|--:|"]
        lines += [f"| {name} | {value:.4g} | {step:,} |" for name, (value, step) in metrics.items()]
        lines.append("")
    versions = ", ".join(f"{name} {version}" for name, version in info.versions.items())
    settings = {name: config[name] for name in _SHOWN if name in config}
    if train := settings.get("train"):
        settings["train"] = {key: value for key, value in train.items() if key != "probe"}  # which names shards
    return "\n".join([*lines, f"With {versions}.", "", "```json", json.dumps(settings, indent=2), "```", ""])


def _shards(data: dict[str, Any]) -> list[str]:
    patterns = [source.get("shards", "") for source in data.get("train", [])]
    return [one for pattern in patterns for one in ([pattern] if isinstance(pattern, str) else pattern)]


def _public(shards: str) -> str:
    """Return what may be published of a pattern: the names of files on this machine, a URL without its user and query,
    and nothing of a command."""
    from m3ae_fast.data.shards import is_remote

    if shards.startswith("pipe:"):
        return "pipe:..."
    if "::" in shards:
        return "::".join(map(_public, shards.split("::")))
    if not is_remote(shards):
        return shards.rpartition("/")[2]
    return re.sub(r"(\w+://)[^/@\s]*@", r"\1", re.sub(r"\?\S*", "", shards))


def _last_metrics(run: SavedRun) -> dict[str, tuple[float, int]]:
    """Return, by name, a metric's last value up to the checkpoint's step, and the step of its line."""
    from m3ae_fast.run.run_log import read_metrics

    wanted = re.compile(r"(val_)?(loss|image_loss|text_loss|text_accuracy)")
    found: dict[str, tuple[float, int]] = {}
    with contextlib.suppress(UserError):  # a checkpoint that was moved
        for line in read_metrics(run.path.parents[1]):
            if (step := line["step"]) <= run.info.step:
                numbers = {name: value for name, value in line.items() if isinstance(value, int | float)}
                found |= {name: (value, step) for name, value in numbers.items() if wanted.fullmatch(name)}
    return found


def main(argv: list[str] | None = None) -> int:
    parser = program("export", __doc__)
    parser.add_argument("run", metavar="RUN", help="a run folder (its last checkpoint is taken), checkpoint or export")
    parser.add_argument("out", metavar="OUT", help="a new folder, or an earlier export, which is replaced")
    parser.add_argument(
        "--format", choices=["m3ae", "timm", "onnx"], default="m3ae", help="whose folder OUT is (default: m3ae)"
    )
    parser.add_argument(
        "--weights", choices=["average", "last"], default="average", help="of a run with train.ema (default: average)"
    )
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload OUT to the Hugging Face hub under this name")
    parser.add_argument("--private", action="store_true", help="with --push: a model made by it is private")
    for option, what in (("--train", "to look for neighbours in"), ("--val", "to classify by them")):
        parser.add_argument(option, nargs="+", default=[], metavar="SHARDS", help=f"with --format onnx: images {what}")
    add_labels(parser)
    args = parser.parse_args(argv)
    if args.push and args.format == "onnx":
        parser.error("--push takes a folder, which --format onnx does not make")
    if args.private and not args.push:
        parser.error("--private is for --push, which makes a model on the hub")
    if (args.train or args.val) and not (args.train and args.val and args.format == "onnx"):
        parser.error("--train and --val go together, with --format onnx")
    images = None
    if args.train:
        from m3ae_fast.convert.onnx_model import open_labelled

        images = open_labelled(args.train, args.val, args.labels)
    found = export(args.run, args.out, args.format, args.push, args.weights)
    print("\n  ".join([f"exported {found.kind} to {args.out}", *found.notes]))
    if images:
        from m3ae_fast.convert.onnx_model import file_names, knn_lines

        print("\n  ".join(knn_lines(file_names(Path(args.out)), found.config, found.state, images)))
    if args.push:
        from m3ae_fast.weights.hub import push_folder

        print(f"pushed to {push_folder(args.out, args.push, args.private)}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_cleanly(main))
