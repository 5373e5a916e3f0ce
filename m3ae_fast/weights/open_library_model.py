"""Opening of a vision model of timm or transformers by its name."""

from m3ae_fast.weights.library_model import LibraryModel
from m3ae_fast.weights.model_name import TIMM
from m3ae_fast.weights.timm_model import open_timm_model
from m3ae_fast.weights.transformers_model import open_transformers_model


def open_library_model(name: str) -> LibraryModel:
    """Return the model of a name that begins with "timm:" or "transformers:", on the CPU. Raises UserError as
    `open_timm_model` and `open_transformers_model` do."""
    return open_timm_model(name) if name.startswith(TIMM) else open_transformers_model(name)
