"""Import of the Triton kernels before a test sets TRITON_INTERPRET."""

import pkgutil
from importlib import import_module

import m3ae_kernels.triton_impl


def import_kernels() -> None:
    """Import all modules with Triton kernels. A kernel stays what it is when its module is first imported: compiled, or
    interpreted if TRITON_INTERPRET is set at that time, also for later tests in the same process."""
    for module in pkgutil.iter_modules(m3ae_kernels.triton_impl.__path__):
        import_module(f"m3ae_kernels.triton_impl.{module.name}")
