"""python -m m3ae_fast.verify FILE.npz ...: is this model the official M3AE?

Rebuilds the model of each golden file, loads its parameters, replays its masks, and compares every number that the
official implementation computed: outputs, losses, gradients, features, and some AdamW steps.

Shapes: S samples, L patches, X text positions, T encoder rows, M decoder rows, D and E widths.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from torch import Tensor

from m3ae_fast.engine.optimizer import build_adamw, clip_by_global_norm
from m3ae_fast.errors import UserError, exit_cleanly
from m3ae_fast.golden import Golden, flax_name
from m3ae_fast.model.m3ae import M3AE
from m3ae_fast.model.packing import pack
from m3ae_fast.vqgan_golden import vqgan_quantities

TOLERANCE = 2e-5  # outputs, losses, gradients in float32
TOLERANCE_AFTER_STEPS = 2e-4  # parameters after AdamW: its division turns rounding into step-sized differences
Quantity = tuple[str, Tensor, Tensor, float]  # name, ours, official, tolerance


def quantities(golden: Golden, device: torch.device, dtype: torch.dtype) -> Iterator[Quantity]:
    """All comparisons of one file."""
    model = golden.build_model(dtype).to(device)
    batch = pack(golden.samples(), model.geometry).to(device)
    yield from _encoder_outputs(golden, model, batch)
    yield from _decoder_outputs(golden, model, device)
    yield from _losses_and_gradients(golden, model, batch)
    if (official := golden.get("out/representation")) is not None:
        yield _representation(golden, model, official, device)
    yield from _steps(golden, model, batch)


@torch.no_grad()
def _encoder_outputs(golden: Golden, model: M3AE, batch) -> Iterator[Quantity]:
    encoded_TD = model.encode(batch).float().cpu()
    starts = batch.encoder.cu_seqlens.tolist()
    samples = golden.samples()
    cls, image, text = ([], []), ([], []), ([], [])
    for i, (start, sample) in enumerate(zip(starts, samples)):
        cls[0].append(encoded_TD[start])
        cls[1].append(golden.arrays["out/encoder_cls"][i, 0])
        row = start + 1
        if sample.image is not None:
            # ours lie in reading order, the official ones in shuffled order
            order = np.argsort(np.argsort(golden.kept("image")))
            image[0].append(encoded_TD[row + order])
            image[1].append(golden.arrays["out/encoder_image"][i])
            row += len(order)
        if sample.tokens is not None:
            kept = golden.kept("text")
            valid = golden.valid(i).numpy()[kept]
            order = np.argsort(np.argsort(kept[valid]))
            text[0].append(encoded_TD[row + order])
            text[1].append(golden.arrays["out/encoder_text"][i][valid])
    for name, (ours, official) in (("cls", cls), ("image", image), ("text", text)):
        if ours:
            yield f"encoder_{name}", _rows(ours), _rows(official), TOLERANCE


def _rows(parts: list) -> Tensor:
    parts = [torch.as_tensor(part) for part in parts]
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])


def _decoder_outputs(golden: Golden, model: M3AE, device: torch.device) -> Iterator[Quantity]:
    everywhere = replace(model.geometry, image_all_tokens=True, text_all_tokens=True)
    samples = golden.samples()
    pixels_IK, logits_WV = model.predict(pack(samples, everywhere).to(device))
    if (official := golden.get("out/image_output")) is not None:
        yield "image_output", pixels_IK, torch.from_numpy(official).flatten(0, 1), TOLERANCE
    if (official := golden.get("out/text_output")) is not None:
        valid = torch.stack([golden.valid(i) for i in range(len(samples))])
        yield "text_output", logits_WV, torch.from_numpy(official)[valid], TOLERANCE


def _losses_and_gradients(golden: Golden, model: M3AE, batch) -> Iterator[Quantity]:
    model.zero_grad(set_to_none=True)
    losses = model(batch)
    losses.loss.backward()
    for name in ("loss", "image_loss", "text_loss", "text_accuracy"):
        if (official := golden.get(f"out/{name}")) is not None:
            yield name, getattr(losses, name).detach(), torch.as_tensor(official), TOLERANCE
    for name, p in model.named_parameters():
        yield f"grad {_flax(golden, name)}", p.grad, golden.parameter("grads", name), TOLERANCE


def _representation(golden: Golden, model: M3AE, official: np.ndarray, device: torch.device) -> Quantity:
    images, text, padding = (golden.get(f"in/{name}") for name in ("image_u8", "text", "text_padding_mask"))
    ours = model.representation(
        None if images is None else torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(device),
        None if text is None else torch.from_numpy(text),
        None if padding is None else torch.from_numpy(padding),
    )
    valid = torch.ones(official.shape[:2], dtype=torch.bool)
    if padding is not None:
        valid[:, -padding.shape[1] :] = torch.from_numpy(padding) == 0
    return "representation", ours.detach().cpu()[valid], torch.from_numpy(official)[valid], TOLERANCE


def _steps(golden: Golden, model: M3AE, batch) -> Iterator[Quantity]:
    golden.load_parameters(model)
    optimizer = build_adamw(model, golden.optim)
    trajectory = []
    for _ in range(golden.meta["steps"]):
        optimizer.zero_grad()
        losses = model(batch)
        losses.loss.backward()
        trajectory.append(losses.loss.item())
        clip_by_global_norm(list(model.parameters()), golden.optim.clip_grad)
        for group in optimizer.param_groups:
            group["lr"] = golden.meta["lr"]
        optimizer.step()
    yield "loss_trajectory", torch.tensor(trajectory), torch.from_numpy(golden.arrays["out/loss_trajectory"]), TOLERANCE
    for name, p in model.named_parameters():
        ours, official = p.detach().cpu(), golden.parameter("params_after", name)
        if name.endswith("qkv.bias"):
            # softmax does not see the keys' bias: its gradient is rounding alone, which Adam blows up to steps
            ours, official = (torch.stack((b.chunk(3)[0], b.chunk(3)[2])) for b in (ours, official))
        yield f"after {_flax(golden, name)}", ours, official, TOLERANCE_AFTER_STEPS


def _flax(golden: Golden, name: str) -> str:
    return flax_name(name, golden.meta["config"]["output_head_depth"])


def _replay(golden: Golden, device: torch.device, dtype: torch.dtype) -> Iterator[Quantity]:
    """`quantities` or those of a VQGAN, with a UserError for whatever a file lacks or has in a wrong shape."""
    replay = vqgan_quantities if "codebook_size" in golden.meta else quantities
    try:
        yield from replay(golden, device, dtype)
    except (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(f"{golden.path}: cannot be replayed ({type(error).__name__}: {reason}); is it whole?") from None


def _device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: not to be had here ({str(error).splitlines()[0]})") from None


def relative_error(ours: Tensor, official: Tensor) -> float:
    """||ours - official|| / ||official||, in float64; the plain norm where the official one is 0, infinite where the
    shapes differ."""
    ours, official = ours.detach().double().cpu(), official.double()
    if ours.shape != official.shape:
        return math.inf
    scale = official.norm().item()
    return (ours - official).norm().item() / (scale or 1.0)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m m3ae_fast.verify", description=__doc__.split("\n\n")[0])
    parser.add_argument("files", nargs="+", metavar="FILE.npz", help="golden files of the official implementation")
    parser.add_argument("--tolerance-scale", type=float, default=1.0, help="widen every tolerance by this factor")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float64"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    console, device = Console(highlight=False, soft_wrap=True), _device(args.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    total = failed = 0
    for file in args.files:
        console.print(f"[bold]{escape(file)}[/bold]")
        for name, ours, official, tolerance in _replay(Golden.load(file), device, getattr(torch, args.dtype)):
            tolerance *= args.tolerance_scale
            error = relative_error(ours, official)
            good = error <= tolerance  # a NaN is not good
            total, failed = total + 1, failed + (not good)
            mark = "[green]ok  [/green]" if good else "[red]FAIL[/red]"
            console.print(f"  {mark} {error:9.2e} <= {tolerance:.0e}  {name}")
    files = f"{len(args.files)} file" + "s" * (len(args.files) != 1)
    console.print(f"{total - failed} of {total} quantities of {files} agree with the official implementation")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(exit_cleanly(main))
