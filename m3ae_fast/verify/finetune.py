"""Golden files of the official fine-tuning: features, logits, loss and gradients of a classifier, and steps of AdamW
with layer-wise learning rates.

The official classifier has two unused parameters of the decoder; ours has no decoder.

Shapes: S samples, D width, K classes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from m3ae_fast.batch.packed import PackedBatch
from m3ae_fast.batch.packing import Sample, pack
from m3ae_fast.config import OptimConfig, parse
from m3ae_fast.engine.optimizer import build_adamw, set_lr
from m3ae_fast.engine.parameter_groups import lr_scale
from m3ae_fast.engine.schedule import warmup_cosine
from m3ae_fast.evaluation.finetune_groups import layer_decay_groups, layer_of
from m3ae_fast.heads.classifier import Classifier, ClassifierConfig
from m3ae_fast.model.encoder import MultimodalEncoder
from m3ae_fast.verify.golden import Golden, Quantity, flax_name, without_keys

TOLERANCE = 3e-6
TOLERANCE_GRADIENT = 5e-6
TOLERANCE_AFTER_STEPS = 1e-4
TOLERANCE_CHANGE = 1e-2  # tolerance of the parameter changes


def quantities(golden: Golden, device: torch.device, dtype: torch.dtype) -> Iterator[Quantity]:
    """Yield all comparisons of a file, computed on `device` in `dtype`."""
    model = build_classifier(golden).to(device, dtype)
    batch = _batch(golden, model.backbone).to(device)
    labels_SK = golden.tensor("in/soft_labels").to(device, dtype)
    features_SD = model.features(batch)
    logits_SK = model.head(features_SD)
    loss = F.cross_entropy(logits_SK, labels_SK)
    for name, ours in (("features", features_SD), ("logits", logits_SK), ("loss", loss)):
        yield Quantity(name, ours, golden.tensor(f"out/{name}"), TOLERANCE)
    loss.backward()
    yield from golden.gradients(model, flax_path, TOLERANCE_GRADIENT)
    yield from _layers(golden, model)
    yield from _steps(golden, model, batch, labels_SK, decay=False)
    yield from _steps(golden, model, batch, labels_SK, decay=True)


def flax_path(name: str) -> str:
    """Return the flax path of the classifier's parameter `name`."""
    if name.startswith("backbone."):
        return "base_model/" + flax_name(name.removeprefix("backbone."), 0)
    heads = {"head.norm.weight": "LayerNorm_0/scale", "head.norm.bias": "LayerNorm_0/bias"}
    return heads.get(name) or re.sub(r"head\.linear\.", "Dense_0/", name).replace("weight", "kernel")


def build_classifier(golden: Golden) -> Classifier:
    """Return our classifier with the file's config and parameters, float32. Raises UserError if the config is
    invalid."""
    m = golden.meta
    data = {"size": None, "vocab_size": 0, "image_size": m["size"], "patch_size": m["patch"]}
    data |= {name: m[name] for name in ("emb_dim", "depth", "num_heads", "mlp_ratio")}
    data["use_type_embedding"] = "params/base_model/encoder_image_type_embedding" in golden.arrays
    data |= {f"image_{k}": golden.arrays[f"in/{k}"].astype(float).tolist() for k in ("mean", "std")}
    about = {"model": data, "head": "finetune", "pool": "mean" if m["global_pool"] else "cls", "modality": "image"}
    model = Classifier(parse(ClassifierConfig, about | {"classes": list(range(m["C"]))}, str(golden.path)))
    golden.load_parameters(model, flax_path)
    return model


def _batch(golden: Golden, backbone: MultimodalEncoder) -> PackedBatch:
    visible = torch.zeros(backbone.config.patches_per_image, dtype=torch.bool)
    images = golden.tensor("in/image_u8").permute(0, 3, 1, 2)
    return pack([Sample(str(i), image.contiguous(), visible) for i, image in enumerate(images)], backbone.geometry)


def _layers(golden: Golden, model: Classifier) -> Iterator[Quantity]:
    """Yield comparisons of the layer and its learning-rate factor for every parameter."""
    depth, names = golden.meta["depth"], [name for name, _ in model.named_parameters()]
    ours = [layer_of(name, depth) for name in names]
    official = [golden.meta["layer_id"][flax_path(name)] for name in names]
    yield Quantity("layer_id", torch.tensor(ours), torch.tensor(official), 0.0)
    scales = [lr_scale(layer, depth, golden.meta["layer_decay"]) for layer in range(depth + 2)]
    official = [golden.meta["lr_scale"][str(layer)] for layer in range(depth + 2)]
    yield Quantity("lr_scale", torch.tensor(scales), torch.tensor(official), TOLERANCE)


def _steps(
    golden: Golden, model: Classifier, batch: PackedBatch, labels_SK: Tensor, *, decay: bool
) -> Iterator[Quantity]:
    """Yield comparisons after steps on one batch. `decay`: whether to apply the weight decay that the official script
    intends."""
    m, suffix, text = golden.meta, "_decay" * decay, " with decay" * decay
    golden.load_parameters(model, flax_path)
    schedule = [m["warmup_steps"], m["total_steps"], *(m[f"lr_{name}_value"] for name in ("init", "peak", "end"))]
    groups = layer_decay_groups(model, m["depth"], m["weight_decay"] * decay, m["layer_decay"])
    optimizer = build_adamw(groups, OptimConfig(betas=(m["b1"], m["b2"])))
    layers = {id(p): str(layer_of(name, m["depth"])) for name, p in model.named_parameters()}
    losses, accuracies, rates = [], [], []
    for step in range(m["steps"]):
        optimizer.zero_grad()
        logits_SK = model(batch)
        loss = F.cross_entropy(logits_SK, labels_SK)
        loss.backward()
        losses.append(loss.item())
        accuracies.append((logits_SK.argmax(1) == labels_SK.argmax(1)).double().mean().item())
        set_lr(optimizer, warmup_cosine(step, *schedule))
        optimizer.step()
        rates.append({layers[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]})
    trajectories = {f"loss_trajectory{suffix}": losses} | ({} if decay else {"accuracy_trajectory": accuracies})
    for name, values in trajectories.items():
        yield Quantity(name, torch.tensor(values), golden.tensor(f"out/{name}"), TOLERANCE)
    for layer in [] if decay else sorted(set(layers.values())):
        ours, official = (torch.tensor(lrs) for lrs in ([each[layer] for each in rates], m["lr_by_layer"][layer]))
        yield Quantity(f"lr of layer {layer}", ours, official, TOLERANCE)
    for name, p in model.named_parameters():
        path = flax_path(name)
        before, after = golden.at(f"params/{path}"), golden.at(f"params_after{suffix}/{path}")
        before, after, ours = without_keys(name, before, after, p.detach().cpu().clone())
        yield Quantity(f"after{text} {path}", ours, after, TOLERANCE_AFTER_STEPS)
        yield Quantity(f"change{text} {path}", ours - before, after - before, TOLERANCE_CHANGE)
