"""Comparison of native with square images: tokens/s of a step with equal numbers of tokens, and padding in other
layouts.

The aspect ratios are those of openclipart's drawings. Their files are square, so the margins of the drawings are
cropped.
"""

import statistics
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import results
from benchmarks.workload import DEVICE, PRECISION, make_config
from lab.aspect import drawing
from m3ae_fast.base.hardware import keep_freed_memory
from m3ae_fast.batch.masking import draw_mask
from m3ae_fast.batch.packed import PackedBatch
from m3ae_fast.batch.packing import Geometry, Sample, pack
from m3ae_fast.config import ModelConfig
from m3ae_fast.engine.build import build_engine
from m3ae_fast.model.m3ae import M3AE
from m3ae_fast.process.ranks import join_ranks

CLIPART = Path(__file__).parents[1] / "data/openclipart"
BATCH, ROUNDS, LEAST = 64, 7, 0.95


@pytest.fixture(scope="module")
def sizes() -> list[tuple[int, int]]:
    """Return the width and height of each drawing in pixels."""
    found = []
    for path in sorted(CLIPART.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith((".jpg", ".png", ".webp")):
                    found.append(drawing(tar.extractfile(member).read()).size)
    return found


def made(model: ModelConfig, sizes: list[tuple[int, int]], seed: int = 0) -> list[Sample]:
    """Return samples with random images of these sizes, resized for the model and masked."""
    rng, geometry, samples = torch.Generator().manual_seed(seed), Geometry.of(model), []
    for number, (width, height) in enumerate(sizes):
        side = model.image_size // model.patch_size
        rows, columns = (side, side) if geometry.native is None else geometry.native.grid(height, width)
        shape = 3, rows * model.patch_size, columns * model.patch_size
        image = torch.randint(256, shape, dtype=torch.uint8, generator=rng)
        samples.append(Sample(str(number), image, draw_mask(rows * columns, 0.75, rng)))
    return samples


def test_steps_of_native_and_square_images_are_timed_at_equal_tokens(sizes):
    """The number of square images is chosen so that their number of tokens is as close as possible to that of the
    native batch."""
    keep_freed_memory()
    square = ModelConfig(size="small", image_size=224, vocab_size=0)
    native = square.model_copy(update={"resize": "native", "min_patches": 196})
    chosen = [sizes[i] for i in np.random.default_rng(0).permutation(len(sizes))[:16]]
    wide = made(native, chosen)
    tokens = sum(1 + len(sample.image_mask) for sample in wide)
    samples = {"square": made(square, [(224, 224)] * round(tokens / 197)), "native": wide}
    with join_ranks() as ranks:
        steps: dict[str, Callable[[], object]] = {}
        batches: dict[str, PackedBatch] = {}
        for (name, own), model in zip(samples.items(), (square, native)):
            torch.manual_seed(0)
            m3ae, config = M3AE(model), make_config(model, len(own), precision=PRECISION)
            engine = build_engine(m3ae, config, ranks)
            batches[name] = batch = pack(own, m3ae.geometry, repeat_shapes=True).to(DEVICE)
            steps[name] = lambda engine=engine, batch=batch: engine.step([batch], batch.counts, 1e-5)[0][0].loss.item()
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for repetition in range(1 + ROUNDS):
            for name, step in steps.items():
                start = time.perf_counter()
                step()
                if repetition:  # the first round is a warm-up
                    seconds[name].append(time.perf_counter() - start)
    counts = {name: int(batch.decoder.cu_seqlens[len(batch.keys)]) for name, batch in batches.items()}
    rows: list[results.Row] = []
    for name, own in seconds.items():
        # consecutive steps are subject to the same load of the machine
        ratio = statistics.median(
            (counts[name] / mine) / (counts["square"] / other) for mine, other in zip(own, seconds["square"])
        )
        rows.append(
            {
                "images": name,
                "number": len(samples[name]),
                "tokens": counts[name],
                "tokens/s": counts[name] / statistics.median(own),
                "of square": ratio,
            }
        )
    results.write("native", f"A step of small, patches of 16 px, {PRECISION}, at equal tokens", rows)
    assert ratio > LEAST


def test_padding_of_native_images_is_measured(sizes):
    """Measure the fraction of padding rows in batches of 64 if images are packed and if they are padded."""
    from timm.data.naflex_transforms import get_image_size_for_seq

    model = ModelConfig(size="small", image_size=128, patch_size=8, vocab_size=0, resize="native", max_patches=256)
    native, rows = Geometry.of(model), []
    order = np.random.default_rng(0).permutation(len(sizes))
    batches = [[sizes[i] for i in order[start : start + BATCH]] for start in range(0, len(order) - BATCH + 1, BATCH)]
    for name, least in (
        ("original size, reduced to at most 256 patches", 1),
        ("resized to the largest grid of at most 256 patches", 256),
    ):
        model = model.model_copy(update={"min_patches": least})
        native = Geometry.of(model).native
        assert native is not None
        patches = np.array([[np.prod(native.grid(height, width)) for width, height in batch] for batch in batches])
        packed = [pack(made(model, batch), Geometry.of(model), repeat_shapes=True) for batch in batches[:4]]
        real = [int(batch.decoder.cu_seqlens[len(batch.keys)]) for batch in packed]
        rows += [
            _row(name, "packed, row counts rounded up", sum(real), sum(batch.decoder.rows for batch in packed)),
            _row(name, "padded to the longest image of the batch", patches.sum(), BATCH * patches.max(1).sum()),
            _row(name, "padded to 64, 128, 192 or 256", patches.sum(), (-(-patches // 64) * 64).sum()),
        ]
    naflex = [get_image_size_for_seq((height, width), 8, 256)[1] for batch in batches for width, height in batch]
    used = sum(height * width // 64 for height, width in naflex)
    rows.append(_row(name, "timm's NaFlex, padded to 256", used, 256 * len(naflex)))
    results.write("native-padding", f"Padding of openclipart's {len(sizes):,} drawings in batches of {BATCH}", rows)
    fractions = [float(str(row["fraction of padding rows"])) for row in rows]
    assert fractions[0] < 0.01 < fractions[1]


def _row(images: str, layout: str, real: float, all_rows: float) -> results.Row:
    return {"images": images, "layout": layout, "fraction of padding rows": float(1 - real / all_rows)}
