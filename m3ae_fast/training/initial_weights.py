"""The weights that a new run starts from."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from m3ae_fast.engine.interface import Read
from m3ae_fast.model.m3ae import M3AE
from m3ae_fast.model.pretrained import Pretrained, check_start, check_weights, read_pretrained
from m3ae_fast.process.ranks import Ranks


@torch.no_grad()
def start_from(model: M3AE, source: str, ranks: Ranks) -> str:
    """Copy the weights that `model.init_from` names into a model on the CPU, on every rank; rank 0 reads them. A source
    without a decoder leaves the model's as it is. Return a line for the log. Raises UserError if there is no such
    export, or a setting or weight of it does not fit the model."""

    def read() -> Pretrained:
        start = read_pretrained(source)
        check_start(model.config, start, source)
        check_weights(model, start.state, f"model.init_from {source}")
        return start

    start = ranks.on_main(read)
    has_decoder = ranks.from_main(start is None or start.has_decoder)
    own = model.state_dict()
    for name in ranks.from_main(list(start.state) if start else []):
        own[name].copy_(ranks.from_main(start.state[name] if start else own[name]))
    without = "" if has_decoder else ", which has no decoder: the decoder starts from random weights"
    return f"weights from {source}{without}"


@torch.no_grad()
def constants(model: nn.Module, read: Read | None) -> dict[str, Tensor]:
    """Return copies of the weights that training does not change and engines leave out of their state: stored
    positions.

    To be called before an engine casts the model. `read`: gives a checkpoint's, which the model takes over.
    """
    trained = {name for name, _ in model.named_parameters()}
    fixed = {name: tensor for name, tensor in model.state_dict().items() if name not in trained}
    if read:
        for name, tensor in fixed.items():
            tensor.copy_(read(f"model/{name}", 0, tensor.numel()).view_as(tensor))
    return {name: tensor.clone() for name, tensor in fixed.items()}
