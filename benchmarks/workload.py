"""Synthetic training batches with the same samples and masks in the engine's packed layout and in the padded layout."""

from __future__ import annotations

import torch

from benchmarks.reference import PaddedBatch
from m3ae_fast.base.hardware import fast_precision
from m3ae_fast.batch.masking import draw_mask, draw_predicted
from m3ae_fast.batch.packed import PackedBatch
from m3ae_fast.batch.packing import Geometry, Sample, pack
from m3ae_fast.config import (
    Config,
    DataConfig,
    MaskingConfig,
    ModelConfig,
    OptimConfig,
    SourceConfig,
    TrainConfig,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# precision of the expert and of the engine: the faster one on this machine
PRECISION = fast_precision(DEVICE)
IMAGE_SIZE = ModelConfig.model_fields["image_size"].default  # pixels, as in the shipped configs
WORDS = (8, 32)  # minimum and maximum number of valid tokens of a caption


def make_config(
    model: ModelConfig,
    samples: int,
    *,
    masking: MaskingConfig | None = None,
    optim: OptimConfig | None = None,
    **train,
) -> Config:
    """Return a config for an engine that receives its batches directly, without a loader. `train`: settings of the
    section train."""
    return Config(
        model=model,
        masking=masking or MaskingConfig(),
        optim=optim or OptimConfig(),
        data=DataConfig(train=[SourceConfig(shards="none")]),
        train=TrainConfig(global_batch=samples, steps=1, **train),
        deepspeed=None,
    )


def make_batch(
    config: Config, samples: int, *, seed: int = 0, words: tuple[int, int] = WORDS
) -> tuple[PackedBatch, PaddedBatch]:
    """Return a batch in both layouts, with random images, captions whose lengths are uniform within `words`, and masks
    that are sampled in the same way as in the loader."""
    m, masking = config.model, config.masking
    rng = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (samples, m.channels, m.image_size, m.image_size), dtype=torch.uint8, generator=rng)
    lengths = torch.randint(words[0], words[1] + 1, (samples,), generator=rng).tolist()
    tokens = torch.randint(m.vocab_size, (samples, m.text_length), generator=rng)
    image_mask = torch.stack([draw_mask(m.patches_per_image, masking.image_ratio, rng) for _ in range(samples)])
    text_mask = torch.stack([draw_mask(m.text_length, masking.text_ratio, rng) for _ in range(samples)])
    padding = torch.arange(m.text_length) >= torch.tensor(lengths)[:, None]

    rows = zip(images, image_mask, tokens, text_mask, lengths)
    packed = [Sample(str(i), im, mask, t[:n], tm[:n]) for i, (im, mask, t, tm, n) in enumerate(rows)]
    for sample in packed:
        sample.image_predicted = draw_predicted(sample.image_mask, masking.image_predicted, rng)
        sample.text_predicted = draw_predicted(sample.text_mask, masking.text_predicted, rng)
    cross = m.dec_attention == "cross"
    geometry = Geometry(m.image_size, m.patch_size, m.channels, m.text_length, cross=cross)
    mean, std = (torch.tensor(v)[:, None, None] for v in (m.image_mean, m.image_std))
    padded = PaddedBatch.of((images / 255 - mean) / std, image_mask, tokens.masked_fill(padding, 0), text_mask, padding)
    return pack(packed, geometry, repeat_shapes=True), padded
