"""Settings of the images that a model receives, which evaluations may change."""

from __future__ import annotations

from m3ae_fast.config import ModelConfig, parse
from m3ae_fast.config.evaluation import ImageConfig
from m3ae_fast.model.encoder import MultimodalEncoder
from m3ae_fast.model.positions import Positions


def set_images(model: MultimodalEncoder, settings: ImageConfig) -> None:
    """Change settings of the images that the model will receive, such as their value range. Settings that are None are
    left unchanged. Raises UserError if the model does not support the settings."""
    given = settings.model_dump(mode="json", exclude_none=True)
    model.config = parse(ModelConfig, model.config.model_dump(mode="json") | given, "model")
    for module in model.modules():
        if isinstance(module, Positions):
            module.lay_out(model.config)
