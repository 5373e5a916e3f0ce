"""Common dispatch logic of all ops: choice of implementation and dtype, and validation of arguments."""

import functools
import os
import warnings
from types import EllipsisType

import torch
from torch import Tensor

from . import tuning

IMPLS = ("auto", "triton", "torch")
ENV = "M3AE_KERNELS_IMPL"
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # floating-point dtypes of all ops
Shape = tuple[int | EllipsisType | None, ...]  # None stands for any size, a leading `...` for any number of dimensions


def requested_impl(impl: str) -> str:
    """Return the requested implementation: the value of M3AE_KERNELS_IMPL if it is set and `impl` is "auto", otherwise
    `impl`.

    Call this function before an op and never inside it, because compiled graphs are cached by the op's arguments.

    Raises:
        ValueError: the name is unknown.
    """
    if impl == "auto":
        impl = os.environ.get(ENV, "auto")
    if impl not in IMPLS:
        raise ValueError(f"impl is {impl!r} (from the argument or {ENV}), but must be one of {', '.join(IMPLS)}")
    return impl


def choose_impl(impl: str, device: torch.device, dtype: torch.dtype | None = None) -> str:
    """Return "triton" or "torch": the requested implementation or, for "auto", the best one for the device. On a GPU,
    float64 always runs on torch, because in float64, some Triton kernels do not compile, and others spill registers.

    Raises:
        ValueError: the name is unknown, or it is "triton" for a CPU without Triton's interpreter.
    """
    impl = requested_impl(impl)
    if device.type == "cuda" and dtype == torch.float64:
        return "torch"
    if impl == "triton" and device.type == "cpu" and not _interpreted():
        raise ValueError(
            f"impl is 'triton' (from the argument or {ENV}), but the tensors are on a CPU: use a GPU, or set "
            "TRITON_INTERPRET=1"
        )
    if impl != "auto":
        return impl
    return _on_gpu(device) if device.type == "cuda" else "torch"


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def _on_gpu(device: torch.device) -> str:
    return _best_on_gpu(device)


# This has the effect of torch.compiler.assume_constant_result, but does not import torch._dynamo, which takes longer
# than importing torch.
_on_gpu._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _best_on_gpu(device: torch.device) -> str:
    """Return "triton" if the Triton kernels support the device. Otherwise, return "torch" and issue a warning, once per
    device."""
    if tuning.fits(device):
        return "triton"
    oldest = ".".join(map(str, tuning.OLDEST))
    warnings.warn(
        f"m3ae_kernels: on {torch.cuda.get_device_name(device)}, the ops run on torch: the Triton kernels need a GPU "
        f"of compute capability {oldest} or higher",
        stacklevel=5,
    )
    return "torch"


def compute_dtype(activations: Tensor, weight: Tensor) -> torch.dtype:
    """Return the dtype of the matmul of `activations` with `weight`. If autocast is enabled, this is autocast's dtype
    (except for float64, as in torch). Otherwise, it is the dtype of the activations or, for integer activations
    (pixels), the dtype of the weight."""
    own = activations.dtype if activations.is_floating_point() else weight.dtype
    device = activations.device.type
    if own != torch.float64 and device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return own


def no_autocast(tensor: Tensor) -> torch.autocast:
    """Return a context manager that disables autocast, because the ops choose their dtypes themselves."""
    return torch.autocast(tensor.device.type, enabled=False)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums and losses: float32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def wants_grad(*tensors: Tensor | None) -> bool:
    """Return whether autograd requires the gradient of any of the tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def as_rows(tensor: Tensor, inner: int) -> Tensor:
    """Return the tensor with all dimensions except the last `inner` flattened into one: the tensor itself, a view, or a
    copy if its strides allow no view."""
    lead = tensor.dim() - inner
    if lead == 1:
        return tensor
    return tensor.flatten(0, lead - 1) if lead else tensor[None]


def with_lead(rows: Tensor, lead: torch.Size) -> Tensor:
    """Return rows [N, ...] reshaped to [*lead, ...], the inverse of `as_rows`."""
    return rows if len(lead) == 1 else rows.reshape(lead + rows.shape[1:])


def is_integer(value: object) -> bool:
    """Return whether a value is an integer; integers of numpy are included."""
    return isinstance(value, int) or hasattr(value, "__index__")  # torch.compile supports only the first test


def check_number(name: str, value: object) -> None:
    """Raise TypeError unless `value` is a number; numbers of numpy are included."""
    if not isinstance(value, int | float) and not hasattr(value, "__float__"):
        raise TypeError(f"{name} is {value!r}, but must be a number")


def check_tensor(name: str, tensor: object) -> None:
    """Raise TypeError unless `tensor` is a dense tensor."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, but its layout is {tensor.layout}")


def check_float(name: str, tensor: Tensor, shape: Shape, like: Tensor) -> None:
    """Raise TypeError or ValueError unless `tensor` is floating-point and has this shape and the device of `like`."""
    check_tensor(name, tensor)
    if hasattr(tensor, "full_tensor"):
        raise TypeError(
            f"{name} is a DTensor: pass {name}.full_tensor(), or use a module of m3ae_kernels that owns {name}, and "
            "wrap this module with fully_shard"
        )
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} must be floating-point with 16, 32 or 64 bits, not {tensor.dtype}")
    _check_shape(name, tensor, shape)
    _check_device(name, tensor, like)


def check_index(name: str, tensor: Tensor, shape: Shape, like: Tensor) -> None:
    """Raise TypeError or ValueError unless `tensor` is int32 or int64 and has this shape and the device of `like`."""
    check_tensor(name, tensor)
    if tensor.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, not {tensor.dtype}")
    _check_shape(name, tensor, shape)
    _check_device(name, tensor, like)


def _check_shape(name: str, tensor: Tensor, shape: Shape) -> None:
    inner = shape[1:] if shape[:1] == (...,) else shape
    lead = tensor.dim() - len(inner)
    fits = lead >= 0 if len(inner) < len(shape) else lead == 0
    # `want not in (None, have)` would be true for a symbolic size of torch.compile, whatever its value
    if not fits or any(want is not None and want != have for have, want in zip(tensor.shape[lead:], inner)):
        names: dict[object, str] = {None: "?", ...: "..."}
        want = ", ".join(names.get(size, str(size)) for size in shape)
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected [{want}]")


def _check_device(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, but the other tensors are on {like.device}")
