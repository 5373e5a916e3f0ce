"""Adapters, hooks and replaced layers have an effect on every linear layer of the model, although fused ops read the
parameters of some layers without calling them."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize

from m3ae_fast.batch.packing import pack
from m3ae_fast.model import transformer
from m3ae_fast.model.m3ae import M3AE
from tests.test_model import MIXED, TINY

KINDS = {name: TINY.model_copy(update={"dec_attention": name}) for name in ("self", "cross")}
LAYERS = [
    (kind, name)
    for kind, config in KINDS.items()
    for name, module in M3AE(config).named_modules()
    if isinstance(module, nn.Linear)
]


class LoRA(nn.Module):
    """A low-rank adapter (arXiv 2106.09685) with the attributes of the layer that it contains, as in PEFT."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.down = nn.Linear(base_layer.in_features, 2, bias=False)
        self.up = nn.Linear(2, base_layer.out_features, bias=False)

    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.up(self.down(x))


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def adapt(model: nn.Module, name: str) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, LoRA(model.get_submodule(name)))


def subclass(model: nn.Module, name: str) -> None:
    layer = model.get_submodule(name)
    layer.__class__ = type("Own", (type(layer),), {"forward": lambda self, x: 2 * nn.Linear.forward(self, x)})


def replace_forward(model: nn.Module, name: str) -> None:
    layer = model.get_submodule(name)
    layer.forward = lambda x: 2 * nn.Linear.forward(layer, x)


def parametrise(model: nn.Module, name: str) -> None:
    parametrize.register_parametrization(model.get_submodule(name), "weight", Doubled())


def add_hook(model: nn.Module, name: str) -> None:
    model.get_submodule(name).register_forward_hook(lambda layer, args, out: 2 * out)


def add_pre_hook(model: nn.Module, name: str) -> None:
    model.get_submodule(name).register_forward_pre_hook(lambda layer, args: (2 * args[0], *args[1:]))


def add_backward_hook(model: nn.Module, name: str) -> None:
    def doubled(layer: nn.Module, grads: tuple, _: tuple) -> tuple:
        return tuple(2 * grad for grad in grads)

    model.get_submodule(name).register_full_backward_hook(doubled)


CHANGES = [adapt, subclass, replace_forward, parametrise, add_hook, add_pre_hook]


@pytest.fixture
def fused(monkeypatch):
    """Let every machine use the fused path, which requires AVX-512. Return a list of the inputs of all calls."""
    calls: list[Tensor] = []

    def mlp(x: Tensor, weight_HI: Tensor, bias_H: Tensor, weight_OH: Tensor, bias_O: Tensor) -> Tensor:
        calls.append(x)
        return F.linear(F.gelu(F.linear(x, weight_HI, bias_H), approximate="tanh"), weight_OH, bias_O)

    monkeypatch.setattr(transformer, "mlp", mlp)
    return calls


def built(kind: str) -> M3AE:
    torch.manual_seed(0)
    return M3AE(KINDS[kind])


def loss(model: M3AE) -> Tensor:
    return model(pack(MIXED, model.geometry)).loss


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(("kind", "name"), LAYERS)
def test_a_change_of_a_linear_layer_changes_the_loss(fused, kind: str, name: str, change: Callable):
    model = built(kind)
    before = loss(model)
    change(model, name)
    after = loss(model)
    assert abs(after - before) > 1e-6 * abs(before)
    after.backward()
    if change is adapt:
        adapter = model.get_submodule(name)
        assert all(p.grad.norm() > 0 for p in (adapter.down.weight, adapter.up.weight, adapter.base_layer.weight))


@pytest.mark.parametrize(("kind", "name"), LAYERS)
def test_an_adapter_that_adds_nothing_changes_nothing(fused, kind: str, name: str):
    """An adapter whose weights are 0 does not change the loss. If only some rows are needed, the model selects them
    before a plain layer, but after a layer with an adapter."""
    model = built(kind)
    before = loss(model)
    adapt(model, name)
    nn.init.zeros_(model.get_submodule(name).up.weight)
    torch.testing.assert_close(loss(model), before)


@pytest.mark.parametrize("name", ["encoder.blocks.0.mlp.fc1", "decoder.blocks.1.mlp.fc2"])
def test_a_backward_hook_of_a_linear_layer_changes_gradients(fused, name: str):
    model = built("self")
    (before,) = torch.autograd.grad(loss(model), model.encoder_input.cls_token)
    add_backward_hook(model, name)
    (after,) = torch.autograd.grad(loss(model), model.encoder_input.cls_token)
    assert (after - before).norm() > 1e-6 * before.norm()


def test_a_hook_of_all_modules_sees_every_linear_layer(fused):
    model, seen = built("self"), set()
    with register_module_forward_hook(lambda module, *_: seen.add(module)):
        loss(model)
    assert seen >= {module for module in model.modules() if isinstance(module, nn.Linear)}


def test_unchanged_layers_are_fused(fused):
    loss(built("self"))
    assert len(fused) == TINY.depth + TINY.dec_depth


@pytest.mark.slow  # takes several seconds
def test_unchanged_layers_are_fused_in_compiled_code(fused):
    layer, x = built("self").encoder.blocks[0].mlp, torch.ones(3, TINY.emb_dim)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), layer(x)) and len(fused) == 2
