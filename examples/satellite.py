"""A complete example with satellite images of 13 bands: shards, statistics, a trained model, a figure, and a probe.

    python examples/satellite.py FOLDER [--images 240] [--steps 60]

The images are synthetic. With your own data, start with `shards`: a folder of .npy or TIFF files, with a sub-folder for
each class.

Shapes: S x S pixels, C bands.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

S, C = 32, 13
SPECTRA = {"water": (900, 150), "forest": (400, 3200), "field": (1100, 2400), "town": (1900, 2100)}  # blue, infrared
SHARDS = [sys.executable, "-m", "m3ae_fast", "shards"]


def make_images(folder: Path, images: int) -> None:
    """Write images of reflectances times 10,000, uint16 [S, S, C], as in Sentinel-2's level 2A: the spectrum of the
    class, multiplied by a smooth random field, plus noise."""
    random = np.random.default_rng(0)
    for number in range(images):
        name = list(SPECTRA)[number % len(SPECTRA)]
        blue, infrared = SPECTRA[name]
        spectrum_C = np.interp(np.arange(C), (0, C - 1), (blue, infrared))
        x, y = np.meshgrid(*2 * [np.linspace(0, 2 * np.pi, S)])
        light_SS = 1 + 0.4 * np.sin(x * random.uniform(0.5, 2) + y * random.uniform(0.5, 2) + random.uniform(0, 6))
        values_SSC = light_SS[..., None] * spectrum_C + random.normal(0, 60, (S, S, C))
        (folder / name).mkdir(parents=True, exist_ok=True)
        np.save(folder / name / f"{number}.npy", values_SSC.clip(0, 65535).astype(np.uint16))


def run(*command: object) -> None:
    """Print and run a command, and exit if it fails."""
    print("$", " ".join(str(part) for part in command[1:]), flush=True)
    subprocess.run([str(part) for part in command], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="output folder for images, shards, the run and results")
    parser.add_argument("--images", type=int, default=240, help="number of images (default: 240)")
    parser.add_argument("--steps", type=int, default=60, help="approximate number of steps (default: 60)")
    args = parser.parse_args()
    images, shards, out = args.folder / "images", args.folder / "shards", args.folder / "run"
    make_images(images, args.images)
    run(*SHARDS, "make", images, "--out", shards, "--held-out", "0.25", "--workers", "1")
    train, val = f"{shards}/train-*.tar", f"{shards}/val-*.tar"
    batch = 32
    config = {
        "run": {"dir": str(out), "loggers": []},
        "model": {
            "size": None, "emb_dim": 64, "depth": 2, "num_heads": 4, "dec_emb_dim": 32, "dec_depth": 1,
            "dec_num_heads": 4, "image_size": S, "patch_size": 8, "vocab_size": 0,
        },
        "data": {"train": [{"shards": train}], "val": [{"shards": val}]},
        "optim": {"peak_lr": 4e-3, "warmup_epochs": 1},
        "train": {"global_batch": batch, "epochs": max(1, args.steps * batch // args.images), "eval_every": args.steps},
        "deepspeed": None,
    }  # fmt: skip
    file = args.folder / "config.json"
    file.write_text(json.dumps(config, indent=2))
    # black is a reflectance of 0 and white a reflectance of 1; the statistics refer to values on this scale
    pixels = ["--channels", C, "--dtype", "uint16", "--value-range", "0,10000"]
    run(*SHARDS, "stats", train, *pixels, "--write", file)
    shown = ["--set", "data.show_channels=[3,2,1]"]  # red, green and blue, as in a photograph
    run(sys.executable, "-m", "m3ae_fast", "train", "--config", file, *shown)
    run(sys.executable, "-m", "m3ae_fast", "draw", "reconstructions", out, "--out", args.folder / "bands.png")
    knn = ["knn", out, "--train", train, "--val", val, "--out", args.folder / "knn", "--set", "knn.k=5"]
    run(sys.executable, "-m", "m3ae_fast", "evaluate", *knn)


if __name__ == "__main__":
    main()
