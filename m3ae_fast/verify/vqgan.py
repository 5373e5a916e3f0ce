"""Golden files of the official image tokenizer: encoder outputs, ids and decoded images."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from m3ae_fast.verify.golden import Golden, Quantity
from m3ae_fast.vqgan.flax import from_flax

FEATURES, DECODED = 1e-4, 2e-5  # maximum relative errors of encoder outputs and of decoded images in float32
LEAST_MARGIN = 1e-3  # minimum difference between the distances to the two nearest codes; below it, ids are not compared


def quantities(golden: Golden, device: torch.device, dtype: torch.dtype) -> Iterator[Quantity]:
    """Yield all comparisons of a file, computed on `device` in `dtype`."""
    arrays = {path: array for path, array in golden.arrays.items() if path.startswith("params/")}
    vqgan = from_flax(arrays, str(golden.path)).to(device, dtype)
    official = golden.tensor
    for size in ("small", "big"):
        images = official(f"in/{size}_u8").permute(0, 3, 1, 2).to(device)
        with torch.no_grad():
            yield Quantity(f"features_{size}", vqgan.features(images / 255), official(f"out/features_{size}"), FEATURES)
        clear = official(f"out/id_margin_{size}") > LEAST_MARGIN
        yield Quantity(f"ids_{size}", vqgan.encode(images).cpu()[clear], official(f"out/ids_{size}")[clear], 0.0)
    decoded = vqgan.decode(official("in/ids_4x4").to(device)).permute(0, 2, 3, 1)
    yield Quantity("decoded_4x4_unclipped", decoded, official("out/decoded_4x4_unclipped"), DECODED)
    yield Quantity("decoded_4x4", decoded.clamp(0, 1), official("out/decoded_4x4"), DECODED)
    whole = vqgan.decode(official("in/ids_16x16").unflatten(1, (16, 16)).to(device)).clamp(0, 1).permute(0, 2, 3, 1)
    yield Quantity("decoded_16x16_every4", whole[:, ::4, ::4], official("out/decoded_16x16_every4"), DECODED)
    yield Quantity("decoded_16x16_mean", whole.double().mean((1, 2)), official("out/decoded_16x16_mean"), DECODED)
