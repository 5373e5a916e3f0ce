"""Registration of each op in two forms that share the implementation and the formula for the gradients.

The op is registered in `torch.library` for torch.compile, torch.export and dispatch modes such as FakeTensorMode. All
other calls use an autograd.Function, which has a fraction of the dispatcher's overhead and supports torch.func.grad.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.function import Function

PLAIN = (Tensor, nn.Parameter)
# A copy of this package that is loaded under another name (hub.py) registers its ops in a namespace with that name.
NAMESPACE = "m3ae" if __package__ == "m3ae_kernels" else __package__


class Op:
    """The op `NAMESPACE::name`, which is called with positional arguments.

    Args:
        name: name of the op.
        forward: the implementation, annotated for torch.library.
        fake: a function with the same arguments that returns empty tensors of the right shapes and dtypes.
        setup_context, backward: as for torch.library.register_autograd; None: the op is not differentiable.
    """

    def __init__(
        self,
        name: str,
        forward: Callable,
        fake: Callable,
        setup_context: Callable | None = None,
        backward: Callable | None = None,
    ) -> None:
        self.registered = torch.library.custom_op(f"{NAMESPACE}::{name}", forward, mutates_args=())
        self.registered.register_fake(fake)
        if setup_context is None or backward is None:
            self.eager = lambda *args: forward(*map(unwrapped, args))
            self.transformed = _function(name, forward, _nothing, _refusal(name, "second derivatives")).apply
            return
        self.registered.register_autograd(backward, setup_context=setup_context)
        function = _function(name, forward, setup_context, once(name, backward))
        self.transformed = function.apply
        # Function.apply inspects the signature for default arguments, which takes longer than a small op. Ops have no
        # default arguments, so the method of the base class is called. mypy accepts only instances here.
        apply = super(Function, function).apply  # type: ignore[misc]
        self.eager = lambda *args: apply(*map(unwrapped, args))

    def __call__(self, *args):
        if traced(*args):
            return self.registered(*args)
        return (self.transformed if torch._C._are_functorch_transforms_active() else self.eager)(*args)


def once(name: str, backward: Callable) -> Callable:
    """Return `backward`, wrapped so that it raises NotImplementedError if it would itself be differentiated or batched
    (`is_grads_batched=True`). torch's `once_differentiable` raises no error if the upstream gradient is a constant,
    which is the case for a loss. The gradients would then be treated as constants, so that a gradient penalty or a
    Hessian would silently be 0."""
    refuse, refuse_batch = _refusal(name, "second derivatives"), _refusal(name, "batched gradients")

    def formula(ctx, *grads):
        level = torch._C._functorch.maybe_current_level() or 0
        if level > 1 or (not level and torch.is_grad_enabled()):  # torch.func.grad always builds a graph
            refuse()
        if any(grad is not None and torch._C._functorch.is_legacy_batchedtensor(grad) for grad in grads):
            refuse_batch()
        with torch.no_grad():
            return backward(ctx, *grads)

    return formula


def unwrapped(value: object) -> object:
    """If the value is a wrapper of a finished transform of torch.func, return the tensor inside it; return any other
    value unchanged. The function that torch.func.vjp returns saves tensors in such wrappers, and kernels cannot read
    the memory of a wrapper."""
    return torch._C._functorch.unwrap_if_dead(value) if isinstance(value, Tensor) else value


def _function(name: str, forward: Callable, setup_context: Callable, backward: Callable) -> type[Function]:
    methods = {
        "forward": forward,
        "setup_context": setup_context,
        "backward": backward,
        "vmap": _refusal(name, "torch.vmap; pass all samples as rows of one call"),
        "jvp": _refusal(name, "forward-mode differentiation"),
    }
    return type(name, (Function,), {key: staticmethod(method) for key, method in methods.items()})


def _nothing(ctx, inputs, output) -> None:
    """Do nothing; the `setup_context` of ops that are not differentiable."""


def traced(*args) -> bool:
    """Return whether a call must go through torch's dispatcher. This is the case if calls are observed, for example by
    tracing. It is also the case for tensors whose memory may not contain their values: meta tensors, subclasses, zero
    tensors and lazily negated tensors."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch._C._is_tracing():
        return True
    return any(
        isinstance(x, Tensor) and (type(x) not in PLAIN or x.is_meta or x.is_neg() or x._is_zerotensor()) for x in args
    )


def _refusal(name: str, what: str) -> Callable:
    def refuse(*_):
        raise NotImplementedError(f"m3ae_kernels: {name} does not support {what}")

    return refuse
