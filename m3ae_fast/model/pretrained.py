"""A model as a folder that others can load: weights in safetensors, sizes in config.json."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from m3ae_fast.config import ModelConfig, parse
from m3ae_fast.errors import UserError

MODEL_FILE, CONFIG_FILE = "model.safetensors", "config.json"


def write_pretrained(folder: str | Path, config: ModelConfig, state: dict[str, Tensor]) -> None:
    """Write config.json and model.safetensors. Raises OSError or SafetensorError where the disk refuses."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous() for name, t in state.items()}, folder / MODEL_FILE)
    (folder / CONFIG_FILE).write_text(config.model_dump_json(indent=2) + "\n", encoding="utf-8")
    shutil.copymode(folder / CONFIG_FILE, folder / MODEL_FILE)  # safetensors would let nobody else read it


def read_pretrained(folder: str | Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """What `write_pretrained` wrote. Raises UserError where a file is missing or damaged."""
    folder = Path(folder)
    try:
        data = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        state = load_file(folder / MODEL_FILE)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder}: not an exported M3AE ({error}); make one with python -m m3ae_fast.export") from None
    return parse(ModelConfig, data, f"{folder / CONFIG_FILE}"), state


def load_weights(model: nn.Module, state: dict[str, Tensor], where: str, *, assign: bool = False) -> None:
    """Strict load; with `assign` the tensors themselves become the weights.

    Raises:
        UserError: naming the first weight that does not fit.
    """
    own = model.state_dict()
    for name in sorted(own.keys() | state.keys()):
        if name not in state:
            raise UserError(f"{where}: lacks the weight {name}; is it of another model config?")
        if name not in own:
            raise UserError(f"{where}: has a weight {name} that this model lacks; is it of another model config?")
        if own[name].shape != state[name].shape:
            raise UserError(
                f"{where}: {name} is {list(state[name].shape)}, the model config wants {list(own[name].shape)}"
            )
    model.load_state_dict(state, assign=assign)
