"""Experiment: does training on native images give better features than training on square images, with equal numbers of
tokens?

    python -m lab.aspect --out runs/aspect

The training images are the drawings of data/openclipart, without their white margins. One MAE is trained on them as
square images, and another as native images with the same number of patches. Both encoders are tested on square and on
native images by k-NN and by a linear probe. Completed runs are not repeated.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import tarfile
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image

from m3ae_fast import train
from m3ae_fast.base.atomic_file import atomic_write, write_text_atomically
from m3ae_fast.base.errors import exit_cleanly
from m3ae_fast.evaluation.task_runner import evaluate
from m3ae_fast.shards.tar_member import add_member

CLIPART = Path("data/openclipart")
WHITE = 250  # minimum level of white margins
MODES, TASKS, SEEDS = ("square", "native"), ("knn", "linear"), (0, 1, 2)
PATCHES, PATCH = 64, 8
MODEL = {
    "size": None, "emb_dim": 128, "depth": 4, "num_heads": 4, "dec_emb_dim": 64, "dec_depth": 1, "dec_num_heads": 2,
    "image_size": 64, "patch_size": PATCH, "vocab_size": 0,
}  # fmt: skip


def drawing(data: bytes) -> Image.Image:
    """Return an image without its white margins."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return image.crop(image.convert("L").point(lambda level: 255 * (level < WHITE)).getbbox())


def cut(shard: Path, out: Path) -> None:
    """Write the labelled drawings of `shard` to the shard `out`, without their white margins."""
    with tarfile.open(shard) as tar:
        files = {info.name: tar.extractfile(info).read() for info in tar}
    with atomic_write(out) as partial, tarfile.open(partial, "w") as tar:
        for name, data in files.items():
            label = json.loads(files[name.replace(".jpg", ".json")])["label"] if name.endswith(".jpg") else -1
            if label < 0:
                continue
            image, stream = drawing(data), io.BytesIO()
            image.save(stream, "PNG")
            for suffix, content in ((".png", stream.getvalue()), (".cls", str(label).encode())):
                add_member(tar, name.removesuffix(".jpg") + suffix, content)


def ratios(shard: Path) -> list[float]:
    """Return the aspect ratios (longer side over shorter side) of the drawings in a shard."""
    with tarfile.open(shard) as tar:
        sizes = [Image.open(io.BytesIO(tar.extractfile(i).read())).size for i in tar if i.name.endswith(".png")]
    return [max(size) / min(size) for size in sizes]


def config(run: Path, shards: Path, mode: str, seed: int, steps: int) -> dict[str, object]:
    """Return the config of a run. A native image has the same number of patches as a square image."""
    sizes = {"resize": mode, "max_patches": PATCHES, "min_patches": PATCHES} if mode == "native" else {}
    return {
        "run": {"dir": str(run), "seed": seed},
        "model": MODEL,
        "data": {"train": [{"shards": str(shards / "train-*.tar")}], "crop_scale": [0.5, 1.0], "workers": 1} | sizes,
        "optim": {"peak_lr": 6e-3, "warmup_epochs": 2, "clip_grad": 1.0},
        "train": {"global_batch": 64, "steps": steps, "log_every": 100, "pictures": 0},
        "deepspeed": None,
    }


def accuracy(model: str, shards: Path, mode: str, task: str, out: Path) -> float:
    """Return the held-out accuracy of a task in %."""
    if not (out / "result.json").exists():
        evaluate(
            task,
            model,
            train=str(shards / "train-*.tar"),
            val=str(shards / "val-*.tar"),
            out=out,
            layers=[MODEL["depth"]] if task == "linear" else None,  # features are computed once, without augmentation
            baselines=task != "knn",  # random weights are one of the encoders
            overrides=[f"data.resize={mode}"],
        )
    return 100 * json.loads((out / "result.json").read_text(encoding="utf-8"))["top1"]


def table(found: dict[tuple[str, str], dict[str, list[float]]]) -> str:
    """Return a Markdown table with a row for each encoder and kind of test image."""
    lines = ["| encoder | tested on | k-NN | linear probe |", "|---|---|--:|--:|"]
    for (encoder, seen), each in found.items():
        cells = [f"{statistics.mean(each[task]):.1f} ± {statistics.stdev(each[task]):.1f}" for task in TASKS]
        lines.append(f"| {encoder} | {seen} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lab.aspect", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for shards, runs and the table")
    parser.add_argument("--steps", type=int, default=400, help="number of steps of each run (default: 400)")
    args = parser.parse_args(argv)
    shards = args.out / "shards"
    for shard in sorted(CLIPART.glob("*.tar")):
        if not (shards / shard.name).exists():
            cut(shard, shards / shard.name)
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for mode, seed in product(MODES, SEEDS):
        run = args.out / f"{mode}-{seed}"
        settings = args.out / f"{mode}-{seed}.json"
        write_text_atomically(settings, json.dumps(config(run, shards, mode, seed, args.steps), indent=1))
        train.main(["--config", str(settings), "--resume", "auto"])
        encoders = {mode: str(run)} | ({"random weights": f"random:{run}"} if mode == "square" else {})
        for (name, model), seen, task in product(encoders.items(), MODES, TASKS):
            out = args.out / f"{name.split()[0]}-{seed}-{seen}-{task}"
            found.setdefault((name, seen), {}).setdefault(task, []).append(accuracy(model, shards, seen, task, out))
    shapes = [ratio for shard in sorted(shards.glob("*.tar")) for ratio in ratios(shard)]
    spread = "{:.2f}, {:.2f} and {:.2f}".format(*np.quantile(shapes, (0.25, 0.5, 0.75)))
    text = f"{len(shapes):,} drawings; quartiles of the longer side divided by the shorter side: {spread}. "
    text += f"Accuracy in %: mean and standard deviation of {len(SEEDS)} seeds.\n\n"
    write_text_atomically(args.out / "table.md", text + table(found) + "\n")
    print(text + table(found))
    return 0


if __name__ == "__main__":
    sys.exit(exit_cleanly(main))
