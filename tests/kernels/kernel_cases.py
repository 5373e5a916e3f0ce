"""Random inputs for every op, and one way to call the op and its reference on them.

`CASES` holds for each op its sizes; `make(name, size, dtype)` the inputs; `call(module, name, inputs)` runs
`m3ae_kernels` or its `reference`. Optional inputs (biases, row weights, norms) are of size one, so that an error in
them shows.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

MEAN, STD = (0.48, 0.45, 0.4, 0.5), (0.22, 0.23, 0.22, 0.3)


@dataclass
class Inputs:
    """An op's tensors by name, its options, and which of the tensors have gradients."""

    tensors: dict[str, Tensor]
    options: dict = field(default_factory=dict)

    @property
    def learned(self) -> list[str]:
        return [name for name, t in self.tensors.items() if t.requires_grad]

    def to(self, dtype: torch.dtype, names: list[str] | None = None) -> "Inputs":
        """The same values with the floating tensors, or those named, in another dtype."""
        names = names or [name for name, t in self.tensors.items() if t.is_floating_point()]
        cast = {
            name: t.detach().to(dtype).requires_grad_(t.requires_grad) if name in names else t
            for name, t in self.tensors.items()
        }
        return Inputs(cast, self.options)


def _random(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, dtype=torch.float64) * scale).to(dtype).requires_grad_()


def _images(batch: int, channels: int, patch: int, dtype: torch.dtype) -> tuple[Tensor, int]:
    """Images of 2 x 3 patches, and how many patches there are."""
    shape = (batch, channels, 2 * patch, 3 * patch)
    if dtype == torch.uint8:
        return torch.randint(0, 256, shape, dtype=torch.uint8), batch * 6
    return _random(*shape, dtype=dtype), batch * 6


def _pixel_options(channels: int, patch: int, images: Tensor) -> dict:
    if images.dtype != torch.uint8:
        return {"patch_size": patch, "mean": None, "std": None}
    return {"patch_size": patch, "mean": MEAN[:channels], "std": STD[:channels]}


def _row_weight(rows: int) -> Tensor:
    weight = torch.rand(rows) + 0.5
    weight[::5] = 0
    return weight


def patch_embed(dtype, rows, dim, batch, channels, patch, floating=False) -> Inputs:
    images, patches = _images(batch, channels, patch, dtype if floating else torch.uint8)
    size = patch**2 * channels
    tensors = {
        "images": images,
        "patch_ids": torch.randperm(patches)[:rows].int(),
        "weight": _random(dim, size, dtype=dtype, scale=size**-0.5),
        "bias": _random(dim, dtype=dtype),
    }
    return Inputs(tensors, _pixel_options(channels, patch, images))


def gather_tokens(dtype, tokens, rows, dim, norm=False) -> Inputs:
    tensors = {"x": _random(tokens, dim, dtype=dtype), "rows": torch.randperm(tokens)[:rows].int()}
    if norm:
        tensors |= {"norm_weight": _random(dim, dtype=dtype), "norm_bias": _random(dim, dtype=dtype)}
    return Inputs(tensors)


def scatter_tokens(dtype, tokens, rows, dim, fill, table) -> Inputs:
    src = torch.full((tokens,), -1, dtype=torch.int32)
    used = torch.randperm(rows)[: min(tokens, rows) * 3 // 4].int()  # some rows are nobody's
    src[torch.randperm(tokens)[: len(used)]] = used
    tensors = {
        "x": _random(rows, dim, dtype=dtype),
        "src": src,
        "fill": _random(fill, dim, dtype=dtype),
        "fill_ids": torch.randint(-1, fill, (tokens,), dtype=torch.int32),
        "table": _random(table, dim, dtype=dtype),
        "table_ids": torch.randint(-1, table, (tokens,), dtype=torch.int32),
    }
    return Inputs(tensors)


def masked_pixel_loss(dtype, rows, dim, batch, channels, patch, floating=False, norm_pix=False) -> Inputs:
    images, patches = _images(batch, channels, patch, dtype if floating else torch.uint8)
    size = patch**2 * channels
    tensors = {
        "hidden": _random(rows, dim, dtype=dtype),
        "weight": _random(size, dim, dtype=dtype, scale=dim**-0.5),
        "bias": _random(size, dtype=dtype),
        "images": images.detach(),
        "patch_ids": torch.randperm(patches)[:rows].int(),
        "row_weight": _row_weight(rows),
    }
    return Inputs(tensors, _pixel_options(channels, patch, images) | {"norm_pix": norm_pix})


def masked_token_loss(dtype, rows, dim, vocab, label_smoothing=0.0, z_loss=0.0) -> Inputs:
    tensors = {
        "hidden": _random(rows, dim, dtype=dtype),
        "weight": _random(vocab, dim, dtype=dtype, scale=2 * dim**-0.5),
        "bias": _random(vocab, dtype=dtype),
        "targets": torch.randint(0, vocab, (rows,), dtype=torch.int32),
        "row_weight": _row_weight(rows),
    }
    return Inputs(tensors, {"label_smoothing": label_smoothing, "z_loss": z_loss})


# Rows 0, 1 and prime; widths 48, 123 and 512; tiles left ragged on every side.
CASES = {
    "embed-empty": (patch_embed, {"rows": 0, "dim": 48, "batch": 1, "channels": 3, "patch": 8}),
    "embed-one": (patch_embed, {"rows": 1, "dim": 123, "batch": 1, "channels": 1, "patch": 8}),
    "embed-p16": (patch_embed, {"rows": 37, "dim": 123, "batch": 8, "channels": 3, "patch": 16}),
    "embed-p14": (patch_embed, {"rows": 67, "dim": 48, "batch": 12, "channels": 4, "patch": 14}),
    "embed-p32": (patch_embed, {"rows": 11, "dim": 512, "batch": 2, "channels": 1, "patch": 32}),
    "embed-float": (patch_embed, {"rows": 13, "dim": 48, "batch": 3, "channels": 3, "patch": 8, "floating": True}),
    "gather-empty": (gather_tokens, {"tokens": 7, "rows": 0, "dim": 48}),
    "gather-one": (gather_tokens, {"tokens": 1, "rows": 1, "dim": 512}),
    "gather-some": (gather_tokens, {"tokens": 101, "rows": 67, "dim": 123}),
    "norm-empty": (gather_tokens, {"tokens": 7, "rows": 0, "dim": 48, "norm": True}),
    "norm-one": (gather_tokens, {"tokens": 3, "rows": 1, "dim": 512, "norm": True}),
    "norm-some": (gather_tokens, {"tokens": 101, "rows": 67, "dim": 123, "norm": True}),
    "scatter-empty": (scatter_tokens, {"tokens": 0, "rows": 3, "dim": 48, "fill": 2, "table": 5}),
    "scatter-no-rows": (scatter_tokens, {"tokens": 11, "rows": 0, "dim": 48, "fill": 2, "table": 5}),
    "scatter-mask": (scatter_tokens, {"tokens": 641, "rows": 97, "dim": 123, "fill": 2, "table": 131}),
    "scatter-vocab": (scatter_tokens, {"tokens": 37, "rows": 11, "dim": 512, "fill": 997, "table": 1}),
    "pixel-empty": (masked_pixel_loss, {"rows": 0, "dim": 48, "batch": 1, "channels": 3, "patch": 8}),
    "pixel-one": (masked_pixel_loss, {"rows": 1, "dim": 123, "batch": 1, "channels": 1, "patch": 8}),
    "pixel-p16": (masked_pixel_loss, {"rows": 37, "dim": 123, "batch": 8, "channels": 3, "patch": 16}),
    "pixel-norm": (
        masked_pixel_loss,
        {"rows": 67, "dim": 48, "batch": 12, "channels": 4, "patch": 14, "norm_pix": True},
    ),
    "pixel-float": (
        masked_pixel_loss,
        {"rows": 5, "dim": 512, "batch": 2, "channels": 3, "patch": 8, "floating": True, "norm_pix": True},
    ),
    "token-empty": (masked_token_loss, {"rows": 0, "dim": 48, "vocab": 97}),
    "token-one": (masked_token_loss, {"rows": 1, "dim": 123, "vocab": 97}),
    "token-some": (masked_token_loss, {"rows": 67, "dim": 512, "vocab": 97}),
    "token-vocab": (masked_token_loss, {"rows": 3, "dim": 48, "vocab": 30522}),
    "token-smooth": (masked_token_loss, {"rows": 37, "dim": 48, "vocab": 131, "label_smoothing": 0.1}),
    "token-z": (masked_token_loss, {"rows": 37, "dim": 48, "vocab": 131, "label_smoothing": 0.1, "z_loss": 0.01}),
}
# One of each op, small: for the tests that look at something else than sizes.
SMALL = ("embed-float", "gather-some", "norm-some", "scatter-no-rows", "pixel-p16", "token-z")


def make(case: str, dtype: torch.dtype, seed: int = 0) -> Inputs:
    torch.manual_seed(seed)
    function, sizes = CASES[case]
    return function(dtype, **sizes)


def call(module, case: str, inputs: Inputs) -> Tensor:
    """The op's differentiable result."""
    result = getattr(module, CASES[case][0].__name__)(**inputs.tensors, **inputs.options)
    return result[0] if isinstance(result, tuple) else result


def run(module, case: str, inputs: Inputs, upstream: Tensor | None = None) -> dict[str, Tensor]:
    """The result ("out") and the gradient of every learned input, for an upstream gradient (random unless given)."""
    out = call(module, case, inputs)
    if upstream is None:
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    learned = inputs.learned
    grads = torch.autograd.grad(out, [inputs.tensors[name] for name in learned], upstream.to(out.dtype))
    return {"out": out.detach()} | dict(zip(learned, grads))
