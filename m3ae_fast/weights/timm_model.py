"""Opening of timm's vision models by the names on the command line: `timm:NAME` and `timm:NAME=FILE`, with `NAME@SIDE`
in place of NAME for images of another size. NAME may be a folder or a repository that timm has written:
`local-dir:FOLDER` or `hf-hub:OWNER/NAME`."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from torch import Tensor

from m3ae_fast.base.errors import UserError
from m3ae_fast.base.libraries import library
from m3ae_fast.weights.importing import read_weights
from m3ae_fast.weights.library_model import LibraryModel, accepting, normalisation, reason
from m3ae_fast.weights.model_name import TIMM, split_side


def open_timm_model(name: str) -> LibraryModel:
    """Return a timm model, with the size and the normalisation of the images with which it was trained.

    Args:
        name: "timm:NAME" for a model whose weights timm downloads, or "timm:NAME=FILE" for weights from a file, which
            must be a safetensors file or a torch file that can be read with `weights_only`. NAME is that of a model in
            timm, or "local-dir:FOLDER" or "hf-hub:OWNER/NAME" for a folder or a repository with timm's config.json and
            weights. "NAME@SIDE" in place of NAME is the model for images of SIDE x SIDE pixels; the position embeddings
            of a ViT are interpolated.

    Raises:
        UserError: timm is not installed or does not know the model, the weights cannot be loaded or belong to another
            model, or the images are not square.
    """
    timm = library("timm", name)
    own, equals, file = name.removeprefix(TIMM).partition("=")
    own, wanted = split_side(own, name)
    if equals and not file:  # for example, because the file is a shell variable that is not set
        raise UserError(f"{name}: there is no file after =; to download the weights, write {name[:-1]}")
    if not own:
        raise UserError(f"{name}: there is no name of a model after {TIMM}; timm.list_models() returns all names")
    try:
        # With num_classes=0, timm would ignore that weights are missing.
        network = timm.create_model(own, pretrained=not file)
    except Exception as error:  # timm and the libraries for downloads raise many kinds of errors
        near = [] if ":" in own or timm.is_model(own) else get_close_matches(own, timm.list_models(), n=1)
        meant = f"; did you mean {TIMM}{near[0]}?" if near else ""
        raise UserError(f"{name}: timm cannot open the model {own} ({reason(error)}){meant}") from None
    if hasattr(network, "reset_classifier"):  # otherwise, it has no classifier
        network.reset_classifier(0)
    if file:
        _load(network, read_weights(file), name)
    about: dict[str, Any] = network.pretrained_cfg
    channels, side, columns = about["input_size"]
    mean, std = normalisation(about, ("mean", "std"), channels, name)
    if side != columns:
        raise UserError(f"{name}: its images of {side} x {columns} pixels are not square, which is not supported")
    if wanted not in (None, side) and hasattr(network, "set_input_size"):
        accepting(lambda: network.set_input_size(img_size=wanted), name, wanted)
    images = wanted or side, channels, mean, std
    return LibraryModel(network.eval().requires_grad_(False), f"timm's {about['architecture']}", *images)


def _load(network: Any, weights: dict[str, Tensor], name: str) -> None:
    """Load weights into a network without a classifier. Raises UserError unless they are those of this network; a
    classifier in the file is left out."""
    own, about = network.state_dict(), network.pretrained_cfg
    heads = about.get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    for key in own:
        if key not in weights:
            raise UserError(f"{name}: the file lacks the weight {key} of this model")
        if weights[key].shape != own[key].shape:
            shapes = f"{[*weights[key].shape]}, not {[*own[key].shape]}"
            raise UserError(f"{name}: the weight {key} in the file has the shape {shapes}")
    for key in weights.keys() - own.keys():
        if not any(key.startswith(f"{head}.") for head in heads):
            raise UserError(f"{name}: the file has a weight {key}, which this model does not have")
    network.load_state_dict({key: weights[key] for key in own})
