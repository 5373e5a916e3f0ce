"""Labelled shards and a tiny run, for tests that take about a second."""

import io
import json

import numpy as np
from PIL import Image

from m3ae_fast import checkpoint
from m3ae_fast.config import Config
from m3ae_fast.model.m3ae import M3AE
from tests.helpers.checkpoints import save, save_cut
from tests.helpers.shards import WORDS, picture, write_tar
from tests.helpers.trainer import TINY

COLOURS = {"blue": (30, 60, 220), "green": (40, 200, 60), "red": (230, 50, 40)}  # the classes, in sorted order
NAMES = list(COLOURS)
CATEGORIES = ("Animals", "Flags", "Smileys")


def coloured(number, colour):
    """Return an image with noise around a colour."""
    noise = np.random.RandomState(number).randint(-30, 30, (40, 40, 3))
    out = io.BytesIO()
    Image.fromarray((np.array(COLOURS[colour]) + noise).clip(0, 255).astype(np.uint8)).save(out, "PNG")
    return out.getvalue()


def labelled_members(numbers, labels=None):
    """Yield members as (name, bytes): for each sample an image of one of three colours, a caption with the name of the
    colour, and the class as a number and as a name.

    `labels`: values by sample number that replace the correct class id; None: no .cls and no .json.
    """
    for number in numbers:
        colour = NAMES[number % 3]
        label = (labels or {}).get(number, number % 3)
        yield f"{number:05d}.png", coloured(number, colour)
        yield f"{number:05d}.txt", f"{colour} {WORDS[number % len(WORDS)]}".encode()
        if label is not None:
            yield f"{number:05d}.cls", str(label).encode()
            name = NAMES[label] if label in range(3) else label
            yield f"{number:05d}.json", json.dumps({"name": name, "label": label}).encode()


def labelled_tar(path, numbers, labels=None):
    return write_tar(path, labelled_members(numbers, labels))


def tiny_run(folder, ranks=1, data=None, loss=None, **model):
    """Return a run folder with one checkpoint of an untrained tiny model, split as `ranks` ranks would write it."""
    sections = {"model": {**TINY["model"], **model}, "data": {**TINY["data"], **(data or {})}}
    sections |= {} if loss is None else {"loss": loss.model_dump()}
    config = Config.model_validate(TINY | sections, strict=False)
    weights = {f"model/{name}": p for name, p in M3AE(config.model).state_dict().items()}
    info = checkpoint.Info(1, 16, 0, config.model_dump(mode="json"), checkpoint.versions())
    if ranks == 1:
        save(folder, weights, info)
    else:
        save_cut(folder, weights, ranks, info=info)
    return folder


def described_tar(path, samples):
    """Write a shard. `samples`: (image, caption or None, json) by key."""
    path.parent.mkdir(parents=True, exist_ok=True)
    members = []
    for key, (image, caption, about) in samples.items():
        members += [(f"{key}.jpg", image), (f"{key}.json", json.dumps(about).encode())]
        members += [] if caption is None else [(f"{key}.txt", caption.encode())]
    return write_tar(path, members)


def emoji(number, tone=""):
    """Return an emoji as a sample for `described_tar`."""
    category, sub = CATEGORIES[number % 3], f"sub-{number % 2}"
    about = {"emoji": f"1F{number:03X}", "category": category, "subcategory": sub, "tone": tone}
    return picture(number, (32, 32)), f"{category.lower()} {number}", about


def emoji_and_clothes(folder):
    """Write folders in the layout of lab.labelled, with 60 emoji of two vendors and 45 Fashion-MNIST images."""
    for vendor in ("twitter", "google"):
        samples = {f"{i:03}": emoji(i) for i in range(60)}
        samples |= {"tone": emoji(0, "1F3FB"), "part": (*emoji(1)[:2], emoji(1)[2] | {"category": "Component"})}
        for split, own in (("train", [*samples][:40]), ("val", [*samples][40:])):
            described_tar(folder / vendor / f"{split}-0.tar", {key: samples[key] for key in own})
    clothes = {f"{i:03}": (picture(i, (28, 28)), None, {"name": f"kind {i % 3}"}) for i in range(45)}
    described_tar(folder / "fashion/train-0.tar", {key: clothes[key] for key in [*clothes][:33]})
    described_tar(folder / "fashion/val-0.tar", {key: clothes[key] for key in [*clothes][33:]})
    return folder
