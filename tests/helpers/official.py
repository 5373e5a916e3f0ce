"""Creation of golden files of any size by a second implementation of the official M3AE, in float64 on padded tensors.

It shares no code with the engine, so that agreement with it is as informative as agreement with the official code. It
is itself verified by the files in tests/golden.

Shapes: B samples, N = L patches or X words of a sample, K = patch * patch * 3 values, R rows of a sequence.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Params = dict[str, Tensor]  # parameters by flax path
NO_DECAY = ("type_embedding", "mask_embedding", "cls_token", "bias", "embedding/embedding")


def sincos(dim: int, positions: np.ndarray) -> np.ndarray:
    angles = positions[:, None] / 10000 ** (np.arange(dim // 2) / (dim / 2))
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def dense(x: Tensor, p: Params, path: str) -> Tensor:
    return x @ p[f"{path}/kernel"] + p[f"{path}/bias"]


def norm(x: Tensor, p: Params, path: str) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], p[f"{path}/scale"], p[f"{path}/bias"], eps=1e-6)


def transformer(x_BRD: Tensor, padded_BR: Tensor, p: Params, name: str, depth: int, heads: int) -> Tensor:
    for i in range(depth):
        block = f"{name}/Block_{i}"
        qkv = dense(norm(x_BRD, p, f"{block}/LayerNorm_0"), p, f"{block}/Attention_0/Dense_0")
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in qkv.chunk(3, dim=-1))
        scores = (q @ k.transpose(2, 3)) * q.shape[-1] ** -0.5
        scores = torch.where(padded_BR[:, None, None] > 0, -1e7, scores)
        out = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x_BRD = x_BRD + dense(out, p, f"{block}/Attention_0/Dense_1")
        hidden = dense(norm(x_BRD, p, f"{block}/LayerNorm_1"), p, f"{block}/TransformerMLP_0/fc1")
        x_BRD = x_BRD + dense(F.gelu(hidden, approximate="tanh"), p, f"{block}/TransformerMLP_0/fc2")
    return norm(x_BRD, p, f"{name}/LayerNorm_0")


def head(x: Tensor, p: Params, path: str, depth: int) -> Tensor:
    if depth:
        x = norm(x, p, f"{path}/LayerNorm_0")
    for i in range(depth):
        y = norm(F.gelu(dense(x, p, f"{path}/Dense_{i}"), approximate="tanh"), p, f"{path}/LayerNorm_{i + 1}")
        x = x + y if i else y
    return dense(x, p, f"{path}/Dense_{depth}")


class Official:
    """A model and a batch, with all values that the official code computes from them."""

    def __init__(self, meta: dict, arrays: dict[str, np.ndarray]) -> None:
        self.meta, self.c = meta, meta["config"]
        self.kinds = [kind for kind, key in (("image", "image_u8"), ("text", "text")) if f"in/{key}" in arrays]
        self.batch = {key[3:]: torch.from_numpy(a) for key, a in arrays.items() if key.startswith("in/")}
        self.size = meta["batch"]
        self.padding = {"image": torch.zeros(self.size, (meta["image_size"] // meta["patch"]) ** 2)}
        if "image" in self.kinds:
            b, p = self.batch, meta["patch"]
            pixels = (b["image_u8"].double() / 255 - b["mean"].double()) / b["std"].double()
            self.patches = pixels.unflatten(1, (-1, p)).unflatten(3, (-1, p)).transpose(2, 3).flatten(3).flatten(1, 2)
        if "text" in self.kinds:
            self.padding["text"] = self.batch["text_padding_mask"]
        self.params = {k[7:]: torch.from_numpy(a).double() for k, a in arrays.items() if k.startswith("params/")}

    def positions(self, kind: str, dim: int) -> Tensor:
        side = self.meta["image_size"] // self.meta["patch"]
        if kind == "text":
            return torch.from_numpy(sincos(dim, np.arange(self.meta["text_len"])))
        row, column = np.divmod(np.arange(side**2), side)
        return torch.from_numpy(np.concatenate([sincos(dim // 2, column), sincos(dim // 2, row)], axis=1))

    def typed(self, p: Params, which: str, kind: str, dim: int) -> Tensor:
        return self.positions(kind, dim) + p.get(f"{which}_{kind}_type_embedding", 0)

    def kept(self, kind: str) -> Tensor:
        restore = self.batch[f"{kind}_ids_restore"]
        return restore.argsort()[: int(len(restore) * (1 - self.c[f"{kind}_mask_ratio"]))]

    def encode(self, p: Params, kept: dict[str, Tensor]) -> dict[str, Tensor]:
        c = self.c
        cls = p["cls_token"].expand(self.size, 1, -1)
        parts, padded = {"cls": cls}, [torch.zeros(self.size, 1)]
        for kind in self.kinds:
            x = dense(self.patches, p, "image_embedding") if kind == "image" else None
            x = p["text_embedding/embedding"][self.batch["text"].long()] if x is None else x
            parts[kind] = (x + self.typed(p, "encoder", kind, c["emb_dim"]))[:, kept[kind]]
            padded.append(self.padding[kind][:, kept[kind]])
        out = transformer(
            torch.cat([*parts.values()], 1), torch.cat(padded, 1), p, "encoder", c["depth"], c["num_heads"]
        )
        return dict(zip(parts, out.split([part.shape[1] for part in parts.values()], 1)))

    def decode(self, p: Params, encoded: dict[str, Tensor]) -> dict[str, Tensor]:
        c = self.c
        rows, padded = [dense(encoded["cls"], p, "decoder_input_projection")], [torch.zeros(self.size, 1)]
        for kind in self.kinds:
            x = dense(encoded[kind], p, "decoder_input_projection")
            restore = self.batch[f"{kind}_ids_restore"].long()
            hidden = p[f"{kind}_mask_embedding"].expand(self.size, len(restore) - x.shape[1], -1)
            x = torch.cat((x, hidden), 1)[:, restore]
            rows.append(x + self.typed(p, "decoder", kind, c["dec_emb_dim"]))
            padded.append(self.padding[kind])
        x = transformer(torch.cat(rows, 1), torch.cat(padded, 1), p, "decoder", c["dec_depth"], c["dec_num_heads"])
        parts = x.split([row.shape[1] for row in rows], 1)[1:]
        return {
            kind: head(part, p, f"decoder_{kind}_output", c["output_head_depth"])
            for kind, part in zip(self.kinds, parts)
        }

    def losses(self, p: Params, decoded: dict[str, Tensor]) -> dict[str, Tensor]:
        everywhere, out = self.meta["all_token_loss"], {"loss": torch.zeros((), dtype=torch.float64)}
        for kind in self.kinds:
            counted = (1 - self.padding[kind]) * (1 if everywhere else self.batch[f"{kind}_mask"])
            share = counted / counted.sum(1, keepdim=True).clamp(min=1e-5)
            if kind == "image":
                each = (decoded[kind] - self.patches).square().mean(-1)
            else:
                targets = self.batch["text"].long()
                each = F.cross_entropy(decoded[kind].transpose(1, 2), targets, reduction="none")
                out["text_accuracy"] = ((decoded[kind].argmax(-1) == targets) * share).sum(1).mean()
            out[f"{kind}_loss"] = (each * share).sum(1).mean()
            out["loss"] = out["loss"] + self.meta[f"{kind}_loss_weight"] * out[f"{kind}_loss"]
        return out

    def gradients(self, p: Params) -> tuple[dict[str, Tensor], Params]:
        p = {key: value.detach().requires_grad_() for key, value in p.items()}
        losses = self.losses(p, self.decode(p, self.encode(p, {kind: self.kept(kind) for kind in self.kinds})))
        grads = torch.autograd.grad(losses["loss"], list(p.values()), allow_unused=True, materialize_grads=True)
        return losses, dict(zip(p, grads))

    def trained(self) -> tuple[Tensor, Params]:
        """Return the loss before each AdamW step, and the parameters after the last step."""
        m, (b1, b2) = self.meta, self.meta["betas"]
        p, trajectory = dict(self.params), []
        moments = {key: (torch.zeros_like(v), torch.zeros_like(v)) for key, v in p.items()}
        for step in range(1, m["steps"] + 1):
            losses, grads = self.gradients(p)
            trajectory.append(losses["loss"].detach())
            length = torch.stack([g.square().sum() for g in grads.values()]).sum().sqrt()
            for key, g in grads.items():
                g = g * m["clip_gradient"] / length if length > m["clip_gradient"] else g
                first, second = (b * old + (1 - b) * new for b, old, new in zip((b1, b2), moments[key], (g, g * g)))
                moments[key] = first, second
                update = (first / (1 - b1**step)) / ((second / (1 - b2**step)).sqrt() + m["adam_eps"])
                p[key] = p[key] - m["lr"] * (update + m["weight_decay"] * (key in m["decayed"]) * p[key])
        return torch.stack(trajectory), p

    def arrays(self) -> dict[str, Tensor]:
        """Return the arrays that a golden file contains in addition to the parameters and the batch."""
        p = self.params
        encoded = self.encode(p, {kind: self.kept(kind) for kind in self.kinds})
        out = {f"encoder_{kind}": part for kind, part in encoded.items()}
        out |= {f"{kind}_output": part for kind, part in self.decode(p, encoded).items()}
        losses, grads = self.gradients(p)
        if "image" in self.kinds:
            everything = {kind: torch.arange(self.padding[kind].shape[1]) for kind in self.kinds}
            out["representation"] = torch.cat([*self.encode(p, everything).values()], 1)
        out["loss_trajectory"], after = self.trained()
        groups = {"out": out | losses, "grads": grads, "params_after": after}
        return {f"{group}/{key}": value for group, values in groups.items() for key, value in values.items()}


def make_golden(
    path: Path,
    *,
    kinds: tuple[str, ...] = ("image", "text"),
    config: dict | None = None,
    batch: int = 3,
    image_size: int = 24,
    patch: int = 8,
    text_len: int = 7,
    vocab: int = 29,
    lengths: tuple[int, ...] = (0, 7, 3),
    seed: int = 0,
    **meta,
) -> Path:
    """Write a golden file of a random model. `config` and `meta` override the defaults; `lengths`: lengths of the
    captions."""
    c = {
        "emb_dim": 24, "depth": 2, "num_heads": 3, "dec_emb_dim": 16, "dec_depth": 2, "dec_num_heads": 2,
        "mlp_ratio": 4, "output_head_depth": 0, "use_type_embedding": True,
        "image_mask_ratio": 0.75, "text_mask_ratio": 0.75,
    } | (config or {})  # fmt: skip
    m = {
        "config": c, "batch": batch, "image_size": image_size, "patch": patch, "text_len": text_len, "vocab": vocab,
        "steps": 2, "lr": 1e-3, "weight_decay": 0.05, "betas": [0.9, 0.95], "adam_eps": 1e-8, "clip_gradient": 1e9,
        "image_loss_weight": 1.0, "text_loss_weight": 0.5, "all_token_loss": False,
    } | meta  # fmt: skip
    rng = np.random.default_rng(seed)
    arrays = {f"params/{key}": rng.normal(size=shape) * scale + shift for key, shape, scale, shift in _parameters(m)}
    arrays |= {"in/mean": np.array([0.57, 0.55, 0.52]), "in/std": np.array([0.32, 0.31, 0.33])}
    if "image" in kinds:
        arrays["in/image_u8"] = rng.integers(0, 256, (batch, image_size, image_size, 3), dtype=np.uint8)
    if "text" in kinds:
        arrays["in/text"] = rng.integers(0, vocab, (batch, text_len), dtype=np.int32)
        arrays["in/text_padding_mask"] = np.arange(text_len) >= np.resize(lengths, batch)[:, None]
    for kind, length in (("image", (image_size // patch) ** 2), ("text", text_len)):
        if kind in kinds:
            restore = rng.permutation(length).astype(np.int32)
            masked = restore >= int(length * (1 - c[f"{kind}_mask_ratio"]))
            arrays |= {f"in/{kind}_ids_restore": restore, f"in/{kind}_mask": np.tile(masked, (batch, 1))}
    arrays = {key: a if a.dtype in (np.int32, np.uint8) else a.astype(np.float32) for key, a in arrays.items()}
    names = [key.removeprefix("params/") for key in arrays if key.startswith("params/")]
    m["decayed"] = [name for name in names if not name.endswith(NO_DECAY)]
    arrays |= {key: value.detach().numpy().astype(np.float32) for key, value in Official(m, arrays).arrays().items()}
    np.savez(path, meta=np.frombuffer(json.dumps(m).encode(), np.uint8), **arrays)
    return path


def _parameters(m: dict) -> list[tuple[str, tuple[int, ...], float, float]]:
    """Return (flax path, shape, spread, mean) of every parameter, chosen such that all parameters affect the
    results."""
    c, found = m["config"], []
    d, e = c["emb_dim"], c["dec_emb_dim"]

    def add_dense(path: str, rows: int, columns: int) -> None:
        found.append((f"{path}/kernel", (rows, columns), rows**-0.5, 0.0))
        found.append((f"{path}/bias", (columns,), 0.1, 0.0))

    def add_norm(path: str, dim: int) -> None:
        found.extend([(f"{path}/scale", (dim,), 0.1, 1.0), (f"{path}/bias", (dim,), 0.1, 0.0)])

    add_dense("image_embedding", m["patch"] ** 2 * 3, d)
    add_dense("decoder_input_projection", d, e)
    found.append(("text_embedding/embedding", (m["vocab"], d), 1.0, 0.0))
    found.append(("cls_token", (1, 1, d), 0.1, 0.0))
    for kind, outputs in (("image", m["patch"] ** 2 * 3), ("text", m["vocab"])):
        found.append((f"{kind}_mask_embedding", (1, 1, e), 0.1, 0.0))
        if c["use_type_embedding"]:
            found.append((f"encoder_{kind}_type_embedding", (1, 1, d), 0.1, 0.0))
            found.append((f"decoder_{kind}_type_embedding", (1, 1, e), 0.1, 0.0))
        path, depth = f"decoder_{kind}_output", c["output_head_depth"]
        for i in range(depth):
            add_dense(f"{path}/Dense_{i}", e, e)
        for i in range(depth + 1 if depth else 0):
            add_norm(f"{path}/LayerNorm_{i}", e)
        add_dense(f"{path}/Dense_{depth}", e, outputs)
    for name, dim, depth in (("encoder", d, c["depth"]), ("decoder", e, c["dec_depth"])):
        hidden = int(dim * c["mlp_ratio"])
        for i in range(depth):
            add_norm(f"{name}/Block_{i}/LayerNorm_0", dim)
            add_norm(f"{name}/Block_{i}/LayerNorm_1", dim)
            add_dense(f"{name}/Block_{i}/Attention_0/Dense_0", dim, 3 * dim)
            add_dense(f"{name}/Block_{i}/Attention_0/Dense_1", dim, dim)
            add_dense(f"{name}/Block_{i}/TransformerMLP_0/fc1", dim, hidden)
            add_dense(f"{name}/Block_{i}/TransformerMLP_0/fc2", hidden, dim)
        add_norm(f"{name}/LayerNorm_0", dim)
    return found
