"""The packed batch, the input of a forward pass: a flat batch of tokens, its index maps and its loss rows.

Shapes: S samples, B images, L patches of an image, R patches of all images, C channels, H = W pixels, P patch size, N
visible patches, T encoder rows, U decoder rows, M decoder rows that carry loss (I patches, W text tokens).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from m3ae_kernels.attention import Segments
from torch import Tensor

from m3ae_fast.images.patch_grid import Grid

WEIGHT_ROWS = ("image_row_weight", "text_row_weight", "text_row_mean_weight")
SEGMENTS = ("encoder", "decoder", "loss")


class LossCounts(NamedTuple):
    """Denominators of the losses: numbers of images and captions, or of patches and text tokens (`loss.per`)."""

    image: float
    text: float


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """A batch created by `pack`. It is never modified. Index tensors are int32; -1 means none."""

    keys: list[str]
    # [B, C, H, W], uint8, uint16, or floating-point and already normalised. Consecutive samples may share an image (see
    # `Sample.same_image`). Native images are stored as patches, [R, C, P, P]: the ops treat each patch as an image that
    # consists of one patch.
    images: Tensor
    grids: list[Grid]  # rows and columns of patches of the image of each sample that has one
    # Input of the encoder. `m3ae_kernels.scatter_tokens` assembles each of its T rows from rows of other tensors, which
    # these indices select.
    patch_ids: Tensor  # [N] visible patches: image * L + patch; for native images, the index in `images`
    encoder: Segments  # the samples' segments of the T rows
    encoder_src: Tensor  # [T] index in the N patch embeddings
    token_ids: Tensor  # [T] index in the text embedding
    encoder_table_ids: Tensor  # [T] index in the table [cls, patch positions, text positions]
    token_order: Tensor  # [T] order in which the backward pass sums rows with the same id in `token_ids`
    encoder_table_order: Tensor  # [T] as `token_order`, for `encoder_table_ids`
    # Input of the decoder, assembled in the same way.
    decoder: Segments  # the samples' segments of the U rows
    decoder_src: Tensor  # [U] index in the T encoder rows
    mask_ids: Tensor  # [U] 0: patch mask embedding; 1: text mask embedding
    decoder_table_ids: Tensor  # [U] index in the table [patch positions, text positions]
    mask_order: Tensor  # [U] as `token_order`, for `mask_ids`
    decoder_table_order: Tensor  # [U] as `token_order`, for `decoder_table_ids`
    # Rows that carry loss.
    loss: Segments  # the samples' segments of the M rows
    loss_rows: Tensor  # [M] index in the U decoder rows
    image_rows: Tensor  # [I] index in the M loss rows
    image_patch_ids: Tensor  # [I] patches of `image_rows`, numbered as in `patch_ids`
    # [I] token ids, or float32 [I, K] features of a teacher; empty if the targets follow from the images, or are
    # computed later
    image_targets: Tensor
    image_row_weight: Tensor  # float32 [I] loss weight / number of loss rows of the image, or the loss weight alone
    text_rows: Tensor  # [W] index in the M loss rows
    text_targets: Tensor  # [W] token id to predict
    text_row_weight: Tensor  # float32 [W] loss weight / number of loss rows of the caption, or the loss weight alone
    text_row_mean_weight: Tensor  # float32 [W] as `text_row_weight`, but without the loss weight; for the accuracy
    draws: Tensor  # [S] seeds of stochastic depth
    captions: int  # number of captions, including empty ones
    counts: LossCounts
    labels: Tensor | None = None  # int64 [S] ids of the samples' classes; None if there are none
    positions: list[int | None] = field(default_factory=list)  # indices of the samples in the training stream
    image_hashes: list[str] = field(default_factory=list)  # see `Sample.image_hash`
    skipped: tuple[Any, ...] = ()  # samples that the loader could not use
    flops: float | None = None  # FLOPs of a step on these samples, if the loader has counted them

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """Return the batch with its tensors on `device`. `non_blocking`: as in torch.Tensor.to."""
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        """Return the batch with its tensors in pinned memory; the DataLoader calls this method."""
        return self._map(lambda t: t.pin_memory())

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Tell the CUDA allocator that `stream` uses these tensors, which were allocated on another stream."""

        def record(t: Tensor) -> Tensor:
            t.record_stream(stream)
            return t

        self._map(record)

    def _map(self, move: Callable[[Tensor], Tensor]) -> PackedBatch:
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in values.items():
            if isinstance(value, Tensor):
                values[name] = move(value)
            elif isinstance(value, Segments):
                values[name] = replace(value, cu_seqlens=move(value.cu_seqlens))
        return PackedBatch(**values)

    def __reduce__(self) -> tuple[Callable, tuple]:
        """Pickle the batch as two tensors (three with labels) instead of 25, because unpickling each tensor takes the
        training process a quarter of a millisecond."""
        others: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        rows = [others.pop(name) for name in INDEX_ROWS]
        rows += [others.pop(name).view(torch.int32) for name in WEIGHT_ROWS]
        segments = [others.pop(name) for name in SEGMENTS]
        rows += [s.cu_seqlens for s in segments]
        return _rejoin, (torch.cat(rows), [len(r) for r in rows], [(s.max_seqlen, s.rows) for s in segments], others)


# the index tensors, which are concatenated in a pickle
INDEX_ROWS = tuple(f.name for f in fields(PackedBatch) if f.type == "Tensor" and f.name not in ("images", *WEIGHT_ROWS))


def _rejoin(joined: Tensor, lengths: list[int], sizes: list[tuple[int, int]], others: dict[str, Any]) -> PackedBatch:
    """Rebuild the batch from the parts that `__reduce__` returned."""
    pieces = iter(joined.split(lengths))
    others |= {name: next(pieces) for name in INDEX_ROWS}
    others |= {name: next(pieces).view(torch.float32) for name in WEIGHT_ROWS}
    others |= {name: Segments(next(pieces), *size) for name, size in zip(SEGMENTS, sizes)}
    return PackedBatch(**others)
