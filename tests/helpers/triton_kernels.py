"""Import of the Triton kernels before a test sets TRITON_INTERPRET."""

import pkgutil
from importlib import import_module

import m3ae_kernels.triton_impl


def import_kernels() -> None:
    """Import all modules with Triton kernels. The first import of a module determines, for the rest of the process,
    whether its kernels are compiled or, if TRITON_INTERPRET is set, interpreted."""
    for module in pkgutil.iter_modules(m3ae_kernels.triton_impl.__path__):
        import_module(f"m3ae_kernels.triton_impl.{module.name}")
