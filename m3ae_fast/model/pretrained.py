"""Pretrained models as folders: weights in safetensors, the config in config.json, and the tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from m3ae_kernels.pixels import LARGEST
from safetensors import SafetensorError
from torch import Tensor, nn

from m3ae_fast.base.errors import UserError
from m3ae_fast.base.hub import find_folder
from m3ae_fast.base.output_folder import (
    CARD_FILE,
    CONFIG_FILE,
    MODEL_FILE,
    PREPROCESSOR_FILE,
    TOKENIZER_FILE,
    check_dtypes,
    output_folder,
    read_tensors,
    write_tensors,
)
from m3ae_fast.base.untrusted_file import read_json
from m3ae_fast.batch.tokenizer import CaptionTokenizer, load_tokenizer
from m3ae_fast.config import ModelConfig, parse
from m3ae_fast.model.widening import widened

M = TypeVar("M", bound=nn.Module)
C = TypeVar("C")
# prefixes of the weights in a file without a decoder; such a file lacks all other weights
ENCODER = ("patch_embed.", "encoder_input.", "encoder.")
_NORM_PIX = "norm_pix"  # key of loss.norm_pix in config.json, next to the settings of the model
# settings that change the function computed by the weights; most of them do not change the shapes of the weights
_UNSEEN = ("channels", "positions", "gelu", "mean_pool", "num_heads", "image_mean", "image_std", "value_range")


@dataclass(frozen=True)
class Pretrained:
    """The content of a pretrained model's folder."""

    config: ModelConfig
    state: dict[str, Tensor]  # weights by parameter name, of the encoder only or of the complete model
    tokenizer: CaptionTokenizer | None = None
    norm_pix: bool | None = None  # loss.norm_pix, with which the decoder was trained; None: unknown
    kind: str = "exported M3AE"  # kind of source, for messages
    notes: tuple[str, ...] = ()  # notes for the user

    @property
    def has_decoder(self) -> bool:
        """Return whether the weights include those of a decoder."""
        return not is_encoder(self.state)


def is_encoder(names: Iterable[str]) -> bool:
    """Return whether weights with these names belong to an encoder without a decoder."""
    return all(name.startswith(ENCODER) for name in names)


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """Return a digest of the names and values of weights: 12 hexadecimal digits of their SHA-256."""
    digest = hashlib.sha256()
    for name, tensor in state.items():
        digest.update(name.encode() + tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def write_pretrained(folder: str | Path, model: Pretrained, card: str | None = None) -> None:
    """Write `model` atomically as a folder for `read_pretrained`. `card`: content of its README.md. Raises UserError if
    the folder holds other files or cannot be written."""
    with output_folder(folder) as path:
        write_tensors(path / MODEL_FILE, model.state)
        config = model.config.model_dump(mode="json", exclude={"init_from"})
        if model.norm_pix is not None:
            config[_NORM_PIX] = model.norm_pix
        (path / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        prepared = json.dumps(_preprocessing(model.config), indent=2)
        (path / PREPROCESSOR_FILE).write_text(prepared + "\n", encoding="utf-8")
        if model.tokenizer is not None:
            model.tokenizer.save(path / TOKENIZER_FILE)
        if card is not None:
            (path / CARD_FILE).write_text(card, encoding="utf-8")


def _preprocessing(config: ModelConfig) -> dict[str, Any]:
    """Return the preprocessing of images as the config of a transformers image processor. Perceiver's processor is
    used because it crops the central square before resizing; the other processors crop afterwards."""
    size = {"height": config.image_size, "width": config.image_size}
    return {
        "image_processor_type": "PerceiverImageProcessor",
        "do_convert_rgb": config.channels == 3,
        "do_resize": True,
        "size": size,
        "resample": 3,  # Pillow's bicubic
        "do_center_crop": True,
        "crop_size": size,
        "do_rescale": True,
        "rescale_factor": 1 / LARGEST.get(getattr(torch, config.image_dtype), 1),
        "do_normalize": True,
        "image_mean": config.image_mean,
        "image_std": config.image_std,
    }


def read_pretrained(source: str | Path) -> Pretrained:
    """Read a folder written by `write_pretrained`, or a model from the Hub by its name. Raises UserError if there is no
    such folder or model, or if a file is missing or damaged."""
    folder = find_folder(source)
    if folder.is_file():
        raise UserError(
            f"{source}: is not an exported M3AE, which is a folder, but a file; if it contains the weights of a timm "
            f"model, write timm:NAME={source} where timm models are accepted"
        )
    data = _content(source, folder / CONFIG_FILE, read_json)
    if isinstance(data, dict) and "architecture" in data:
        name = f"timm:{'local-dir' if Path(source).exists() else 'hf-hub'}:{source}"
        raise UserError(
            f"{source}: is not an exported M3AE but a timm model; convert it with m3ae-fast convert, or, where timm "
            f"models are accepted, write {name}"
        )
    state = _content(source, folder / MODEL_FILE, read_tensors)
    norm_pix = data.pop(_NORM_PIX, None) if isinstance(data, dict) else None
    if not isinstance(norm_pix, bool | None):
        raise UserError(f"{folder / CONFIG_FILE}: {_NORM_PIX}: must be true or false")
    config = parse(ModelConfig, data, f"{folder / CONFIG_FILE}")
    tokenizer, path = None, folder / TOKENIZER_FILE
    if config.vocab_size and path.is_file():
        tokenizer = load_tokenizer(str(path), config.text_length, config.vocab_size, label="tokenizer")
    return Pretrained(config, state, tokenizer, norm_pix)


def _content(source: str | Path, file: Path, read: Callable[[Path], C]) -> C:
    """Return the content of a file of the folder `source`. Raises UserError if the file is missing or damaged."""
    try:
        return read(file)
    except FileNotFoundError:
        reason = f"it contains no {file.name}"
    except (OSError, ValueError, SafetensorError) as error:
        reason = f"its {file.name} cannot be read: {error}"
    raise UserError(f"{source}: is not an exported M3AE ({reason}); create one with m3ae-fast convert")


def start_for(config: ModelConfig, found: Pretrained, *, norm_pix: bool) -> Pretrained:
    """Return the weights with which a model of this config starts. If the model has more channels, the weights are
    widened. Only the weights of the encoder are returned if the decoder was trained with the other kind of attention,
    or if the model predicts features and the decoder was trained for other targets. `norm_pix`: loss.norm_pix of the
    model."""
    if config.channels > found.config.channels:
        state = widened(found.state, found.config, config, norm_pix)
        of_images = {name: getattr(config, name) for name in ("channels", "image_mean", "image_std")}
        found = replace(found, state=state, config=found.config.model_copy(update=of_images))
    targets, own = ((c.image_targets, c.target_width) for c in (found.config, config))
    other_targets = config.image_targets == "features" and targets != own
    if found.has_decoder and (other_targets or found.config.dec_attention != config.dec_attention):
        encoder = {name: tensor for name, tensor in found.state.items() if name.startswith(ENCODER)}
        return replace(found, state=encoder)
    return found


def missing_decoder(found: Pretrained, start: Pretrained) -> str:
    """Return the reason why a model has a randomly initialised decoder; "" if its decoder is loaded from the weights.
    `found`: the weights; `start`: the result of `start_for` for them."""
    if start.has_decoder:
        return ""
    if found.has_decoder:
        c = found.config
        kind = f"model.dec_attention={c.dec_attention} and model.image_targets={c.image_targets}"
        return f"the decoder of the weights was trained with {kind}"
    return "the weights contain no decoder"


def check_start(config: ModelConfig, start: Pretrained, where: str) -> None:
    """Raise UserError with the name of the first setting that would change the function computed by the weights of
    `start`."""
    unseen = (*_UNSEEN, "dec_num_heads", "image_targets") if start.has_decoder else _UNSEEN
    if start.config.resize == config.resize == "native":  # native_positions does not affect square images
        unseen = (*unseen, "native_positions")
    for name in unseen:
        was, now = getattr(start.config, name), getattr(config, name)
        if was is not None and was != now:
            raise UserError(f"model.init_from {where}: was trained with model.{name} = {was}, but the config has {now}")


def build(make: Callable[[], M], state: dict[str, Tensor], where: str) -> M:
    """Return the module that `make` creates, with the weights `state`. The module's sizes come from an untrusted file,
    so no memory is allocated until they are known to match the weights. Raises the same errors as `check_weights`."""
    with torch.device("meta"):
        check_weights(make(), state, where)
    model = make()
    model.load_state_dict(state, strict=False)
    return model


def load_weights(model: nn.Module, state: dict[str, Tensor], where: str, *, assign: bool = False) -> bool:
    """Load weights strictly, except that the complete decoder may be missing and is then left unchanged. Return whether
    the decoder was present. `assign`: use the tensors themselves as weights instead of copying. Raises UserError with
    the name of the first weight that does not fit; see `check_weights`."""
    check_weights(model, state, where)
    model.load_state_dict(state, strict=False, assign=assign)
    return not is_encoder(state)


def check_weights(model: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Raise UserError with the name of the first weight that is missing, superfluous, not finite, of another shape, or
    of a dtype that weights cannot have, as `load_weights` does. `where`: source of the weights, for messages."""
    check_dtypes(state, where)
    own = model.state_dict()
    if is_encoder(state):
        own = {name: tensor for name, tensor in own.items() if name.startswith(ENCODER)}
    for name in sorted(own.keys() | state.keys()):
        if name not in state:
            raise UserError(f"{where}: the weight {name} is missing; check that the model config fits these weights")
        if name not in own:
            raise UserError(
                f"{where}: the weight {name} does not exist in this model; check that the model config fits"
            )
        if own[name].shape != state[name].shape:
            raise UserError(
                f"{where}: {name} has shape {list(state[name].shape)}, "
                f"but the model config expects {list(own[name].shape)}"
            )
        if not state[name].isfinite().all():
            raise UserError(f"{where}: {name} is not finite")
