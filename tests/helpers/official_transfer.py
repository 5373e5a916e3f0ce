"""Creation of golden files of any size for linear probes and fine-tuning, by a second implementation of the official
code in float64. The updates of LARS and Adam are written out.

Like tests/helpers/official.py, it shares no code with the engine.

Shapes: N samples, T tokens of a sample (cls first), D width, K classes, B samples of a step.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tests.helpers.official import Params, dense, norm, sincos, transformer

NO_DECAY = ("cls_token", "encoder_image_type_embedding", "image_mask_embedding", "bias")


def warmup_cosine(step: int, init: float, peak: float, end: float, warmup: int, total: int) -> float:
    if step < warmup:
        return init + (peak - init) * step / warmup
    share = min(step - warmup, total - warmup) / (total - warmup)
    return end + (peak - end) * (1 + math.cos(math.pi * share)) / 2


class OfficialProbe:
    """A linear probe: BatchNorm without scale and bias, a linear layer, cross entropy, LARS."""

    def __init__(self, meta: dict, settings: dict, arrays: dict[str, np.ndarray], variant: str) -> None:
        self.meta, self.settings = meta, settings
        self.x_ND, self.eval_x = (self.pooled(arrays[f"in/{name}"]) for name in ("features", "eval_features"))
        self.labels_N, self.eval_labels = arrays["in/labels"], arrays["in/eval_labels"]
        self.p = {name: arrays[f"{variant}/init/{name}"].astype(np.float64) for name in ("kernel", "bias")}
        self.running = {name: arrays[f"{variant}/init/{name}"].astype(np.float64) for name in ("mean", "var")}

    def pooled(self, tokens_NTD: np.ndarray) -> np.ndarray:
        tokens_NTD = tokens_NTD.astype(np.float64)
        return tokens_NTD[:, 1:].mean(1) if self.settings["global_pool"] else tokens_NTD[:, 0]

    def logits(self, x: np.ndarray, mean: np.ndarray, var: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        normed = (x - mean) / np.sqrt(var + self.meta["bn_eps"])
        return normed, normed @ self.p["kernel"] + self.p["bias"]

    def run(self) -> dict[str, np.ndarray]:
        m, out = self.meta, {"lr": [], "loss": [], "accuracy": []}
        buffers = {name: np.zeros_like(value) for name, value in self.p.items()}
        for step in range(m["steps"]):
            first = step % m["steps_per_epoch"] * m["B"]
            x_BD, labels_B = self.x_ND[first : first + m["B"]], self.labels_N[first : first + m["B"]]
            mean_D, var_D = x_BD.mean(0), x_BD.var(0)
            normed_BD, logits_BK = self.logits(x_BD, mean_D, var_D)
            shares_BK = np.exp(logits_BK) / np.exp(logits_BK).sum(1, keepdims=True)
            out["loss"].append(-np.log(shares_BK[np.arange(m["B"]), labels_B]).mean())
            out["accuracy"].append((logits_BK.argmax(1) == labels_B).mean())
            error_BK = (shares_BK - np.eye(m["C"])[labels_B]) / m["B"]
            grads = {"kernel": normed_BD.T @ error_BK, "bias": error_BK.sum(0)}
            if step == 0:
                out |= {f"grad0/{name}": grad for name, grad in grads.items()}
            scale = m["B"] / 256
            lr = warmup_cosine(
                step,
                m["lr_init_value"] * scale,
                self.settings["lr_peak_value"] * scale,
                m["lr_end_value"] * scale,
                m["warmup_epochs"] * m["steps_per_epoch"],
                m["steps"],
            )
            out["lr"].append(lr)
            for name, p in self.p.items():
                update = grads[name] + self.settings["weight_decay"] * p
                sizes = np.linalg.norm(p), np.linalg.norm(update)
                if all(sizes):
                    update = update * m["trust_coefficient"] * sizes[0] / sizes[1]
                buffers[name] = m["momentum"] * buffers[name] - lr * update
                self.p[name] = p + buffers[name]
            for name, value in (("mean", mean_D), ("var", var_D)):
                self.running[name] = m["bn_momentum"] * self.running[name] + (1 - m["bn_momentum"]) * value
            if (step + 1) % m["steps_per_epoch"] == 0:
                out |= {f"after_{step + 1}/{name}": value for name, value in (self.p | self.running).items()}
        out |= {f"trace_end/{name}": buffer for name, buffer in buffers.items()}
        _, out["eval_logits"] = self.logits(self.eval_x, self.running["mean"], self.running["var"])
        out["eval_accuracy"] = (out["eval_logits"].argmax(1) == self.eval_labels).mean()
        return out


def make_probe(
    path: Path,
    variants: dict[str, dict],
    *,
    samples: int = 24,
    tokens: int = 5,
    dim: int = 12,
    classes: int = 3,
    batch: int = 8,
    epochs: int = 3,
    seed: int = 0,
) -> Path:
    """Write a golden file for random features and labels. `variants`: values of global_pool, lr_peak_value and
    weight_decay by name of the variant."""
    rng = np.random.default_rng(seed)
    m = {
        "C": classes, "B": batch, "warmup_epochs": 1, "steps_per_epoch": samples // batch, "momentum": 0.9,
        "trust_coefficient": 0.001, "bn_momentum": 0.9, "bn_eps": 1e-5, "lr_init_value": 0.0, "lr_end_value": 0.0,
        "variants": variants,
    }  # fmt: skip
    m["steps"] = epochs * m["steps_per_epoch"]
    arrays: dict[str, np.ndarray] = {}
    for name, count in (("", samples), ("eval_", 7)):
        arrays[f"in/{name}features"] = rng.normal(1.0, 2.0, (count, tokens, dim)).astype(np.float32)
        arrays[f"in/{name}labels"] = rng.integers(0, classes, count, dtype=np.int32)
    for name, settings in variants.items():
        arrays |= {
            f"{name}/init/kernel": rng.normal(0, dim**-0.5, (dim, classes)).astype(np.float32),
            f"{name}/init/bias": np.zeros(classes, np.float32),
            f"{name}/init/mean": np.zeros(dim, np.float32),
            f"{name}/init/var": np.ones(dim, np.float32),
        }
        arrays |= {f"{name}/{key}": np.float32(a) for key, a in OfficialProbe(m, settings, arrays, name).run().items()}
    return _write(path, m, arrays)


class OfficialFineTuning:
    """A classifier and a batch with soft labels, with all values that the official script computes from them."""

    def __init__(self, meta: dict, arrays: dict[str, np.ndarray]) -> None:
        self.meta = meta
        self.params = {k[7:]: torch.from_numpy(a).double() for k, a in arrays.items() if k.startswith("params/")}
        given = {name: torch.from_numpy(arrays[f"in/{name}"]).double() for name in ("image_u8", "mean", "std")}
        pixels, side = (given["image_u8"] / 255 - given["mean"]) / given["std"], meta["patch"]
        patches = pixels.unflatten(1, (-1, side)).unflatten(3, (-1, side)).transpose(2, 3)
        self.patches, self.labels = (
            patches.flatten(3).flatten(1, 2),
            torch.from_numpy(arrays["in/soft_labels"]).double(),
        )

    def forward(self, p: Params) -> dict[str, Tensor]:
        m = self.meta
        base = {key.removeprefix("base_model/"): value for key, value in p.items()}
        row, column = np.divmod(np.arange(self.patches.shape[1]), m["size"] // m["patch"])
        half = m["emb_dim"] // 2
        positions = torch.from_numpy(np.concatenate([sincos(half, column), sincos(half, row)], 1))
        x = dense(self.patches, base, "image_embedding") + positions + base.get("encoder_image_type_embedding", 0)
        x = torch.cat([base["cls_token"].expand(len(x), 1, -1), x], 1)
        x = transformer(x, torch.zeros(x.shape[:2]), base, "encoder", m["depth"], m["num_heads"])
        features = x[:, 1:].mean(1) if m["global_pool"] else x[:, 0]
        logits = dense(norm(features, p, "LayerNorm_0"), p, "Dense_0")
        loss = -(self.labels * (logits - logits.logsumexp(1, keepdim=True))).sum(1).mean()
        return {"features": features, "logits": logits, "loss": loss}

    def gradients(self, p: Params) -> tuple[dict[str, Tensor], Params]:
        p = {key: value.detach().requires_grad_() for key, value in p.items()}
        out = self.forward(p)
        grads = torch.autograd.grad(out["loss"], list(p.values()), allow_unused=True, materialize_grads=True)
        return {key: value.detach() for key, value in out.items()}, dict(zip(p, grads))

    def layer(self, path: str) -> int:
        """Return the result of `name_to_layer_id` in the official script."""
        parts = path.split("/")
        if len(parts) > 2 and parts[2].startswith("Block_"):
            return int(parts[2].split("_")[1]) + 1
        lowest = parts[0] == "base_model" and (parts[2:3] == ["LayerNorm_0"] or parts[1] == "cls_token")
        return 0 if lowest else self.meta["depth"] + 1

    def decays(self, path: str) -> bool:
        return self.params[path].ndim > 1 and not set(path.split("/")) & set(NO_DECAY)

    def trained(self, decay: bool) -> dict[str, Tensor | Params]:
        m, p = self.meta, dict(self.params)
        moments = {key: (torch.zeros_like(value), torch.zeros_like(value)) for key, value in p.items()}
        losses, accuracies = [], []
        for step in range(m["steps"]):
            out, grads = self.gradients(p)
            losses.append(out["loss"])
            accuracies.append((out["logits"].argmax(1) == self.labels.argmax(1)).double().mean())
            for key, grad in grads.items():
                first, second = (
                    b * old + (1 - b) * new for b, old, new in zip((m["b1"], m["b2"]), moments[key], (grad, grad**2))
                )
                moments[key] = first, second
                update = first / (1 - m["b1"] ** (step + 1))
                update = update / ((second / (1 - m["b2"] ** (step + 1))).sqrt() + m["adam_eps"])
                if decay and self.decays(key):
                    update = update + m["weight_decay"] * p[key]
                p[key] = p[key] - self.lr(step, self.layer(key)) * update
        return {"loss": torch.stack(losses), "accuracy": torch.stack(accuracies), "params": p}

    def lr(self, step: int, layer: int) -> float:
        m = self.meta
        lrs = (m[f"lr_{name}_value"] * self.scale(layer) for name in ("init", "peak", "end"))
        return warmup_cosine(step, *lrs, m["warmup_steps"], m["total_steps"])

    def scale(self, layer: int) -> float:
        return self.meta["layer_decay"] ** (self.meta["depth"] + 1 - layer)

    def arrays(self) -> dict[str, Tensor]:
        """Return the arrays that a golden file contains in addition to the parameters and the batch."""
        out, grads = self.gradients(self.params)
        plain, decayed = self.trained(decay=False), self.trained(decay=True)
        out |= {"loss_trajectory": plain["loss"], "accuracy_trajectory": plain["accuracy"]}
        out |= {"loss_trajectory_decay": decayed["loss"]}
        groups = {"out": out, "grads": grads, "params_after": plain["params"], "params_after_decay": decayed["params"]}
        return {f"{group}/{key}": value for group, values in groups.items() for key, value in values.items()}

    def described(self) -> dict:
        """Return the entries that `meta` contains in addition to sizes and settings."""
        m, layers = self.meta, range(self.meta["depth"] + 2)
        return {
            "layer_id": {path: self.layer(path) for path in self.params},
            "lr_scale": {str(layer): self.scale(layer) for layer in layers},
            "lr_by_layer": {str(layer): [self.lr(step, layer) for step in range(m["steps"])] for layer in layers},
            "decayed_if_the_mask_worked": [path for path in self.params if self.decays(path)],
        }


def make_finetuning(
    path: Path, *, size: int = 16, patch: int = 4, batch: int = 4, classes: int = 3, types: bool = True, seed: int = 0,
    **meta,
) -> Path:  # fmt: skip
    """Write a golden file of a random classifier. `meta` overrides the defaults; `types`: whether there are type
    embeddings."""
    m = {
        "emb_dim": 24, "depth": 2, "num_heads": 3, "mlp_ratio": 4, "size": size, "patch": patch, "C": classes,
        "layer_decay": 0.7, "weight_decay": 1.0, "global_pool": False, "steps": 3, "lr_init_value": 1e-4,
        "lr_peak_value": 1e-3, "lr_end_value": 1e-5, "warmup_steps": 2, "total_steps": 6, "b1": 0.9, "b2": 0.999,
        "adam_eps": 1e-8,
    } | meta  # fmt: skip
    rng = np.random.default_rng(seed)
    arrays = {
        f"params/{key}": rng.normal(size=shape) * spread + mean for key, shape, spread, mean in _parameters(m, types)
    }
    arrays |= {"in/mean": np.array([0.57, 0.55, 0.52]), "in/std": np.array([0.32, 0.31, 0.33])}
    arrays["in/soft_labels"] = rng.dirichlet(np.ones(classes), batch)
    arrays = {key: array.astype(np.float32) for key, array in arrays.items()}
    arrays["in/image_u8"] = rng.integers(0, 256, (batch, size, size, 3), dtype=np.uint8)
    official = OfficialFineTuning(m, arrays)
    arrays |= {key: value.detach().numpy().astype(np.float32) for key, value in official.arrays().items()}
    return _write(path, m | official.described(), arrays)


def _parameters(m: dict, types: bool) -> list[tuple[str, tuple[int, ...], float, float]]:
    """Return (flax path, shape, spread, mean) of every parameter, including the unused ones of the decoder."""
    d, hidden, found = m["emb_dim"], int(m["emb_dim"] * m["mlp_ratio"]), []
    blocks = [f"base_model/encoder/Block_{i}" for i in range(m["depth"])]
    matmuls = [("base_model/image_embedding", m["patch"] ** 2 * 3, d), ("Dense_0", d, m["C"])]
    for block in blocks:
        matmuls += [(f"{block}/Attention_0/Dense_0", d, 3 * d), (f"{block}/Attention_0/Dense_1", d, d)]
        matmuls += [(f"{block}/TransformerMLP_0/fc1", d, hidden), (f"{block}/TransformerMLP_0/fc2", hidden, d)]
    for path, rows, columns in matmuls:
        found += [(f"{path}/kernel", (rows, columns), rows**-0.5, 0.0), (f"{path}/bias", (columns,), 0.1, 0.0)]
    norms = [f"{block}/LayerNorm_{i}" for block in blocks for i in range(2)]
    for path in (*norms, "base_model/encoder/LayerNorm_0", "LayerNorm_0"):
        found += [(f"{path}/scale", (d,), 0.1, 1.0), (f"{path}/bias", (d,), 0.1, 0.0)]
    embeddings = {"cls_token": d, "image_mask_embedding": 8}
    if types:
        embeddings |= {"encoder_image_type_embedding": d, "decoder_image_type_embedding": 8}
    return found + [(f"base_model/{name}", (1, 1, width), 0.1, 0.0) for name, width in embeddings.items()]


def _write(path: Path, meta: dict, arrays: dict[str, np.ndarray]) -> Path:
    np.savez(path, meta=np.frombuffer(json.dumps(meta).encode(), np.uint8), **arrays)
    return path
