"""The ops with their inputs and their minimum cost, at M3AE-Large's sizes and at small odd sizes.

Shapes, as in the docstrings of the kernels: N, M, T rows, D width, K = P * P * C, V vocabulary; for attention, T keys,
M queries, H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from . import samples_class

Cost = tuple[float, float]  # FLOPs, bytes


@dataclass
class Workload:
    """An op with its inputs and the minimum cost of its forward and backward pass with 16-bit inputs.

    `rows` are the names of the inputs that the op processes row by row; if there are none, the op cannot be run in
    chunks.
    """

    name: str
    op: str
    tensors: dict[str, Tensor]
    rows: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    forward: Cost = (0, 0)
    backward: Cost = (0, 0)

    def call(self, module) -> tuple[Tensor, ...]:
        """Return the results of the op. `module`: `m3ae_kernels`, its `reference`, or any other module with this op."""
        result = getattr(module, self.op)(**self.tensors, **self.options)
        return result if isinstance(result, tuple) else (result,)

    @property
    def learned(self) -> list[str]:
        return [name for name, t in self.tensors.items() if t.requires_grad]

    @property
    def samples(self) -> str:
        """The result of `samples_class`, by which the settings of attention are found in a tuning table; "" for other
        ops."""
        if self.op != "packed_attention":
            return ""
        return samples_class(self.tensors["qkv"].shape[-1], self.options["max_seqlen"])

    def upstream(self, outs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(torch.ones_like(out) if out.dim() == 0 else torch.randn_like(out) for out in outs)

    def run(self, module, upstream: tuple[Tensor, ...] | None = None) -> dict[str, Tensor]:
        """Return the results and the gradients of all learned inputs, by name."""
        outs = self.call(module)
        upstream = upstream or self.upstream(outs)
        learned = self.learned
        inputs = [self.tensors[name] for name in learned]
        grads = torch.autograd.grad(outs, inputs, [grad.to(out.dtype) for grad, out in zip(upstream, outs)])
        return dict(zip(("out", *learned), (*(out.detach() for out in outs), *grads)))

    def run_in_chunks(self, module, upstream: tuple[Tensor, ...], chunks: int) -> dict[str, Tensor]:
        """Return the results of `run`, computed in chunks of rows, which requires less memory. Sums over chunks are
        float32."""
        if not self.rows:
            return self.run(module, upstream)
        size = -(-len(self.tensors[self.rows[0]]) // chunks)
        parts = zip(*(self.tensors[name].detach().split(size) for name in self.rows))
        upstreams = zip(*(grad.split(size) if grad.dim() else [grad] * chunks for grad in upstream))
        pieces: dict[str, list[Tensor]] = {}
        for part, grads in zip(parts, upstreams):
            own = {n: t.requires_grad_(self.tensors[n].requires_grad) for n, t in zip(self.rows, part)}
            for name, result in replace(self, tensors=self.tensors | own).run(module, grads).items():
                pieces.setdefault(name, []).append(result)
        joined = {*self.rows, *(["out"] if upstream[0].dim() else [])}
        return {
            name: torch.cat(p) if name in joined else torch.stack([t.float() for t in p]).sum(0)
            for name, p in pieces.items()
        }

    def cast(self, dtype: torch.dtype) -> Workload:
        """Return the workload with floating inputs converted to `dtype`."""
        tensors = {
            name: t.detach().to(dtype).requires_grad_(t.requires_grad) if t.is_floating_point() else t
            for name, t in self.tensors.items()
        }
        return replace(self, tensors=tensors)


@dataclass(frozen=True)
class Sizes:
    samples: int
    patch: int
    grid: int  # patches per side
    visible: int  # visible patches per sample
    words: int  # average number of words of a caption; a quarter of them is visible
    encoder: int
    decoder: int
    vocab: int


# The sizes of configs/large.json: 512 samples of 256 px with captions of 8 to 32 words. 75 % of the patches and of the
# words are masked. On average, a sample has 70 rows in the encoder and 277 in the decoder.
LARGE = Sizes(samples=512, patch=16, grid=16, visible=64, words=20, encoder=1024, decoder=512, vocab=30522)
ODD = Sizes(samples=5, patch=14, grid=3, visible=4, words=19, encoder=200, decoder=123, vocab=997)


def make(name: str, sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Workload:
    """Return the workload called `name` in `OPS`. Its values are the same in each call."""
    torch.manual_seed(0)
    work = OPS[name](sizes, dtype, device)
    work.name = name
    return work


def _random(*shape: int, dtype: torch.dtype, device: torch.device, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device=device) * scale).to(dtype).requires_grad_()


def _ids(rows: Tensor) -> Tensor:
    return rows.to(torch.int32)


def _images(s: Sizes, device: torch.device) -> tuple[Tensor, dict]:
    side = s.grid * s.patch
    images = torch.randint(0, 256, (s.samples, 3, side, side), dtype=torch.uint8, device=device)
    return images, {"patch_size": s.patch, "mean": (0.48, 0.46, 0.41), "std": (0.27, 0.26, 0.28)}


def _patches(s: Sizes, visible: bool, device: torch.device) -> Tensor:
    """Return random patch ids, which are sampled independently for each sample."""
    count = s.grid**2
    order = torch.rand(s.samples, count, device=device).argsort(1)
    chosen = order[:, : s.visible] if visible else order[:, s.visible :]
    return _ids((chosen + torch.arange(s.samples, device=device)[:, None] * count).flatten())


def _patch_embed(s: Sizes, dtype: torch.dtype, device: torch.device) -> Workload:
    images, options = _images(s, device)
    k, d = s.patch**2 * 3, s.encoder
    tensors = {
        "images": images,
        "patch_ids": _patches(s, True, device),
        "weight": _random(d, k, dtype=dtype, device=device, scale=k**-0.5),
        "bias": _random(d, dtype=dtype, device=device),
    }
    n = len(tensors["patch_ids"])
    cost = (2 * n * k * d, n * (k + 2 * d) + 2 * k * d)
    return Workload("", "patch_embed", tensors, ("patch_ids",), options, cost, cost)


def _loss_rows(s: Sizes) -> tuple[int, int]:
    """Return the number of packed decoder rows, and the number of these rows that enter the loss."""
    tokens = s.samples * (s.grid**2 + s.words)
    return tokens, tokens - s.samples * (s.visible + s.words // 4)


def _gather(s: Sizes, dtype: torch.dtype, device: torch.device) -> Workload:
    t, m = _loss_rows(s)
    d = s.decoder
    tensors = {
        "x": _random(t, d, dtype=dtype, device=device),
        "rows": _ids(torch.randperm(t, device=device)[:m].sort().values),
    }
    return Workload("", "gather_tokens", tensors, ("rows",), {}, (0, 4 * m * d), (0, 2 * m * d + 2 * t * d))


def _norm(s: Sizes, dtype: torch.dtype, device: torch.device) -> Workload:
    work = _gather(s, dtype, device)
    d = s.decoder
    t, m = len(work.tensors["x"]), len(work.tensors["rows"])
    work.tensors |= {name: _random(d, dtype=dtype, device=device) for name in ("norm_weight", "norm_bias")}
    work.backward = (0, 4 * m * d + 2 * t * d)
    return work


def _bias_gelu(s: Sizes, dtype: torch.dtype, device: torch.device) -> Workload:
    t, d = s.samples * (1 + s.visible + s.words // 4), 4 * s.encoder
    tensors = {"x": _random(t, d, dtype=dtype, device=device), "bias": _random(d, dtype=dtype, device=device)}
    return Workload("", "bias_gelu", tensors, ("x",), {}, (0, 4 * t * d), (0, 6 * t * d))


def _scatter(s: Sizes, n: int, fill: int, length: int, d: int, dtype, device) -> Workload:
    """Return a workload that assembles samples of `length` rows. Of all rows, n come from the input `x` of the op,
    and the others from its input `fill`, which has `fill` rows."""
    t = s.samples * length
    src = torch.full((t,), -1, dtype=torch.int32, device=device)
    places = torch.randperm(t, device=device)[:n].sort().values
    src[places] = torch.arange(n, dtype=torch.int32, device=device)
    tensors = {
        "x": _random(n, d, dtype=dtype, device=device),
        "src": src,
        "fill": _random(fill, d, dtype=dtype, device=device),
        "fill_ids": _ids(torch.randint(0, fill, (t,), device=device)),
        "table": _random(length, d, dtype=dtype, device=device),
        "table_ids": _ids(torch.arange(t, device=device) % length),
    }
    traffic = 2 * d * (n + t)
    rows = ("src", "fill_ids", "table_ids")
    return Workload("", "scatter_tokens", tensors, rows, {}, (0, traffic), (0, traffic + 2 * d * fill))


def _scatter_encoder(s: Sizes, dtype: torch.dtype, device: torch.device) -> Workload:
    length = 1 + s.visible + s.words // 4
    n = s.samples * s.visible
    return _scatter(s, n, s.vocab, length, s.encoder, dtype, device)


def _scatter_decoder(s: Sizes, dtype: torch.dtype, device: torch.device) -> Workload:
    length = 1 + s.grid**2 + s.words
    n = s.samples * (1 + s.visible + s.words // 4)
    return _scatter(s, n, 2, length, s.decoder, dtype, device)


def _pixel(s: Sizes, dtype: torch.dtype, device: torch.device, norm_pix: bool = False) -> Workload:
    images, options = _images(s, device)
    ids = _patches(s, False, device)
    k, d, m = s.patch**2 * 3, s.decoder, len(ids)
    tensors = {
        "hidden": _random(m, d, dtype=dtype, device=device),
        "weight": _random(k, d, dtype=dtype, device=device, scale=d**-0.5),
        "bias": _random(k, dtype=dtype, device=device),
        "images": images,
        "patch_ids": ids,
        "row_weight": torch.rand(m, device=device) / m,
    }
    options |= {"norm_pix": norm_pix, "reduction": "sum"}
    rows = ("hidden", "patch_ids", "row_weight")
    forward, backward = (6 * m * d * k, m * (4 * d + k) + 4 * k * d), (0, 4 * m * d + 6 * k * d)
    return Workload("", "masked_pixel_loss", tensors, rows, options, forward, backward)


def _pixel_norm(s: Sizes, dtype: torch.dtype, device: torch.device) -> Workload:
    return _pixel(s, dtype, device, norm_pix=True)


def _hog(s: Sizes, dtype: torch.dtype, device: torch.device) -> Workload:
    work = _pixel(s, dtype, device)
    k, d, m = 9, s.decoder, len(work.tensors["patch_ids"])
    work.tensors |= {
        "weight": _random(k, d, dtype=dtype, device=device, scale=d**-0.5),
        "bias": _random(k, dtype=dtype, device=device),
    }
    work.op, work.options = "masked_hog_loss", {"patch_size": s.patch, "reduction": "sum"}
    work.forward = 6 * m * d * k, 4 * m * d + work.tensors["images"].numel() + 4 * k * d
    work.backward = 0, 4 * m * d + 6 * k * d
    return work


def _token(s: Sizes, dtype: torch.dtype, device: torch.device) -> Workload:
    m, d, v = s.samples * (s.words - s.words // 4), s.decoder, s.vocab
    tensors = {
        "hidden": _random(m, d, dtype=dtype, device=device),
        "weight": _random(v, d, dtype=dtype, device=device, scale=d**-0.5),
        "bias": _random(v, dtype=dtype, device=device),
        "targets": _ids(torch.randint(0, v, (m,), device=device)),
        "row_weight": torch.rand(m, device=device) / m,
    }
    forward = (6 * m * d * v, 4 * m * d + 4 * v * d)
    rows = ("hidden", "targets", "row_weight")
    return Workload("", "masked_token_loss", tensors, rows, {"reduction": "sum"}, forward, (0, 4 * m * d + 4 * v * d))


def _lengths(s: Sizes, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the number of rows of each sample in the encoder and in the decoder. The lengths of captions are drawn
    uniformly between 0.4 and 1.6 times their average."""
    words = torch.randint(2 * s.words // 5, 8 * s.words // 5 + 1, (s.samples,), device=device)
    return 1 + s.visible + words // 4, 1 + s.grid**2 + words


def _attention(lengths: Tensor, queries: Tensor, width: int, dim: int, dtype, device) -> Workload:
    """Return an attention workload. `lengths`: number of rows of each sample; `queries`: number of queries of each
    sample. If `queries` equals `lengths`, all rows are queries."""
    h, t, m = width // dim, int(lengths.sum()), int(queries.sum())
    some = m < t
    tensors = {
        "qkv": _random(t, 2 if some else 3, h, dim, dtype=dtype, device=device),
        "cu_seqlens": _ids(torch.nn.functional.pad(lengths.cumsum(0), (1, 0))),
    }
    options = {"max_seqlen": int(lengths.max())}
    if some:
        tensors["q"] = _random(m, h, dim, dtype=dtype, device=device)
        tensors["cu_queries"] = _ids(torch.nn.functional.pad(queries.cumsum(0), (1, 0)))
        options["max_queries"] = int(queries.max())
    product, rows = 2 * h * dim * int((lengths * queries).sum()), 4 * h * dim * (t + m)
    return Workload("", "packed_attention", tensors, (), options, (2 * product, rows), (5 * product, 2 * rows))


def _attention_encoder(s: Sizes, dtype: torch.dtype, device: torch.device) -> Workload:
    lengths, _ = _lengths(s, device)
    return _attention(lengths, lengths, s.encoder, min(64, s.encoder), dtype, device)


def _attention_decoder(s: Sizes, dtype: torch.dtype, device: torch.device) -> Workload:
    _, lengths = _lengths(s, device)
    return _attention(lengths, lengths, s.decoder, min(32, s.decoder), dtype, device)


def _attention_masked(s: Sizes, dtype: torch.dtype, device: torch.device) -> Workload:
    seen, lengths = _lengths(s, device)
    return _attention(lengths, lengths - seen, s.decoder, min(32, s.decoder), dtype, device)


OPS: dict[str, Callable[[Sizes, torch.dtype, torch.device], Workload]] = {
    "patch_embed": _patch_embed,
    "gather_tokens": _gather,
    "gather_tokens + LayerNorm": _norm,
    "bias_gelu, encoder": _bias_gelu,
    "scatter_tokens, encoder": _scatter_encoder,
    "scatter_tokens, decoder": _scatter_decoder,
    "masked_pixel_loss": _pixel,
    "masked_pixel_loss, norm_pix": _pixel_norm,
    "masked_hog_loss": _hog,
    "masked_token_loss": _token,
    "packed_attention, encoder": _attention_encoder,
    "packed_attention, decoder": _attention_decoder,
    "packed_attention, loss rows": _attention_masked,
}
