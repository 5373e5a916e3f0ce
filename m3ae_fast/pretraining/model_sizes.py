"""The model sizes from which `pretrain` chooses."""

from __future__ import annotations

from typing import Any, NamedTuple


class ModelSize(NamedTuple):
    """A model size, with its requirements."""

    name: str
    model: dict[str, Any]
    pixels: int  # maximum image size in pixels
    samples: float  # minimum number of training samples


def _narrow(width: int, depth: int, heads: int, decoder: int) -> dict[str, Any]:
    own = {"size": None, "emb_dim": width, "depth": depth, "num_heads": heads}
    return own | {"dec_emb_dim": decoder, "dec_depth": 2, "dec_num_heads": 4}


MODEL_SIZES = (
    ModelSize("tiny", _narrow(128, 4, 4, 64), 48, 0),
    ModelSize("mini", _narrow(192, 6, 6, 128), 96, 0),
    ModelSize("small", {"size": "small", "dec_emb_dim": 256, "dec_depth": 4, "dec_num_heads": 8}, 224, 1e4),
    ModelSize("base", {"size": "base"}, 224, 1e5),
    ModelSize("large", {"size": "large"}, 224, 1e6),
)
