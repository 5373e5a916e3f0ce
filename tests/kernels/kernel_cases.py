"""Random inputs for every op, and a common interface to call the op and its reference on them.

`CASES` contains the sizes for each op; `make(name, size, dtype)` returns inputs; `call(module, name, inputs)` runs the
op of `m3ae_kernels` or its `reference`. Optional inputs (biases, row weights, norms) have values of about 1, so that
errors in them are detected.
"""

from dataclasses import dataclass, field

import torch
from m3ae_kernels.pixels import LARGEST
from torch import Tensor

MEAN, STD = (0.48, 0.45, 0.4, 0.5), (0.22, 0.23, 0.22, 0.3)
BAND_MEAN, BAND_STD = tuple(0.1 + 0.05 * band for band in range(13)), tuple(0.2 + 0.03 * band for band in range(13))


@dataclass
class Inputs:
    """An op's tensors by name, its options, and which of the tensors have gradients."""

    tensors: dict[str, Tensor | None]
    options: dict = field(default_factory=dict)

    @property
    def learned(self) -> list[str]:
        return [name for name, t in self.tensors.items() if t is not None and t.requires_grad]

    def to(self, dtype: torch.dtype, names: list[str] | None = None) -> "Inputs":
        """Return the inputs with floating tensors, or only those in `names`, converted to `dtype`."""
        names = (
            names
            if names is not None
            else [name for name, t in self.tensors.items() if t is not None and t.is_floating_point()]
        )
        cast = {
            name: t.detach().to(dtype).requires_grad_(t.requires_grad) if name in names else t
            for name, t in self.tensors.items()
        }
        return Inputs(cast, self.options)


def _random(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, dtype=torch.float64) * scale).to(dtype).requires_grad_()


def _images(batch: int, channels: int, patch: int, dtype: torch.dtype) -> tuple[Tensor, int]:
    """Return images of 2 x 3 patches, and the total number of patches."""
    shape = (batch, channels, 2 * patch, 3 * patch)
    if dtype in LARGEST:
        return torch.randint(0, LARGEST[dtype] + 1, shape, dtype=dtype), batch * 6
    return _random(*shape, dtype=dtype), batch * 6


def _pixel_options(channels: int, patch: int, images: Tensor) -> dict:
    """Return the options for reading images. Floating images are normalised already, except those with many bands."""
    if channels > len(MEAN):
        return {"patch_size": patch, "mean": BAND_MEAN[:channels], "std": BAND_STD[:channels]}
    if images.dtype not in LARGEST:
        return {"patch_size": patch, "mean": None, "std": None}
    return {"patch_size": patch, "mean": MEAN[:channels], "std": STD[:channels]}


def _row_weight(rows: int) -> Tensor:
    weight = torch.rand(rows) + 0.5
    weight[::5] = 0
    return weight


def _channels_last(images: Tensor) -> Tensor:
    return images.detach().contiguous(memory_format=torch.channels_last).requires_grad_(images.requires_grad)


def patch_embed(
    dtype, rows, dim, batch, channels, patch, floating=False, channels_last=False, bias=True, ids=torch.int32,
    pixels=torch.uint8,
) -> Inputs:  # fmt: skip
    images, patches = _images(batch, channels, patch, dtype if floating else pixels)
    size = patch**2 * channels
    tensors = {
        "images": _channels_last(images) if channels_last else images,
        "patch_ids": torch.randperm(patches)[:rows].to(ids),
        "weight": _random(dim, size, dtype=dtype, scale=size**-0.5),
    }
    if bias:
        tensors["bias"] = _random(dim, dtype=dtype)
    return Inputs(tensors, _pixel_options(channels, patch, images))


def gather_tokens(dtype, tokens, rows, dim, norm=False, bias=True, ids=torch.int32) -> Inputs:
    tensors = {"x": _random(tokens, dim, dtype=dtype), "rows": torch.randperm(tokens)[:rows].to(ids)}
    if norm:
        tensors["norm_weight"] = _random(dim, dtype=dtype)
    if norm and bias:
        tensors["norm_bias"] = _random(dim, dtype=dtype)
    return Inputs(tensors)


def bias_gelu(dtype, rows, dim) -> Inputs:
    return Inputs({"x": _random(rows, dim, dtype=dtype), "bias": _random(dim, dtype=dtype)})


def scatter_tokens(dtype, tokens, rows, dim, fill=None, table=None, ids=torch.int32) -> Inputs:
    src = torch.full((tokens,), -1, dtype=ids)
    used = torch.randperm(rows)[: min(tokens, rows) * 3 // 4].to(ids)  # some rows are not used
    src[torch.randperm(tokens)[: len(used)]] = used
    tensors = {"x": _random(rows, dim, dtype=dtype), "src": src}
    for name, count in (("fill", fill), ("table", table)):
        if count is not None:
            tensors[name] = _random(count, dim, dtype=dtype)
            tensors[f"{name}_ids"] = torch.randint(-1, count, (tokens,), dtype=ids)
    return Inputs(tensors)


def masked_pixel_loss(
    dtype, rows, dim, batch, channels, patch, floating=False, norm_pix=False, channels_last=False, bias=True,
    ids=torch.int32, reduction="sum", pixels=torch.uint8,
) -> Inputs:  # fmt: skip
    images, patches = _images(batch, channels, patch, dtype if floating else pixels)
    size = patch**2 * channels
    tensors = {
        "hidden": _random(rows, dim, dtype=dtype),
        "weight": _random(size, dim, dtype=dtype, scale=dim**-0.5),
        "bias": _random(size, dtype=dtype) if bias else None,
        "images": _channels_last(images.detach()) if channels_last else images.detach(),
        "patch_ids": torch.randperm(patches)[:rows].to(ids),
        "row_weight": _row_weight(rows),
    }
    options = _pixel_options(channels, patch, images) | {"norm_pix": norm_pix, "reduction": reduction}
    return Inputs(tensors, options)


def masked_hog_loss(
    dtype, rows, dim, batch, channels, patch, floating=False, channels_last=False, bias=True, std=False,
    ids=torch.int32, reduction="sum", pixels=torch.uint8,
) -> Inputs:  # fmt: skip
    images, patches = _images(batch, channels, patch, dtype if floating else pixels)
    tensors = {
        "hidden": _random(rows, dim, dtype=dtype),
        "weight": _random(9, dim, dtype=dtype, scale=dim**-0.5),
        "bias": _random(9, dtype=dtype) if bias else None,
        "images": _channels_last(images.detach()) if channels_last else images.detach(),
        "patch_ids": torch.randperm(patches)[:rows].to(ids),
        "row_weight": _row_weight(rows),
    }
    return Inputs(tensors, {"patch_size": patch, "std": BAND_STD[:channels] if std else None, "reduction": reduction})


def masked_token_loss(
    dtype, rows, dim, vocab, label_smoothing=0.0, z_loss=0.0, bias=True, ids=torch.int32, reduction="sum", ignored=False
) -> Inputs:
    tensors = {
        "hidden": _random(rows, dim, dtype=dtype),
        "weight": _random(vocab, dim, dtype=dtype, scale=2 * dim**-0.5),
        "bias": _random(vocab, dtype=dtype) if bias else None,
        "targets": torch.randint(0, vocab, (rows,), dtype=ids),
        "row_weight": _row_weight(rows),
    }
    if ignored:
        tensors["targets"][1::3] = -100
    options = {"label_smoothing": label_smoothing, "z_loss": z_loss, "reduction": reduction}
    return Inputs(tensors, options)


def packed_attention(dtype, lengths, heads, dim, queries=None, ids=torch.int32) -> Inputs:
    def ends(counts: tuple[int, ...]) -> Tensor:
        return torch.tensor([0, *counts]).cumsum(0).to(ids)

    tensors = {
        "qkv": _random(sum(lengths), 3 if queries is None else 2, heads, dim, dtype=dtype),
        "cu_seqlens": ends(lengths),
    }
    options = {"max_seqlen": max(lengths, default=0)}
    if queries is not None:
        tensors |= {"q": _random(sum(queries), heads, dim, dtype=dtype), "cu_queries": ends(queries)}
        options["max_queries"] = max(queries)
    return Inputs(tensors, options)


# Row counts are 0, 1 and prime or odd numbers, widths are below and above that of a tile, and tiles are incomplete on
# every side. Cases in which a program instance processes a row or a segment are small, because these take most of the
# interpreter's time.
CASES = {
    "attend-empty": (packed_attention, {"lengths": (), "heads": 2, "dim": 16}),
    "attend-one": (packed_attention, {"lengths": (1,), "heads": 1, "dim": 64}),
    "attend-some": (packed_attention, {"lengths": (5, 37, 0, 1), "heads": 2, "dim": 24}),
    "attend-wide": (packed_attention, {"lengths": (7, 19), "heads": 1, "dim": 128, "ids": torch.int64}),
    "attend-queries": (
        packed_attention,
        {"lengths": (4, 17, 3), "heads": 2, "dim": 16, "queries": (4, 9, 0)},
    ),
    "attend-no-queries": (packed_attention, {"lengths": (3, 2), "heads": 1, "dim": 16, "queries": (0, 0)}),
    "embed-empty": (patch_embed, {"rows": 0, "dim": 48, "batch": 1, "channels": 3, "patch": 8}),
    "embed-one": (patch_embed, {"rows": 1, "dim": 123, "batch": 1, "channels": 1, "patch": 8}),
    "embed-p16": (patch_embed, {"rows": 37, "dim": 123, "batch": 8, "channels": 3, "patch": 16}),
    "embed-p14": (patch_embed, {"rows": 67, "dim": 48, "batch": 12, "channels": 4, "patch": 14}),
    "embed-p32": (patch_embed, {"rows": 11, "dim": 80, "batch": 2, "channels": 1, "patch": 32}),
    "embed-float": (patch_embed, {"rows": 13, "dim": 48, "batch": 3, "channels": 3, "patch": 8, "floating": True}),
    "embed-last": (
        patch_embed,
        {"rows": 29, "dim": 48, "batch": 6, "channels": 3, "patch": 14, "channels_last": True, "ids": torch.int64},
    ),
    "embed-float-last": (
        patch_embed,
        {"rows": 13, "dim": 48, "batch": 3, "channels": 3, "patch": 8, "floating": True, "channels_last": True}
        | {"bias": False},
    ),
    "embed-bands": (
        patch_embed,
        {"rows": 11, "dim": 48, "batch": 2, "channels": 13, "patch": 6, "pixels": torch.uint16},
    ),
    "embed-bands-float": (
        patch_embed,
        {"rows": 7, "dim": 24, "batch": 2, "channels": 13, "patch": 4, "floating": True, "channels_last": True},
    ),
    "gather-empty": (gather_tokens, {"tokens": 7, "rows": 0, "dim": 48}),
    "gather-one": (gather_tokens, {"tokens": 1, "rows": 1, "dim": 512}),
    "gather-some": (gather_tokens, {"tokens": 101, "rows": 67, "dim": 123}),
    "gather-long": (gather_tokens, {"tokens": 31, "rows": 17, "dim": 48, "ids": torch.int64}),
    "norm-empty": (gather_tokens, {"tokens": 7, "rows": 0, "dim": 48, "norm": True}),
    "norm-one": (gather_tokens, {"tokens": 3, "rows": 1, "dim": 512, "norm": True}),
    "norm-some": (gather_tokens, {"tokens": 101, "rows": 67, "dim": 123, "norm": True}),
    "norm-no-bias": (
        gather_tokens,
        {"tokens": 41, "rows": 23, "dim": 64, "norm": True, "bias": False, "ids": torch.int64},
    ),
    "gelu-empty": (bias_gelu, {"rows": 0, "dim": 48}),
    "gelu-one": (bias_gelu, {"rows": 1, "dim": 512}),
    "gelu-some": (bias_gelu, {"rows": 101, "dim": 123}),
    "scatter-empty": (scatter_tokens, {"tokens": 0, "rows": 3, "dim": 48, "fill": 2, "table": 5}),
    "scatter-no-rows": (scatter_tokens, {"tokens": 11, "rows": 0, "dim": 48, "fill": 2, "table": 5}),
    "scatter-mask": (scatter_tokens, {"tokens": 641, "rows": 97, "dim": 123, "fill": 2, "table": 35}),
    "scatter-vocab": (scatter_tokens, {"tokens": 37, "rows": 11, "dim": 130, "fill": 67, "table": 1}),
    "scatter-long": (
        scatter_tokens,
        {"tokens": 37, "rows": 11, "dim": 48, "fill": 97, "table": 5, "ids": torch.int64},
    ),
    "scatter-no-fill": (scatter_tokens, {"tokens": 37, "rows": 11, "dim": 48, "table": 5}),
    "scatter-x-alone": (scatter_tokens, {"tokens": 37, "rows": 11, "dim": 48}),
    "pixel-empty": (masked_pixel_loss, {"rows": 0, "dim": 48, "batch": 1, "channels": 3, "patch": 8}),
    "pixel-one": (masked_pixel_loss, {"rows": 1, "dim": 123, "batch": 1, "channels": 1, "patch": 8}),
    "pixel-p16": (masked_pixel_loss, {"rows": 37, "dim": 123, "batch": 8, "channels": 3, "patch": 16}),
    "pixel-norm": (
        masked_pixel_loss,
        {"rows": 67, "dim": 48, "batch": 12, "channels": 4, "patch": 9, "norm_pix": True},
    ),
    "pixel-float": (
        masked_pixel_loss,
        {"rows": 5, "dim": 512, "batch": 2, "channels": 3, "patch": 8, "floating": True, "norm_pix": True},
    ),
    "pixel-mean-last": (
        masked_pixel_loss,
        {"rows": 21, "dim": 48, "batch": 4, "channels": 3, "patch": 14, "channels_last": True, "norm_pix": True}
        | {"bias": False, "ids": torch.int64, "reduction": "mean"},
    ),
    "pixel-rows": (
        masked_pixel_loss,
        {"rows": 21, "dim": 123, "batch": 4, "channels": 1, "patch": 8, "reduction": "none"},
    ),
    "pixel-bands": (
        masked_pixel_loss,
        {"rows": 9, "dim": 48, "batch": 2, "channels": 13, "patch": 18, "pixels": torch.uint16, "norm_pix": True},
    ),
    "pixel-bands-float": (
        masked_pixel_loss,
        {"rows": 9, "dim": 24, "batch": 2, "channels": 6, "patch": 6, "floating": True, "channels_last": True},
    ),
    "hog-empty": (masked_hog_loss, {"rows": 0, "dim": 48, "batch": 1, "channels": 3, "patch": 8}),
    "hog-one": (masked_hog_loss, {"rows": 1, "dim": 123, "batch": 1, "channels": 1, "patch": 8}),
    "hog-p16": (masked_hog_loss, {"rows": 13, "dim": 123, "batch": 3, "channels": 3, "patch": 16}),
    "hog-p1": (masked_hog_loss, {"rows": 5, "dim": 48, "batch": 2, "channels": 4, "patch": 1}),
    "hog-p48": (masked_hog_loss, {"rows": 2, "dim": 48, "batch": 1, "channels": 1, "patch": 48}),
    "hog-float": (
        masked_hog_loss,
        {"rows": 5, "dim": 512, "batch": 2, "channels": 3, "patch": 8, "floating": True, "std": True},
    ),
    "hog-mean-last": (
        masked_hog_loss,
        {"rows": 21, "dim": 48, "batch": 4, "channels": 3, "patch": 7, "channels_last": True, "bias": False}
        | {"ids": torch.int64, "reduction": "mean"},
    ),
    "hog-rows": (
        masked_hog_loss,
        {"rows": 21, "dim": 123, "batch": 4, "channels": 1, "patch": 4, "reduction": "none"},
    ),
    "hog-bands": (
        masked_hog_loss,
        {"rows": 9, "dim": 48, "batch": 2, "channels": 13, "patch": 6, "pixels": torch.uint16},
    ),
    "hog-bands-float": (
        masked_hog_loss,
        {"rows": 9, "dim": 24, "batch": 2, "channels": 6, "patch": 6, "floating": True, "channels_last": True},
    ),
    "token-empty": (masked_token_loss, {"rows": 0, "dim": 48, "vocab": 97}),
    "token-one": (masked_token_loss, {"rows": 1, "dim": 123, "vocab": 97}),
    "token-some": (masked_token_loss, {"rows": 19, "dim": 512, "vocab": 97}),
    "token-vocab": (masked_token_loss, {"rows": 3, "dim": 48, "vocab": 30522}),
    "token-smooth": (masked_token_loss, {"rows": 11, "dim": 48, "vocab": 131, "label_smoothing": 0.1}),
    "token-mean": (
        masked_token_loss,
        {"rows": 11, "dim": 123, "vocab": 131, "z_loss": 0.01, "bias": False, "ids": torch.int64, "ignored": True}
        | {"reduction": "mean"},
    ),
    "token-rows": (
        masked_token_loss,
        {"rows": 11, "dim": 48, "vocab": 64, "label_smoothing": 0.1, "ignored": True, "reduction": "none"},
    ),
    "token-z": (masked_token_loss, {"rows": 11, "dim": 48, "vocab": 131, "label_smoothing": 0.1, "z_loss": 0.01}),
}
# One small case of each op, for tests that are not about sizes.
SMALL = (
    "attend-queries", "embed-bands-float", "gather-some", "norm-some", "gelu-some", "scatter-no-rows", "pixel-p16",
    "pixel-rows", "hog-p16", "hog-rows", "token-z", "token-rows",
)  # fmt: skip


def make(case: str, dtype: torch.dtype, seed: int = 0) -> Inputs:
    torch.manual_seed(seed)
    function, sizes = CASES[case]
    return function(dtype, **sizes)


def call(module, case: str, inputs: Inputs) -> Tensor:
    """Return the op's differentiable result."""
    result = getattr(module, CASES[case][0].__name__)(**inputs.tensors, **inputs.options)
    return result[0] if isinstance(result, tuple) else result


def run(module, case: str, inputs: Inputs, upstream: Tensor | None = None) -> dict[str, Tensor]:
    """Return the result ("out") and the gradients of all learned inputs by name, for an upstream gradient (random if
    None)."""
    out = call(module, case, inputs)
    if upstream is None:
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    learned = inputs.learned
    grads = torch.autograd.grad(out, [inputs.tensors[name] for name in learned], upstream.to(out.dtype))
    return {"out": out.detach()} | dict(zip(learned, grads))
