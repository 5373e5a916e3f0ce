"""Figures that are plotted at each checkpoint during training: reconstructions and attention maps."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from m3ae_fast.batch.masking import UNMASKED
from m3ae_fast.batch.tokenizer import CaptionTokenizer
from m3ae_fast.config import Config
from m3ae_fast.data import Corpus, Preparation, eval_samples
from m3ae_fast.drawing.attention import draw_attention
from m3ae_fast.drawing.reconstructions import can_draw, draw_run, open_weights


def draw_training(
    config: Config, weights: dict[str, Tensor], corpus: Corpus, tokenizer: CaptionTokenizer | None
) -> dict[str, Path]:
    """Plot samples of `corpus`, write the figures to the run folder, and return their paths by name. The name
    "reconstructions" is included if at least one sample is valid and the model's predictions can be drawn. The name
    "attention" is included if at least one sample has an image. See `draw_run` for the arguments and errors."""
    folder, count = config.run.dir, config.train.pictures
    drawn = {}
    if can_draw(config.model) and draw_run(config, weights, corpus, tokenizer, folder / "reconstructions.png", count):
        drawn["reconstructions"] = folder / "reconstructions.png"
    model = open_weights(config, weights).eval()
    model.tokenizer = tokenizer
    samples = eval_samples(corpus, Preparation(model.geometry, UNMASKED, tokenizer, config.run.seed), count)
    if any(sample.image is not None for sample in samples):
        drawn["attention"] = folder / "attention.png"
        draw_attention(model, samples, drawn["attention"], count, channels=config.data.show_channels)
    return drawn
