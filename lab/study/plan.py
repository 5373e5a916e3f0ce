"""The encoders of the study, each of which differs from a common encoder in one property."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from lab.study.shards import FOLDS

TEXT_RATIOS = (0.15, 0.5, 0.75, 0.9)
USUAL_RATIO = 0.75
CAPTION_FRACTIONS = (0.1, 0.3, 1.0)  # 0 is MAE
LENGTHS, NARROWER = (0.5, 3), 2  # factors of the training length, and divisor of the width
CLOTHES_LENGTH = 3  # factor of the training length on clothes, which have 20 times as many images

# the comparisons: training objectives; the paper's figures 5, 3 and 4; and training datasets
ARMS = ("objectives", "clothes", "ratios", "fractions", "lengths", "widths")

Objective = Literal["captions", "pixels", "random", "mae", "m3ae"]
UNTRAINED: tuple[Objective, ...] = ("captions", "pixels", "random")  # the first two are not encoders


@dataclass(frozen=True)
class Encoder:
    """An encoder, defined by its training data and objective."""

    objective: Objective
    width: int
    steps: int  # number of pre-training steps
    seed: int  # random seed, which also selects the held-out emoji
    text_ratio: float | None = None  # fraction of the text tokens masked; None without text
    caption_fraction: float = 1.0  # fraction of the pairs whose captions are used
    images: Literal["emoji", "clothes"] = "emoji"

    @property
    def name(self) -> str:
        """Return the name of the encoder's folder."""
        parts = [self.objective if self.images == "emoji" else f"{self.objective}-{self.images}"]
        parts += [] if self.text_ratio is None else [f"text{100 * self.text_ratio:.0f}"]
        parts += [] if self.caption_fraction == 1 else [f"captions{100 * self.caption_fraction:.0f}"]
        return "-".join([*parts, f"width{self.width}", f"steps{self.steps}", f"seed{self.seed}"])

    @property
    def trained(self) -> bool:
        return self.objective not in UNTRAINED


def m3ae(width: int, steps: int, seed: int = 0) -> Encoder:
    """Return the common encoder."""
    return Encoder("m3ae", width, steps, seed, USUAL_RATIO)


def central(encoder: Encoder, width: int, steps: int) -> bool:
    """Return whether an encoder belongs to the arm `objectives`, for which all tests are run."""
    return encoder in _encoders("objectives", width, steps, encoder.seed)


def plan(width: int, steps: int, seeds: int = FOLDS, arms: Collection[str] = ARMS) -> list[Encoder]:
    """Return all encoders in the order of execution: first the training objectives with all seeds, then each other
    comparison with one seed, then with further seeds, so that an unfinished study is as informative as possible.

    Args:
        width, steps: width and number of steps of the common encoder.
        seeds: number of seeds of each encoder, at most FOLDS.
        arms: the comparisons, from ARMS. Each includes the common encoders with which it is compared.
    """
    found: dict[Encoder, None] = {}
    first = [arm for arm in arms if arm == ARMS[0]] or [*arms]
    for chosen in (first, arms):
        for seed in range(seeds):
            for arm in chosen:
                found |= dict.fromkeys(_encoders(arm, width, steps, seed))
    return list(found)


def _encoders(arm: str, width: int, steps: int, seed: int) -> Iterator[Encoder]:
    common, mae = m3ae(width, steps, seed), Encoder("mae", width, steps, seed)
    both = common, mae
    others: dict[str, list[Encoder]] = {
        "objectives": [
            *(Encoder(objective, width, 0, seed) for objective in UNTRAINED)
        ],
        "clothes": [replace(mae, images="clothes", steps=CLOTHES_LENGTH * steps)],
        "ratios": [replace(common, text_ratio=ratio) for ratio in TEXT_RATIOS if ratio != USUAL_RATIO],
        "fractions": [replace(common, caption_fraction=fraction) for fraction in CAPTION_FRACTIONS if fraction < 1],
        "lengths": [replace(encoder, steps=round(part * steps)) for part in LENGTHS for encoder in both],
        "widths": [replace(encoder, width=width // NARROWER) for encoder in both],
    }  # fmt: skip
    yield from (*both, *others[arm])
