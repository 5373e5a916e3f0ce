"""What every op decides before it runs: which implementation, which dtype, and whether its arguments make sense."""

import os

import torch
from torch import Tensor

IMPLS = ("auto", "triton", "torch")
ENV = "M3AE_KERNELS_IMPL"


def asked_impl(impl: str) -> str:
    """Return the implementation that is asked for, maybe "auto": the argument's, or else M3AE_KERNELS_IMPL's.

    Called before an op, never in it: compiled graphs are cached by the op's arguments.

    Raises:
        ValueError: there is none of that name.
    """
    if impl == "auto":
        impl = os.environ.get(ENV, "auto")
    if impl not in IMPLS:
        raise ValueError(f"impl is {impl!r}, set by the argument or by {ENV}: it must be one of {', '.join(IMPLS)}")
    return impl


def choose_impl(impl: str, device: torch.device) -> str:
    """Return "triton" or "torch": what is asked for, else what suits the device."""
    impl = asked_impl(impl)
    if impl == "auto":
        return "triton" if device.type == "cuda" else "torch"
    return impl


def compute_dtype(activations: Tensor, weight: Tensor) -> torch.dtype:
    """Return the dtype that the matmul of `activations` with `weight` runs in: autocast's where it is on (float64
    stays, as in torch), else that of the activations, or the weight's where the activations are integers (pixels)."""
    own = activations.dtype if activations.is_floating_point() else weight.dtype
    device = activations.device.type
    if own != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return own


def no_autocast(tensor: Tensor) -> torch.autocast:
    """Switch autocast off: the ops choose their dtypes themselves."""
    return torch.autocast(tensor.device.type, enabled=False)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums and losses: float32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def wants_grad(*tensors: Tensor | None) -> bool:
    """Return whether autograd will ask for the gradient of one of the tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def check_float(name: str, tensor: Tensor, shape: tuple[int | None, ...], like: Tensor) -> None:
    """Raise TypeError or ValueError unless `tensor` is floating with this shape (None: any size) on the device of
    `like`."""
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating, not {tensor.dtype}")
    _check_shape(name, tensor, shape)
    _check_device(name, tensor, like)


def check_index(name: str, tensor: Tensor, shape: tuple[int | None, ...], like: Tensor) -> None:
    """Raise TypeError or ValueError unless `tensor` holds int32 or int64 indices of this shape on the device of
    `like`."""
    if tensor.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, not {tensor.dtype}")
    _check_shape(name, tensor, shape)
    _check_device(name, tensor, like)


def check_range(name: str, ids: Tensor, rows: int, *, none: bool = False) -> None:
    """Raise IndexError unless all ids are below `rows` and, but with `none`, not negative. It reads the values: for CPU
    code alone, inside an op."""
    if len(ids) and (ids.max() >= rows or (ids.min() < 0 and not none)):
        raise IndexError(f"{name} is out of range: from {ids.min()} to {ids.max()}, with {rows} rows to choose from")


def _check_shape(name: str, tensor: Tensor, shape: tuple[int | None, ...]) -> None:
    if tensor.dim() != len(shape) or any(want is not None and have != want for have, want in zip(tensor.shape, shape)):
        want = ", ".join("?" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected [{want}]")


def _check_device(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, the other tensors are on {like.device}")
