"""Whole training steps on one GPU: the engine beside the expert's version, with the engine's reference MFU.

Run by `python -m benchmarks.gpu --step`.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import results
from benchmarks.alone import Alone
from m3ae_fast.config import MaskingConfig, ModelConfig
from m3ae_fast.hardware import peak_flops
from m3ae_fast.model.flops import reference_flops

CASES = (({"size": "small"}, 1024), ({"size": "base"}, 512), ({"size": "large"}, 256))  # 256 px, 64 text tokens
WARMUP, ROUNDS = 3, 10


def run(folder: Path | None = None, cases: Sequence[tuple[dict, int]] = CASES) -> Path:
    """Measures each case (fields of ModelConfig, batch), writes gpu-step.json into `folder` (None: this machine's),
    and prints the table.

    An implementation that fails, for want of memory mostly, has no numbers.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peak = peak_flops(device, torch.bfloat16)
    rows = []
    for fields, samples in cases:
        flops = reference_flops(ModelConfig(**fields), MaskingConfig())
        for name in ("expert", "engine"):
            row: results.Row = {"size": fields["size"] or "other", "batch": samples, "implementation": name}
            row |= {"samples/s": None, "reference MFU": None, "peak GB": None, "start-up s": None}
            try:
                with Alone(name, fields, samples) as process:
                    for _ in range(WARMUP):
                        process.step()
                    speed = samples / statistics.median(process.step() for _ in range(ROUNDS))
                    row |= {"samples/s": speed, "reference MFU": speed * flops / peak}
                    row |= {"peak GB": process.peak_bytes() / 1e9, "start-up s": process.startup}
            except RuntimeError as error:
                print(f"{row['size']}, {name}: {error}")
            rows.append(row)
    return results.write("gpu-step", "Training step on a GPU, 256 px, captions of 8 to 32 of 64 tokens", rows, folder)
