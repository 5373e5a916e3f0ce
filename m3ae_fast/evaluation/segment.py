"""Semantic segmentation with frozen patch features. A linear head, or a vote of the nearest training patches, assigns a
score for each class to each patch. The scores are upsampled to the pixels.

The metric is the mean intersection over union (mIoU) over classes, computed from all pixels of all held-out images
except pixels with the ignored label. Masks are cropped and scaled like the images: to the central square at the model's
resolution.

Shapes: N training images, M held-out images, R images on this rank, B images of a batch, L patches of an image, P
patches, Q of them at a time, K neighbours, C classes, D width, S x S pixels of the model's input.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from m3ae_fast.base.errors import UserError
from m3ae_fast.base.progress import track
from m3ae_fast.config import SourceConfig
from m3ae_fast.config.evaluation import SegmentConfig
from m3ae_fast.data import Corpus
from m3ae_fast.data.segmentation_masks import Masks, masked_corpus
from m3ae_fast.drawing.figures import Cell, draw_sheet
from m3ae_fast.engine.schedule import warmup_cosine
from m3ae_fast.evaluation.baseline_results import LARGEST, MODEL, Baseline, against_chance, baseline_entries
from m3ae_fast.evaluation.job import Job
from m3ae_fast.evaluation.significance import resampled_difference
from m3ae_fast.evaluation.task_features import encode_patches
from m3ae_fast.heads.feature_bank import FeatureBank, FeatureType
from m3ae_fast.heads.fit_heads import HeadBatch, Stack, fit_heads, stored_steps
from m3ae_fast.heads.modules import LinearHeads, LinearProbeHead
from m3ae_fast.heads.nearest_neighbours import nearest
from m3ae_fast.heads.predictions import IMAGE_HASH
from m3ae_fast.heads.stacked_optimizers import AdamW
from m3ae_fast.heads.standard_error import Resampled, bootstrap_weights, image_clusters
from m3ae_fast.process.collectives import all_reduce
from m3ae_fast.process.ranks import Ranks

BY_CLASS = ("class_pixels", "class_predicted", "class_right")  # columns of predictions.parquet
_SHOWN = 8  # number of held-out images in the figure
_RESAMPLES = 1000  # number of bootstrap samples
_PREDICTED = 16  # number of images that are predicted at a time
_WARM_UP = 0.1  # fraction of the steps that belong to the warm-up
_PATCHES = FeatureType(0, None)  # the only features on which a head is trained


class Images(NamedTuple):
    """Encoded images with their masks. Each rank has the images that it has encoded."""

    bank: FeatureBank  # the features of an image are its patch tokens, [R, L, D]
    masks_RSS: Tensor  # uint8 class ids, on the CPU

    @property
    def side(self) -> int:
        """Return the number of rows of patches, which is also the number of columns."""
        return math.isqrt(self.bank.stored_SD.shape[1])


@dataclass(frozen=True)
class Counts:
    """Numbers of pixels of each held-out image by class, int64 [M, C], without ignored pixels."""

    right_MC: np.ndarray  # pixels of the class that are predicted correctly
    truth_MC: np.ndarray  # pixels of the class
    predicted_MC: np.ndarray  # pixels that are predicted as the class

    def miou(self, weights_M: np.ndarray | None = None) -> float:
        """Return the mean IoU over the classes that occur or are predicted. `weights_M`: weights of the images; None:
        all weights are 1."""
        return float(np.nanmean(self.iou(weights_M)))

    def iou(self, weights_M: np.ndarray | None = None) -> np.ndarray:
        """Return the IoU of each class, [C]; NaN for a class that neither occurs nor is predicted. `weights_M`: as in
        `miou`."""
        weights_M = np.ones(len(self.truth_MC)) if weights_M is None else weights_M
        right_C, truth_C, predicted_C = (weights_M @ each for each in (self.right_MC, self.truth_MC, self.predicted_MC))
        union_C = truth_C + predicted_C - right_C
        return np.divide(right_C, union_C, out=np.full(len(union_C), np.nan), where=union_C > 0)

    def largest(self) -> Counts:
        """Return the counts for always predicting the class with the largest number of pixels."""
        first = int(self.truth_MC.sum(0).argmax())
        predicted_MC, right_MC = np.zeros_like(self.truth_MC), np.zeros_like(self.truth_MC)
        predicted_MC[:, first], right_MC[:, first] = self.truth_MC.sum(1), self.truth_MC[:, first]
        return Counts(right_MC, self.truth_MC, predicted_MC)

    def columns(self) -> dict[str, Any]:
        """Return the counts as columns of predictions.parquet: those of each image, in total and by class."""
        totals = {"pixels": self.truth_MC.sum(1), "right": self.right_MC.sum(1)}
        return totals | dict(zip(BY_CLASS, (self.truth_MC, self.predicted_MC, self.right_MC)))

    @classmethod
    def read(cls, tables: Sequence[Mapping[str, Sequence[Any]]]) -> list[Counts]:
        """Return the counts in the columns of several predictions.parquet. All have the highest number of classes in
        any of the tables; classes that a table lacks have counts of 0."""
        found = [[np.array(table[name], dtype=np.int64) for name in BY_CLASS] for table in tables]
        classes = max(truth_MC.shape[1] for truth_MC, *_ in found)
        padded = [[np.pad(part, ((0, 0), (0, classes - part.shape[1]))) for part in parts] for parts in found]
        return [cls(right_MC, truth_MC, predicted_MC) for truth_MC, predicted_MC, right_MC in padded]


def run(job: Job) -> dict[str, Any]:
    """Run the task and return its result. Raises UserError if no sample has a mask, a mask cannot be read, the masks of
    the training samples have fewer than two classes, the masks of the held-out samples have only ignored pixels, or
    the model has native aspect ratio."""
    config, model, data, ranks = job.config.segment, job.model.config, job.config.data, job.ranks
    if model.resize == "native":
        raise UserError("segment needs images of one size; add --set model.resize=square")
    opened = {name: _open(job, sources, name) for name, sources in (("train", data.train), ("val", data.val))}
    encoded = _images(job, opened)
    train, val = encoded[MODEL]
    known, val_ids = (_ids(part, config.ignore_label, ranks) for part in (train, val))
    if len(known) < 2:
        raise UserError(
            f"--train: its masks have {len(known)} class{'es' * (len(known) != 1)} besides segment.ignore_label "
            f"{config.ignore_label}; at least two are required"
        )
    if not val_ids:
        raise UserError(f"--val: all pixels of its masks have segment.ignore_label {config.ignore_label}")
    classes = max(known | val_ids) + 1
    shown = {row * len(val.bank.keys) // _SHOWN for row in range(_SHOWN)}
    counts = {}
    for name, (own, held_out) in encoded.items():
        head = fit(own, classes, config, job) if config.head == "linear" else Neighbours(own, classes, job)
        counts_R3C, cells = _predicted(job, head, held_out, classes, shown if name == MODEL else set())
        counts[name] = Counts(*val.bank.complete(counts_R3C).numpy().transpose(1, 0, 2))
        if name == MODEL:
            pictures = {row: cell for part in ranks.gather(cells) for row, cell in part.items()}
    images = {IMAGE_HASH: val.bank.image_hashes} if val.bank.image_hashes else {}
    job.keep({"key": val.bank.keys} | counts[MODEL].columns() | images)
    job.pictures.append(lambda: _draw(job, opened["val"][0], val.bank.keys, pictures))
    if untrained := val_ids - known:
        names = ", ".join(map(str, sorted(untrained)))
        job.print(f"note: no training image has pixels of the classes {names}, whose IoU therefore counts as 0")
    result = measured(counts, job.config.run.seed, val.bank.image_hashes)
    return result | {
        "head": config.head,
        "train_samples": len(train.bank.keys),
        "val_samples": len(val.bank.keys),
        "skipped": len(train.bank.skipped) + len(val.bank.skipped),
    }


def _open(job: Job, sources: Sequence[SourceConfig], name: str) -> tuple[Corpus, Masks]:
    """Return the samples that have a mask, and their masks. `name`: "train" or "val", for the message."""
    corpus = job.open(sources)
    found, masks = job.ranks.main_first(lambda: masked_corpus(corpus, progress=job.ranks.is_main))
    job.print(f"--{name}: {found.samples:,} of {corpus.samples:,} samples have a mask")
    return found, masks


def _images(job: Job, opened: Mapping[str, tuple[Corpus, Masks]]) -> dict[str, tuple[Images, Images]]:
    """Return the training and the held-out images, encoded by the model and by each baseline, with the same masks."""
    (train, train_masks), (val, val_masks) = opened["train"], opened["val"]
    encoded, size = encode_patches(job, train, val), job.model.config.image_size
    views = []
    for bank, masks in zip(encoded[MODEL], (train_masks, val_masks)):
        numbers = bank.labels[bank.own].tolist()  # the label of an image is the number of its mask
        views.append(job.ranks.together(partial(masks.views, numbers, size, progress=job.ranks.is_main)))
    return {name: (Images(own, views[0]), Images(held_out, views[1])) for name, (own, held_out) in encoded.items()}


def _ids(images: Images, ignored: int | None, ranks: Ranks) -> set[int]:
    """Return the class ids that occur in the masks of all ranks, except the ignored one."""
    return {number for part in ranks.gather(images.masks_RSS.unique().tolist()) for number in part} - {ignored}


def patch_labels(masks_BSS: Tensor, side: int, classes: int, ignored: int | None) -> Tensor:
    """Return the number of pixels of each class in each of the side x side patches of each image, float32 [B, L, C].
    `masks_BSS`: integer ids, each below `classes` or equal to `ignored`. Pixels with the id `ignored` are not counted;
    None: all pixels are counted."""
    cells_BLP = masks_BSS.long().unflatten(2, (side, -1)).unflatten(1, (side, -1))
    cells_BLP = cells_BLP.transpose(2, 3).flatten(3).flatten(1, 2)
    cells_BLP = cells_BLP.masked_fill(cells_BLP == (-1 if ignored is None else ignored), classes)
    counts = torch.zeros(len(masks_BSS), side * side, classes + 1, device=masks_BSS.device)
    counts.scatter_add_(2, cells_BLP, torch.ones((), device=masks_BSS.device).expand(cells_BLP.shape))
    return counts[..., :classes]


class Linear:
    """A trained linear head with a BatchNorm without scale and bias: patches [B, L, D] -> log-probabilities [B, L,
    C]."""

    def __init__(self, head: LinearProbeHead) -> None:
        self.head = head

    def __call__(self, patches_BLD: Tensor) -> Tensor:
        return self.head(patches_BLD).log_softmax(-1)


def fit(train: Images, classes: int, config: SegmentConfig, job: Job) -> Linear:
    """Return a linear head trained with AdamW. The loss is the mean over pixels of the cross entropy between the scores
    of a pixel's patch and the pixel's class."""
    ranks, warm_up = job.ranks, max(1, round(_WARM_UP * config.steps))
    heads = LinearHeads(train.bank.stored_SD.shape[-1], classes, [job.config.run.seed], ranks).to(ranks.device)
    optimizer = AdamW(heads.parameters(), weight_decay=config.weight_decay)
    stack = Stack(heads, optimizer, torch.full((1,), config.peak_lr, device=ranks.device), ranks)
    title = "training the head"
    fit_heads(
        track(_steps(train, classes, config, job), title, config.steps),
        {_PATCHES: stack},
        lambda step: warmup_cosine(step + 1, warm_up, config.steps + 1),
        title,
        ranks,
        job.heartbeats,
    )
    return Linear(heads.head(0).requires_grad_(False))


def _steps(train: Images, classes: int, config: SegmentConfig, job: Job) -> Iterator[HeadBatch]:
    """Yield the patches of each training step. The targets of a patch are the numbers of its pixels that belong to each
    class."""
    bank, ranks, images = train.bank, job.ranks, len(train.bank.keys)
    rows_N = torch.full((images,), -1)
    rows_N[bank.own] = torch.arange(len(bank.own))
    numbered = replace(bank, labels_N=rows_N)  # labels are rows of the masks
    steps = stored_steps({_PATCHES: numbered}, range(config.steps), min(config.batch, images), job.config.run.seed)
    for inputs, rows_B, _ in steps:
        masks_BSS = train.masks_RSS[rows_B].to(ranks.device)
        target_BLC = patch_labels(masks_BSS, train.side, classes, config.ignore_label)
        pixels = int(all_reduce(target_BLC.sum(dtype=torch.float64), ranks))
        yield HeadBatch({_PATCHES: inputs[_PATCHES].flatten(0, 1)}, target_BLC.flatten(0, 1), max(pixels, 1))


class Neighbours:
    """A head that uses the votes of the nearest training patches: patches [B, L, D] -> scores [B, L, C], whose sum over
    classes is 1. The vote of a training patch for a class is the fraction of its pixels that belong to the class. Each
    training image contributes about the same number of voting patches, evenly spaced among its patches with at least
    one pixel that is not ignored. Every rank has the voting patches of all images, in the order of the images, so that
    the result does not depend on the number of ranks."""

    def __init__(self, train: Images, classes: int, job: Job) -> None:
        bank, N, ranks = train.bank, len(train.bank.keys), job.ranks
        config, knn = job.config.segment, job.config.knn
        most = min(config.bank_patches, N * train.side**2)
        own = {}
        for row, number in enumerate(bank.own.tolist()):
            counts_LC = patch_labels(train.masks_RSS[row, None], train.side, classes, config.ignore_label)[0]
            seen_P = counts_LC.any(1).nonzero()[:, 0]
            rows_P = _evenly(seen_P, (number + 1) * most // N - number * most // N)
            own[number] = bank.take(torch.tensor([row]))[0].cpu()[rows_P], counts_LC[rows_P]
        images = {number: part for parts in ranks.gather(own) for number, part in parts.items()}
        parts = zip(*(images[number] for number in range(N)))
        patches_PD, counts_PC = (torch.cat(each).to(ranks.device).float() for each in parts)
        self.shares_PC = counts_PC / counts_PC.sum(1, keepdim=True)
        self.bank = FeatureBank([""] * len(patches_PD), patches_PD, None)
        self.k, self.temperature = min(knn.fixed_k, len(patches_PD)), knn.temperature

    def __call__(self, patches_BLD: Tensor) -> Tensor:
        queries_QD = patches_BLD.flatten(0, 1)
        found = nearest(self.bank, FeatureBank([""] * len(queries_QD), queries_QD, None), self.k, title=None)
        similarity_QK, number_QK = (each.to(queries_QD.device) for each in found)
        weights_QK = (similarity_QK / self.temperature).softmax(1)
        votes_QC = (weights_QK[..., None] * self.shares_PC[number_QK]).sum(1)
        return votes_QC.unflatten(0, patches_BLD.shape[:2])


def _evenly(rows_P: Tensor, most: int) -> Tensor:
    """Return at most `most` evenly spaced elements of `rows_P`."""
    kept = min(most, len(rows_P))
    return rows_P[torch.arange(kept) * len(rows_P) // max(kept, 1)]


@torch.no_grad()
def _predicted(
    job: Job, head: Linear | Neighbours, val: Images, classes: int, shown: set[int]
) -> tuple[Tensor, dict[int, tuple[Tensor, Tensor]]]:
    """Return the results of `count` for this rank's images, int64 [R, 3, C], and the mask and the prediction, uint8 [S,
    S], of those images whose number is in `shown`."""
    bank, ignored, size = val.bank, job.config.segment.ignore_label, job.model.config.image_size
    counts, cells = [torch.empty(0, 3, classes, dtype=torch.int64)], {}
    for first in track(range(0, len(bank.own), _PREDICTED), "predicting"):
        rows_B = torch.arange(first, min(first + _PREDICTED, len(bank.own)))
        job.heartbeats.mark("predicting")
        scores_BLC = head(bank.take(rows_B).to(job.ranks.device).float())
        predicted_BSS, masks_BSS = upsampled(scores_BLC, val.side, size).cpu(), val.masks_RSS[rows_B]
        counts.append(count(predicted_BSS, masks_BSS, classes, ignored))
        for number, *cell in zip(bank.own[rows_B].tolist(), masks_BSS, predicted_BSS):
            if number in shown:
                cells[number] = (cell[0].clone(), cell[1].clone())
    return torch.cat(counts), cells


def upsampled(scores_BLC: Tensor, side: int, size: int) -> Tensor:
    """Return the class with the highest score at each pixel, uint8 [B, S, S]. Scores are interpolated bilinearly
    between the centres of the side x side patches. `size`: S."""
    maps_BCHW = scores_BLC.transpose(1, 2).unflatten(2, (side, side))
    return torch.cat(
        [F.interpolate(each, (size, size), mode="bilinear").argmax(1).to(torch.uint8) for each in maps_BCHW.split(1)]
    )


def count(predicted_BSS: Tensor, masks_BSS: Tensor, classes: int, ignored: int | None) -> Tensor:
    """Return the three pixel counts of `Counts` for each image and class, int64 [B, 3, C]. `predicted_BSS`,
    `masks_BSS`: integer class ids; pixels whose id in the mask is `ignored` are not counted."""
    found = []
    for predicted_SS, mask_SS in zip(predicted_BSS, masks_BSS):
        seen = torch.ones_like(mask_SS, dtype=torch.bool) if ignored is None else mask_SS != ignored
        predicted, truth = predicted_SS[seen].long(), mask_SS[seen].long()
        parts = (truth[predicted == truth], truth, predicted)
        found.append(torch.stack([torch.bincount(part, minlength=classes) for part in parts]))
    return torch.stack(found)


def resampled(counts: Mapping[str, Counts], seed: int, hashes: Sequence[str] = ()) -> dict[str, Resampled]:
    """Return the mIoU of each set of predictions of the same images, with the same bootstrap samples of the images.
    Arguments as for `measured`."""
    truth_MC = next(iter(counts.values())).truth_MC
    weights_BM = bootstrap_weights(image_clusters(hashes or [""] * len(truth_MC)), _RESAMPLES, seed)
    weights_BM = weights_BM[weights_BM @ truth_MC.sum(1) > 0]  # a bootstrap sample may have only ignored pixels
    return {
        name: Resampled(np.array([each.miou(weights_M) for weights_M in weights_BM])) for name, each in counts.items()
    }


def measured(counts: Mapping[str, Counts], seed: int, hashes: Sequence[str] = ()) -> dict[str, Any]:
    """Return the entries of result.json. The model is compared with the baselines and with always predicting the
    largest class. Standard errors and the intervals of the differences are computed by a bootstrap over images.

    Args:
        counts: the counts of the model and of each baseline on the same images; the keys are MODEL and the names of
            the baselines.
        seed: random seed of the bootstrap.
        hashes: hash of each image; the bootstrap draws images with equal hashes together. Empty: all images differ.
    """
    model = counts[MODEL]
    found = resampled({**counts, LARGEST: model.largest()}, seed, hashes)
    chance = found.pop(LARGEST)
    baselines = baseline_entries(
        {
            name: Baseline(each.entries("miou"), resampled_difference(found[MODEL], each))
            for name, each in found.items()
            if name != MODEL
        }
    )
    iou_C, truth_C, pixels = model.iou(), model.truth_MC.sum(0), int(model.truth_MC.sum())
    return {
        **found[MODEL].entries("miou"),
        "pixel_accuracy": float(model.right_MC.sum() / pixels),
        "chance_miou": chance.value,
        "chance_pixel_accuracy": float(truth_C.max() / pixels),
        "per_class": [
            {"class": number, "pixels": int(truth_C[number]), "iou": float(iou_C[number])}
            for number in np.flatnonzero(~np.isnan(iou_C)).tolist()
        ],
        "classes": int((~np.isnan(iou_C)).sum()),
        **baselines,
        **against_chance(
            "miou", "mIoU", found[MODEL], chance, LARGEST, "always predicting the largest class", baselines
        ),
    }


def palette() -> Tensor:
    """Return the colours of Pascal VOC for all class ids, uint8 [256, 3]: the bits of an id are distributed over the
    channels."""
    ids = torch.arange(256)
    channels = [sum(((ids >> (3 * bit + channel)) & 1) << (7 - bit) for bit in range(3)) for channel in range(3)]
    return torch.stack([torch.as_tensor(each) for each in channels], 1).to(torch.uint8)


def _draw(job: Job, corpus: Corpus, keys: Sequence[str], cells: Mapping[int, tuple[Tensor, Tensor]]) -> None:
    """Plot some held-out images, each with its mask and its prediction. `cells`: mask and prediction, keyed by the
    image's number."""
    samples, colours = job.samples(corpus, [keys[row] for row in sorted(cells)]), palette()
    sheet = []
    for row in sorted(cells):
        truth, predicted = (Cell(colours[ids_SS.long()].permute(2, 0, 1)) for ids_SS in cells[row])
        sheet.append([job.cell(samples.get(keys[row]), ""), truth, predicted])
    draw_sheet(job.out / "segmentation.png", sheet, ("image", "ground truth", "prediction"))
