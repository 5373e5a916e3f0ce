"""Golden files of pre-training: outputs, losses, gradients, features, and a few AdamW steps.

Shapes: T encoder rows, D encoder width, I patches in the image loss, K values of a patch, W tokens in the text loss, V
tokens in the vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from m3ae_fast.batch.packing import pack
from m3ae_fast.engine.optimizer import build_adamw, clip_by_global_norm, set_lr
from m3ae_fast.engine.parameter_groups import parameter_groups
from m3ae_fast.model.m3ae import M3AE
from m3ae_fast.verify.golden import Golden, Quantity, without_keys

TOLERANCE = 2e-5  # tolerance of outputs, losses and gradients in float32
# tolerance of parameters after AdamW steps; the division in AdamW amplifies rounding errors to the size of a step
TOLERANCE_AFTER_STEPS = 2e-4


def quantities(golden: Golden, device: torch.device, dtype: torch.dtype) -> Iterator[Quantity]:
    """Yield all comparisons of a file, computed on `device` in `dtype`."""
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
    encoded_TD = model.forward_encoder(batch).float().cpu()
    starts = batch.encoder.cu_seqlens.tolist()
    samples = golden.samples()
    found = defaultdict(list)  # our rows and the official rows
    for i, (start, sample) in enumerate(zip(starts, samples)):
        found["encoder_cls"].append((encoded_TD[start : start + 1], golden.tensor("out/encoder_cls")[i]))
        row = start + 1
        if sample.image is not None:
            # our rows are in reading order, and the official rows are in shuffled order
            order = np.argsort(np.argsort(golden.kept("image")))
            found["encoder_image"].append((encoded_TD[row + order], golden.tensor("out/encoder_image")[i]))
            row += len(order)
        if sample.tokens is not None:
            kept = golden.kept("text")
            valid = golden.valid(i).numpy()[kept]
            order = np.argsort(np.argsort(kept[valid]))
            found["encoder_text"].append((encoded_TD[row + order], golden.tensor("out/encoder_text")[i][valid]))
    for name, pairs in found.items():
        ours, official = (torch.cat(rows) for rows in zip(*pairs))
        yield Quantity(name, ours, official, TOLERANCE)


def _decoder_outputs(golden: Golden, model: M3AE, device: torch.device) -> Iterator[Quantity]:
    everywhere = replace(model.geometry, image_all_tokens=True, text_all_tokens=True)
    samples = golden.samples()
    pixels_IK, logits_WV = model.predict(pack(samples, everywhere).to(device))
    if (official := golden.get("out/image_output")) is not None:
        yield Quantity("image_output", pixels_IK, official.flatten(0, 1), TOLERANCE)
    if (official := golden.get("out/text_output")) is not None and logits_WV is not None:
        valid = torch.stack([golden.valid(i) for i in range(len(samples))])
        yield Quantity("text_output", logits_WV, official[valid], TOLERANCE)


def _losses_and_gradients(golden: Golden, model: M3AE, batch) -> Iterator[Quantity]:
    model.zero_grad(set_to_none=True)
    losses = model(batch)
    losses.loss.backward()
    for name in ("loss", "image_loss", "text_loss", "text_accuracy"):
        if (official := golden.get(f"out/{name}")) is not None:
            yield Quantity(name, getattr(losses, name), official, TOLERANCE)
    yield from golden.gradients(model, golden.flax_path, TOLERANCE)


def _representation(golden: Golden, model: M3AE, official: Tensor, device: torch.device) -> Quantity:
    images, text, padding = (golden.get(f"in/{name}") for name in ("image_u8", "text", "text_padding_mask"))
    images = None if images is None else images.permute(0, 3, 1, 2).contiguous().to(device)
    ours = model.representation(images, text, padding)
    valid = torch.ones(official.shape[:2], dtype=torch.bool)
    if padding is not None:
        valid[:, -padding.shape[1] :] = padding == 0
    return Quantity("representation", ours.cpu()[valid], official[valid], TOLERANCE)


def _steps(golden: Golden, model: M3AE, batch) -> Iterator[Quantity]:
    golden.load_parameters(model, golden.flax_path)
    optimizer = build_adamw(parameter_groups(model, golden.optim.weight_decay), golden.optim)
    trajectory = []
    for _ in range(golden.meta["steps"]):
        optimizer.zero_grad()
        losses = model(batch)
        losses.loss.backward()
        trajectory.append(losses.loss.item())
        clip_by_global_norm(list(model.parameters()), golden.optim.clip_grad)
        set_lr(optimizer, golden.meta["lr"])
        optimizer.step()
    yield Quantity("loss_trajectory", torch.tensor(trajectory), golden.tensor("out/loss_trajectory"), TOLERANCE)
    for name, p in model.named_parameters():
        path = golden.flax_path(name)
        ours, official = without_keys(name, p.detach().cpu(), golden.at(f"params_after/{path}"))
        yield Quantity(f"after {path}", ours, official, TOLERANCE_AFTER_STEPS)
