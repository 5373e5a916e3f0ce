"""Initial weights of a new run."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from m3ae_fast.engine.interface import Read
from m3ae_fast.model.m3ae import M3AE
from m3ae_fast.model.pretrained import check_start, check_weights, missing_decoder, read_pretrained, start_for
from m3ae_fast.model.widening import words
from m3ae_fast.process.ranks import Ranks


@torch.no_grad()
def start_from(model: M3AE, source: str, ranks: Ranks) -> str:
    """Load the weights in `model.init_from` into a model on the CPU, on every rank; rank 0 reads them. If the source
    has no decoder, or a decoder with another kind of attention, the model's decoder is unchanged. If the model has more
    channels than the source, the weights are widened. Return a line for the log. Raises UserError if the export does
    not exist, or if one of its settings or weights does not fit the model."""

    def read() -> tuple[dict[str, Tensor], list[str]]:
        found = read_pretrained(source)
        start = start_for(model.config, found, norm_pix=model.loss_config.norm_pix)
        check_start(model.config, start, source)
        check_weights(model, start.state, f"model.init_from {source}")
        was, now = found.config.channels, model.config.channels
        missing = missing_decoder(found, start)
        changes = [words(was, now)] * (was != now)
        return start.state, changes + [f"{missing}, so the decoder is randomly initialised"] * bool(missing)

    state, changes = ranks.on_main(read) or ({}, [])
    changes = ranks.from_main(changes)
    own = model.state_dict()
    for name in ranks.from_main([*state]):
        own[name].copy_(ranks.from_main(state[name] if state else own[name]))
    return "; ".join([f"weights from {source}", *changes])


@torch.no_grad()
def constants(model: nn.Module, read: Read | None) -> dict[str, Tensor]:
    """Return copies of the weights that are neither trained nor part of the engine's state: position embeddings that
    were loaded from other weights.

    Call this function before an engine casts the model. `read`: reader of a checkpoint; its values are first copied to
    the model. None: the model's own values are used.
    """
    trained = {name for name, _ in model.named_parameters()}
    fixed = {name: tensor for name, tensor in model.state_dict().items() if name not in trained}
    if read:
        for name, tensor in fixed.items():
            tensor.copy_(read(f"model/{name}", 0, tensor.numel()).view_as(tensor))
    return {name: tensor.clone() for name, tensor in fixed.items()}
