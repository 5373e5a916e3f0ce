"""Labelled shards and a tiny run, for tests that take about a second."""

import io
import json

import numpy as np
from PIL import Image

from m3ae_fast import checkpoint
from m3ae_fast.config import Config
from m3ae_fast.model.m3ae import M3AE
from tests.helpers.checkpoints import save, save_cut
from tests.helpers.shards import WORDS, write_tar
from tests.helpers.trainer import TINY

COLOURS = {"blue": (30, 60, 220), "green": (40, 200, 60), "red": (230, 50, 40)}  # the classes, in sorted order
NAMES = list(COLOURS)


def coloured(number, colour):
    """Return an image with noise around a colour."""
    noise = np.random.RandomState(number).randint(-30, 30, (40, 40, 3))
    out = io.BytesIO()
    Image.fromarray((np.array(COLOURS[colour]) + noise).clip(0, 255).astype(np.uint8)).save(out, "PNG")
    return out.getvalue()


def labelled_members(numbers, labels=None):
    """Yield members as (name, bytes): for each sample an image of one of three colours, a caption with the name of the
    colour, and the class as a number and as a name.

    `labels`: values by sample number that replace the correct class id. A sample with the value None has no .cls and no
    .json.
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
