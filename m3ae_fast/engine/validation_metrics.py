"""Metrics on held-out samples: losses, losses of constant predictions, the effective rank of the features, and the
fraction of their variance that positions explain.

Shapes: I masked patches, K values of a patch, N samples, D encoder width, P visible patches, L positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from m3ae_fast.batch.packed import PackedBatch
from m3ae_fast.engine.interface import ModelEngine
from m3ae_fast.model.inference import encoding
from m3ae_fast.model.m3ae import M3AE
from m3ae_fast.process.ranks import Ranks

_EPS = 1e-7  # epsilon in the definition of RankMe


def evaluate(
    engine: ModelEngine,
    loader: Iterable[PackedBatch],
    ranks: Ranks,
    with_targets: Callable[[PackedBatch], PackedBatch],
    baselines: Baselines | None = None,
) -> dict[str, float]:
    """Return the metrics of an evaluation for the log: means over the batches of all ranks, `val_skipped` if samples
    could not be used, and the values of `baselines`. The losses of a modality without samples are missing.

    Every rank must call it, with the same number of batches.

    Args:
        engine: engine of the model.
        loader: loader of this rank's part of the held-out samples.
        ranks: the ranks of the run.
        with_targets: function that adds image targets computed on the device to a batch.
        baselines: baselines to compute as well; None: only the losses.
    """
    sums = [0.0] * 6
    for batch in loader:
        image, text = batch.counts
        batch = with_targets(batch.to(ranks.device))
        losses = engine.evaluate(batch)
        if baselines:
            baselines.add(batch)
        image_loss, text_loss, accuracy = map(float, (losses.image_loss, losses.text_loss, losses.text_accuracy))
        part = (image, image_loss * image, text, text_loss * text, accuracy * text, len(batch.skipped))
        sums = [a + b for a, b in zip(sums, part)]
    image, image_loss, text, text_loss, text_accuracy, skipped = ranks.sum(sums)
    values: dict[str, float] = {"val_skipped": int(skipped)} if skipped else {}
    if image:
        values["val_image_loss"] = image_loss / image
    if text:
        values["val_text_loss"] = text_loss / text
        values["val_text_accuracy"] = text_accuracy / text
    return values | (baselines.values(values) if baselines else {})


class Baselines:
    """Baseline losses of constant predictions, and statistics of the features, accumulated over the batches of all
    ranks in an evaluation."""

    def __init__(self, model: M3AE, precision: str, ranks: Ranks) -> None:
        """Start an evaluation. `precision`: precision in which features are computed."""
        self._model, self._precision, self._ranks = model, precision, ranks
        c = model.config
        # sums of targets and of their squares; not used if the targets are ids
        self._moments_2K = torch.zeros(2, c.image_output_dim, dtype=torch.float64)
        self._patches = 0
        ids = c.codebook_size if c.image_targets == "vqgan" else 0
        self._image_ids = torch.zeros(ids, dtype=torch.float64)
        self._text_ids = torch.zeros(c.vocab_size, dtype=torch.float64)
        self._gram_DD = torch.zeros(c.emb_dim, c.emb_dim, dtype=torch.float64, device=ranks.device)  # see `rankme`
        self._samples = 0
        # Features of visible patches: their number and sum by position, and the sum of their squares. There are no
        # positions for native images, because images of different sizes have none in common.
        positions = 0 if c.resize == "native" else c.most_patches
        self._count_L = torch.zeros(positions, dtype=torch.float64, device=ranks.device)
        self._sum_LD = torch.zeros(positions, c.emb_dim, dtype=torch.float64, device=ranks.device)
        self._squares = torch.zeros((), dtype=torch.float64, device=ranks.device)

    def add(self, batch: PackedBatch) -> None:
        """Add a batch with its targets, which must be on the device. Features are computed from the visible tokens."""
        image_I, text_W = batch.image_row_weight != 0, batch.text_row_weight != 0  # padding rows have weight 0
        if image_I.any():
            self._add_targets(self._model.image_targets.of(batch, image_I))
        if len(self._text_ids):
            self._text_ids += torch.bincount(batch.text_targets[text_W], minlength=len(self._text_ids)).cpu()
        with encoding(self._model, self._precision, self._ranks.device):
            # computed even for a batch without samples, because with ZeRO-3 all ranks must gather the weights
            features_ND, rows_TD = self._model.pooled_and_rows(batch)
        features_ND = features_ND.double()
        self._gram_DD += features_ND.T @ features_ND
        self._samples += len(features_ND)
        if len(self._count_L):
            patches_T = batch.encoder_src >= 0
            self._add_patches(rows_TD[patches_T].double(), batch.encoder_table_ids[patches_T] - 1)

    def _add_patches(self, features_PD: Tensor, positions_P: Tensor) -> None:
        """Add the features of visible patches at these positions, int32 from 0."""
        self._count_L += torch.bincount(positions_P, minlength=len(self._count_L))
        self._sum_LD.index_add_(0, positions_P, features_PD)
        self._squares += features_PD.square().sum()

    def _add_targets(self, targets: Tensor) -> None:
        """Add the image targets of a batch, float32 [I, K] or ids [I]."""
        if len(self._image_ids):
            self._image_ids += torch.bincount(targets, minlength=len(self._image_ids)).cpu()
            return
        targets_IK = targets.double()
        self._moments_2K += torch.stack((targets_IK.sum(0), targets_IK.square().sum(0))).cpu()
        self._patches += len(targets_IK)

    def values(self, losses: dict[str, float]) -> dict[str, float]:
        """Return `val_image_relative` and `val_text_relative`, which are the `losses` divided by the losses of the best
        constant predictions, and the statistics of the features, `val_rankme` and `val_position_share`. Every rank must
        call it.

        For pixels and HOG, the best constant prediction is the mean target, and its loss is the variance of the
        targets. For ids, the best constant prediction is the distribution of their frequencies, and its loss is the
        entropy of the ids.
        """
        counts = torch.tensor([self._patches, self._samples])
        of_patches = self._count_L, self._sum_LD, self._squares
        parts = self._moments_2K, self._image_ids, self._text_ids, self._gram_DD, counts, *of_patches
        sums = self._ranks.sum_tensor(torch.cat([part.flatten().cpu() for part in parts]))
        moments, image_ids, text_ids, gram, (patches, samples), count_L, sum_LD, squares = sums.split(
            [part.numel() for part in parts]
        )
        mean_K, square_K = moments.view(2, -1) / patches.clamp_min(1)
        image = entropy(image_ids) if len(image_ids) else (square_K - mean_K**2).mean().item()
        found = {"image": image, "text": entropy(text_ids)}
        values = {
            f"val_{name}_relative": losses[f"val_{name}_loss"] / worst
            for name, worst in found.items()
            if f"val_{name}_loss" in losses and worst > 1e-6
        }
        if samples:
            gram_DD = gram.view_as(self._gram_DD)
            values["val_rankme"] = self._ranks.broadcast(lambda: rankme(gram_DD, int(samples)))
        share = position_share(count_L, sum_LD.view_as(self._sum_LD), squares.item())
        return values if share is None else values | {"val_position_share": share}


def entropy(counts: Tensor) -> float:
    """Return the entropy in nats of the distribution given by frequencies, floating-point [n]; 0 if all are 0."""
    p = counts[counts > 0] / counts.sum().clamp_min(1)
    return -(p * p.log()).sum().item()


def rankme(gram_DD: Tensor, samples: int) -> float:
    """Return the effective rank of the features, from 1 to min(N, D): the exponential of the entropy of their singular
    values (RankMe, arXiv 2210.02885). The result is NaN if a feature is not finite.

    Args:
        gram_DD: float64, the sum of the outer products of the features; its eigenvalues are the squares of the singular
            values.
        samples: N, the number of samples.
    """
    if not gram_DD.isfinite().all():
        return math.nan
    squares = torch.linalg.eigvalsh(gram_DD)[-min(samples, len(gram_DD)) :]
    sizes = squares.clamp_min(0).sqrt()
    p = sizes / sizes.sum().clamp_min(_EPS) + _EPS
    return math.exp(-(p * p.log()).sum().item())


def position_share(count_L: Tensor, sum_LD: Tensor, squares: float) -> float | None:
    """Return the fraction of the variance of the patches' features that their positions explain, corrected for the
    fraction that random positions would explain (epsilon squared, Kelley 1935). The correction can make the result
    slightly negative. The result is None if it is undefined, because there are too few patches or all of them have the
    same features.

    Args:
        count_L: float64, number of patches by position.
        sum_LD: float64, sum of the features by position.
        squares: sum of the squares of all features.
    """
    found_l = count_L > 0
    count_L, sum_LD = count_L[found_l], sum_LD[found_l]
    patches, positions = int(count_L.sum()), len(count_L)
    mean_square = sum_LD.sum(0).square().sum().item() / max(patches, 1)
    total = squares - mean_square
    if patches <= positions or not total > 1e-9 * squares:
        return None
    between = (sum_LD.square().sum(1) / count_L).sum().item() - mean_square
    within = (total - between) / (patches - positions)
    return (between - (positions - 1) * within) / total
