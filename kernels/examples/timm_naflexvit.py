"""Run timm's NaFlexVit on images of different sizes without padding: the patches of all images are packed.

    pip install timm
    python kernels/examples/timm_naflexvit.py

NaFlexVit pads all images of a batch to the largest number of patches, and masks the padding in attention. In this
example, the model's blocks process only the valid rows: `gather_tokens` selects these rows, `packed_attention` replaces
the attention of the blocks, and `scatter_tokens` restores the padded layout for the model's head. This example uses
random weights; a model created by `timm.create_model("naflexvit_...")` works in the same way if its blocks use timm's
plain `Attention`.

Shapes: B images, N patches of the largest image, T valid rows, D width.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from m3ae_kernels import gather_tokens, packed_attention, scatter_tokens
from timm.layers import Attention
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg
from torch import Tensor

PATCH, CLASSES = 8, 10


@contextmanager
def packed(model: NaFlexVit, cu_seqlens: Tensor, longest: int) -> Iterator[None]:
    """Return a context manager; inside it, the model's blocks take the rows of packed samples, [1, T, D]."""

    def forward(attention: Attention, x_1TD: Tensor) -> Tensor:
        qkv = attention.qkv(x_1TD[0]).unflatten(1, (3, attention.num_heads, -1))
        q, k = attention.q_norm(qkv[:, 0]), attention.k_norm(qkv[:, 1])
        out = packed_attention(torch.stack((q, k, qkv[:, 2]), 1), cu_seqlens, longest).flatten(1)
        return attention.proj_drop(attention.proj(attention.norm(out)))[None]

    for block in model.blocks:
        block.attn.forward = lambda x, attention=block.attn, **_: forward(attention, x)
    try:
        yield
    finally:
        for block in model.blocks:
            del block.attn.forward


def logits(model: NaFlexVit, patches: Tensor, patch_coord: Tensor, patch_valid: Tensor) -> Tensor:
    """Return the logits [B, classes] of the model, computed without padding in the blocks."""
    x_BND, _ = model.embeds(patches, patch_coord=patch_coord, patch_valid=patch_valid)
    x_BND = model.norm_pre(x_BND)
    valid_BN = torch.nn.functional.pad(patch_valid, (model.num_prefix_tokens, 0), value=True)
    rows_T = valid_BN.flatten().nonzero()[:, 0]
    lengths_B = valid_BN.sum(1)
    ends = torch.nn.functional.pad(lengths_B.cumsum(0), (1, 0))
    x_1TD = gather_tokens(x_BND, rows_T)[None]
    with packed(model, ends, int(lengths_B.max())):
        for block in model.blocks:
            x_1TD = block(x_1TD)
    x_1TD = model.norm(x_1TD)
    src = torch.full_like(valid_BN, -1, dtype=torch.int64).flatten()
    src[rows_T] = torch.arange(len(rows_T), device=src.device)
    return model.forward_head(scatter_tokens(x_1TD, src.view_as(valid_BN)), patch_valid=patch_valid)


def batch(grids: list[tuple[int, int]]) -> dict[str, Tensor]:
    """Return random patches of images with these patch grids (rows, columns), padded to the largest image as in timm's
    collator."""
    most = max(rows * columns for rows, columns in grids)
    coords, valid = torch.zeros(len(grids), most, 2, dtype=torch.int64), torch.zeros(len(grids), most, dtype=torch.bool)
    for i, (rows, columns) in enumerate(grids):
        coords[i, : rows * columns] = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
        valid[i, : rows * columns] = True
    return {"patches": torch.randn(len(grids), most, PATCH**2 * 3), "patch_coord": coords, "patch_valid": valid}


def main() -> tuple[float, float]:
    """Print and return the losses of the original model and of the packed model."""
    torch.manual_seed(0)
    config = NaFlexVitCfg(patch_size=PATCH, embed_dim=48, depth=2, num_heads=3, pos_embed_grid_size=(8, 8))
    model = NaFlexVit(config, num_classes=CLASSES).train()
    torch.nn.init.normal_(model.head.weight)
    images, labels = batch([(8, 8), (2, 3), (5, 4), (1, 1)]), torch.randint(0, CLASSES, (4,))
    losses = [torch.nn.functional.cross_entropy(out, labels) for out in (model(images), logits(model, **images))]
    learned = [p for p in model.parameters() if p.requires_grad]
    theirs, ours = (torch.autograd.grad(loss, learned) for loss in losses)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    rows, padded = int(images["patch_valid"].sum()), images["patch_valid"].numel()
    plain, fused = (loss.item() for loss in losses)
    print(f"NaFlexVit loss {plain:.6f}  fused {fused:.6f}, equal gradients, {rows} rows instead of {padded}")
    return plain, fused


if __name__ == "__main__":
    main()
