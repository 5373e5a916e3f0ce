"""Comparison of all quantities in golden files with this implementation."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from rich.console import Console
from rich.markup import escape

from m3ae_fast.base.errors import UserError
from m3ae_fast.base.hardware import chosen_device
from m3ae_fast.verify import finetune, linear_probe, pretraining, vqgan
from m3ae_fast.verify.golden import Golden, Quantity, relative_error

# The function for each kind of file, by the key of an array that occurs only in files of this kind.
_KINDS = {
    "in/features": linear_probe.quantities,
    "in/soft_labels": finetune.quantities,
    "params/quantizer/codebook": vqgan.quantities,
}


def quantities(golden: Golden, device: torch.device, dtype: torch.dtype) -> Iterator[Quantity]:
    """Yield all comparisons of a file of any kind, computed on `device` in `dtype`. Raises UserError if an array is
    missing or has a wrong shape."""
    replay = next((replay for key, replay in _KINDS.items() if key in golden.arrays), pretraining.quantities)
    try:
        yield from replay(golden, device, dtype)
    except (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"{golden.path}: cannot be replayed ({type(error).__name__}: {reason}); check that the file is complete"
        ) from None


def compare(args: argparse.Namespace) -> int:
    """Compare all files, print one line per quantity, and return the exit status: 0 if all quantities agree, otherwise
    1. Raises UserError for an invalid file or device."""
    console, device = Console(highlight=False, soft_wrap=True), chosen_device(args.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    total = failed = 0
    for file in args.files:
        console.print(f"[bold]{escape(file)}[/bold]")
        for name, ours, official, tolerance in quantities(Golden.load(file), device, getattr(torch, args.dtype)):
            error = relative_error(ours, official)
            good = error <= tolerance  # False for NaN
            total, failed = total + 1, failed + (not good)
            mark = "[green]ok  [/green]" if good else "[red]FAIL[/red]"
            console.print(f"  {mark} {error:9.2e} <= {tolerance:.0e}  {name}")
    files = f"{len(args.files)} file" + "s" * (len(args.files) != 1)
    console.print(f"{total - failed} of {total} quantities of {files} agree with the official implementation")
    return 1 if failed else 0
