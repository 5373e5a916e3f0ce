"""Settings that fit data, hardware and time. Rules of thumb where nothing better is known; each is a constant here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from m3ae_fast.config import Config, Range, parse
from m3ae_fast.config.load import apply_override
from m3ae_fast.errors import UserError

TOKENIZER = "tokenizer.json"  # of a run folder
LONGEST = 800  # epochs, as MAE was trained
EPOCHS, SEEN = 20, 20_000  # and samples, that a larger model must reach in the time that there is
FEWEST_STEPS = 1000  # a batch is halved until there are so many
SMALLEST_BATCH, LARGEST_BATCH = 64, 1024
_STEPS_PER_EPOCH = 24  # about, between the smallest and the largest batch
_WARM_UP = 0.05  # of the steps
_PROBED = 5000  # training samples: with more the k-NN accuracy is measured only before and after
# MAE's rate for its batch (arXiv 2111.06377), by the square root of the batch, as Adam asks for (arXiv 2205.10287)
_RATE, _OF_BATCH = 2.4e-3, 4096
_RATE_OF_NARROW = 4  # times as high for models narrower than "small", as in the quickstart


@dataclass(frozen=True)
class Shards:
    """Patterns for the config, and what to tell the user."""

    train: list[str]
    val: list[str]  # empty: nothing is held out
    notes: list[str]
    unlabelled: str = ""  # why samples have no label "cls", where that is known


@dataclass(frozen=True)
class Facts:
    """Facts about the training samples, and about what is held out."""

    samples: int
    held_out: int
    short_side: int  # pixels, the median
    image_mean: list[float]
    image_std: list[float]
    classes: int  # 0: there are no labels that can be used
    vocab_size: int  # 0: there are no captions
    text_length: int  # tokens


class Rung(NamedTuple):
    """A size of the model, and for how many samples."""

    name: str
    model: dict[str, Any]
    pixels: int  # of an image, at most
    samples: float  # that it takes at least to be of use


def _narrow(width: int, depth: int, heads: int, decoder: int) -> dict[str, Any]:
    own = {"size": None, "emb_dim": width, "depth": depth, "num_heads": heads}
    return own | {"dec_emb_dim": decoder, "dec_depth": 2, "dec_num_heads": 4}


LADDER = (
    Rung("tiny", _narrow(128, 4, 4, 64), 48, 0),
    Rung("mini", _narrow(192, 6, 6, 128), 96, 0),
    Rung("small", {"size": "small", "dec_emb_dim": 256, "dec_depth": 4, "dec_num_heads": 8}, 224, 1e4),
    Rung("base", {"size": "base"}, 224, 1e5),
    Rung("large", {"size": "large"}, 224, 1e6),
)


def rungs(facts: Facts) -> list[Rung]:
    """Return the sizes that the number of samples allows, smallest first."""
    return [rung for rung in LADDER if facts.samples >= rung.samples]


def image_and_patch(short_side: int, pixels: int) -> tuple[int, int]:
    """Return an image size of at most `pixels` to which most images need not be enlarged, and its patch size: the
    largest with eight patches a side."""
    size = max(min(short_side, pixels), 16)
    patch = next((p for p in (16, 8) if size // p >= 8), 4)
    return size // patch * patch, patch


def _images(facts: Facts, rung: Rung, overrides: Sequence[str]) -> tuple[int, int]:
    """Return `image_and_patch`; where the user sets one of them, the other fits it."""
    size, patch = image_and_patch(facts.short_side, rung.pixels)
    if own := given(overrides, "model.image_size"):
        patch = next((p for p in (16, 8) if own // p >= 8 and own % p == 0), 4)
    elif own := given(overrides, "model.patch_size"):
        size = max(size // own, 1) * own
    return size, patch


def given(overrides: Sequence[str], name: str) -> int | None:
    """Return the number above 0 that the user sets, None where there is none."""
    texts = [text for key, _, text in (override.partition("=") for override in overrides) if key == name]
    return int(texts[-1]) or None if texts and texts[-1].isdecimal() else None


def batch_of(samples: int) -> int:
    """Return samples per step, a power of two."""
    most = _power_below(samples / 4)
    wanted = _power_below(samples / _STEPS_PER_EPOCH)
    return min(max(wanted, min(SMALLEST_BATCH, most)), LARGEST_BATCH)


def peak_rate(batch: int, width: int) -> float:
    """Return `optim.peak_lr`, which is for a batch of 256."""
    rate = _RATE * math.sqrt(batch / _OF_BATCH) * (_RATE_OF_NARROW if width < 384 else 1)
    return float(f"{rate * 256 / batch:.3g}")


def steps_in(seconds: float, pace: float, batch: int, samples: int) -> int:
    """Return how many steps fit, of `pace` seconds a sample; as many as LONGEST epochs at most."""
    longest = LONGEST * max(samples // batch, 1)
    return max(min(int(seconds / (pace * batch)), longest), 2)


def fitted_batch(seconds: float, pace: float, samples: int) -> int:
    """Return the batch for the time: smaller than `batch_of` where there would be too few steps."""
    batch = batch_of(samples)
    while batch > SMALLEST_BATCH and seconds / (pace * batch) < FEWEST_STEPS:
        batch //= 2
    return batch


def reaches(seconds: float, pace: float, samples: int) -> bool:
    """Return whether the time is enough for a model of that pace to see enough samples."""
    return seconds / pace >= max(EPOCHS * samples, SEEN)


def check_overrides(overrides: Sequence[str]) -> Range | None:
    """Return the `data.range` that they set. Raises UserError if the overrides are possible for no samples at all,
    before there are any."""
    if any(override.startswith(("run.dir=", "run=")) for override in overrides):
        raise UserError("--set run.dir: is what --out names")
    first: UserError | None = None
    for rung in LADDER:
        facts = Facts(10**6, 1000, 1000, [0.5] * 3, [0.25] * 3, classes=2, vocab_size=512, text_length=64)
        try:
            shards = Shards(["train.tar"], ["val.tar"], [])
            return settings(facts, shards, Path("run"), rung, 64, 1000, "cls", overrides).data.range
        except UserError as error:
            first = first or error
    assert first is not None
    raise first


def settings(
    facts: Facts, shards: Shards, out: Path, rung: Rung, batch: int, steps: int, labels: str, overrides: Sequence[str]
) -> Config:
    """Return the config of a run with the user's `--set` overrides. Raises UserError for one that is not possible."""
    size, patch = _images(facts, rung, overrides)
    train, val = ([{"shards": part}] for part in (shards.train, shards.val))
    often = max(steps // 20, min(steps, 10))
    config: dict[str, Any] = {
        "run": {"dir": str(out)},
        "model": {
            **rung.model,
            "image_size": size,
            "patch_size": patch,
            "image_mean": facts.image_mean,
            "image_std": facts.image_std,
            "text_length": facts.text_length,
            "vocab_size": facts.vocab_size,
        },
        "loss": {"norm_pix": True},
        "data": {
            "train": train,
            "val": val if shards.val else [],
            "tokenizer": str((out / TOKENIZER).resolve()) if facts.vocab_size else None,
            "crop_scale": [0.4, 1.0],
        },
        "optim": {"warmup_epochs": round(_WARM_UP * steps / max(facts.samples // batch, 1), 3), "clip_grad": 1.0},
        "train": {
            "global_batch": batch,
            "steps": steps,
            "log_every": max(steps // 50, 1),
            "eval_every": often,
            "eval_samples": max(min(facts.held_out, 1024), 1),
            "save_every": max(steps // 10, min(steps, 10)),
            "probe": _probe(train, val, labels, often if facts.samples <= _PROBED else None) if facts.classes else None,
        },
        "deepspeed": None,
    }
    for override in overrides:
        _give_way(config, override)
        apply_override(config, override)
    found = parse(Config, config, "--set")
    config["optim"].setdefault("peak_lr", peak_rate(found.train.global_batch, found.model.emb_dim))
    return parse(Config, config, "--set")


def _give_way(config: dict[str, Any], override: str) -> None:
    """Drop what was chosen instead of what the user sets."""
    name, _, value = override.partition("=")
    if name == "train.epochs" and value != "null":
        config["train"].pop("steps", None)
    if name == "model.size" and value != "null":
        for key in ("emb_dim", "depth", "num_heads", "dec_emb_dim", "dec_depth", "dec_num_heads"):
            config["model"].pop(key, None)


def _probe(train: Any, val: Any, labels: str, every: int | None) -> dict[str, Any]:
    images = [[source | {"modality": "image"} for source in part] for part in (train, val)]
    return {"train": images[0], "val": images[1], "labels": labels, "every": every}


def _power_below(value: float) -> int:
    """Return the largest power of two up to `value`, at least 1."""
    return 2 ** max(int(math.log2(max(value, 1))), 0)
