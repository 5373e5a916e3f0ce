"""Checks of layers whose parameters are used without a call of the layer. Such a layer must not compute more than its
class does, because an adapter or a hook, for example, would have no effect."""

from torch import nn


def is_plain(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether a call of `layer` runs `kind.forward` and nothing else. It does not if the layer is of another
    class, such as an adapter or a parametrised layer, or has a hook or a forward of its own."""
    return type(layer) is kind and not _has_extras(layer)


def check_plain(role: str, layer: object, kind: type[nn.Module]) -> None:
    """Raise TypeError unless a call of `layer` runs `kind.forward` on its own parameters and nothing else. `role` is
    the name of the layer in the message."""
    name, own = f"torch.nn.{kind.__name__}", f"{type(layer).__module__}.{type(layer).__qualname__}"
    if not isinstance(layer, kind):
        raise TypeError(f"the {role} must be a {name}, not {type(layer).__name__}")
    if type(layer).forward is not kind.forward or "weight" not in layer._parameters or _has_extras(layer):
        raise TypeError(
            f"the {role} is a {own} that computes more than a {name}, such as an adapter, a hook or a parametrised "
            "weight, which would be lost"
        )


def _has_extras(layer: nn.Module) -> bool:
    before = layer._forward_pre_hooks or layer._backward_pre_hooks
    return bool("forward" in layer.__dict__ or before or layer._forward_hooks or layer._backward_hooks)
