"""The poolings that reduce the encoder's tokens to features. A new pooling is a name in `Pool`, a row in `POOLINGS` and
a function in `model/pooling.py`; a new grid is only a name.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

Pool = Literal["mean", "cls", "grid2", "grid4"]
POOLS: tuple[Pool, ...] = get_args(Pool)


class Pooling(NamedTuple):
    """The properties of a pooling."""

    about: str  # what the features are
    vectors: int = 1  # number of feature vectors, each as wide as the encoder, to which a sample is reduced
    needs_images: bool = False  # whether every sample must have an image
    timm: str | None = None  # value of timm's `global_pool` for this pooling; None: timm has none


def _grid(side: int) -> Pooling:
    about = f"the means over the patches of each of {side} x {side} cells, which show where something is"
    return Pooling(about, side**2, needs_images=True)


# number of cells per side of the poolings that keep the position in the image
GRIDS = {pool: int(pool.removeprefix("grid")) for pool in POOLS if pool.startswith("grid")}
POOLINGS: dict[Pool, Pooling] = {
    "mean": Pooling("the mean over all tokens except cls", timm="avg"),
    "cls": Pooling("the cls token", timm="token"),
    **{pool: _grid(side) for pool, side in GRIDS.items()},
}
FOR_TEXTS = " or ".join(pool for pool in POOLS if not POOLINGS[pool].needs_images)


_MOST_FEATURES = 4096  # poolings with more features are not candidates


def candidates(width: int, is_image: bool) -> list[Pool]:
    """Return the poolings from which a task chooses one, the mean first. `width`: width of the encoder; `is_image`:
    whether the samples consist only of images."""
    most = max(_MOST_FEATURES // width, 1)
    return [pool for pool, each in POOLINGS.items() if each.vectors <= most and (is_image or not each.needs_images)]


def usual_pool(width: int) -> Pool:
    """Return the pooling of images whose labels are unknown. This is the largest grid with at most 4,096 features,
    because this pooling was the best for every trained model in lab/results/targets.md; it is the mean if there is no
    such grid. `width`: width of the encoder."""
    fitting = candidates(width, is_image=True)
    return max(fitting, key=lambda pool: POOLINGS[pool].vectors)


def described(quote: str = "") -> str:
    """Return the descriptions of all poolings. `quote`: character around each name."""
    return "; ".join(
        f"{quote}{name}{quote}, {pooling.about}"
        + (f" ({pooling.vectors} times as many features; needs images)" if pooling.needs_images else "")
        for name, pooling in POOLINGS.items()
    )
