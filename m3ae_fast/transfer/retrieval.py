"""Image-to-text and text-to-image retrieval by pooled features of each modality alone.

M3AE is not trained to align the two: this measures how far they come to lie alike anyway.

Shapes: N pairs, Q queries, D width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from m3ae_fast.batch.packing import Sample
from m3ae_fast.data import Corpus
from m3ae_fast.data.index import Modality
from m3ae_fast.encoding import Features
from m3ae_fast.errors import UserError
from m3ae_fast.pictures.figures import BLACK, GREEN, Cell, draw_sheet
from m3ae_fast.transfer.job import Job

RANKS = (1, 5, 10)
_AT_A_TIME = 512
_SHOWN, _BEST = 5, 5  # queries drawn, and what is found for each


def recalls(queries_ND: Tensor, candidates_ND: Tensor) -> dict[int, float]:
    """Return the fraction of the queries, from 0 to 1, whose own candidate, the one of the same row, is among the k
    most alike (cosine), by k of RANKS.

    A tie counts as a miss: features that are all the same find nothing.

    Args:
        queries_ND, candidates_ND: floating features, on one device.
    """
    candidates_ND = F.normalize(candidates_ND, dim=1)
    ranks = []
    for start in range(0, len(queries_ND), _AT_A_TIME):
        similarity_QN = F.normalize(queries_ND[start : start + _AT_A_TIME], dim=1) @ candidates_ND.T
        own_Q1 = similarity_QN.diagonal(start)[:, None]
        ranks.append((similarity_QN >= own_Q1).sum(1))  # 1 where no other is as alike
    ranks_N = torch.cat(ranks)
    return {k: (ranks_N <= k).double().mean().item() for k in RANKS}


def run(job: Job) -> dict[str, Any]:
    """Run the task. Raises UserError if there are fewer than two pairs, or two samples have one key."""
    pairs = job.open(job.config.data.val)
    images, texts = (_encode(job, pairs, modality) for modality in ("image", "text"))
    for features in (images, texts):
        _refuse_shared(features.keys)
    common = set(images.keys) & set(texts.keys)
    if len(common) < 2:
        raise UserError(f"{len(common)} samples of --val have an image and a caption; retrieval needs two or more")
    images_ND, texts_ND = (_rows(features, common) for features in (images, texts))
    keys = [key for key in images.keys if key in common]
    job.pictures.append(lambda: _draw(job, pairs, keys, images_ND, texts_ND))
    result: dict[str, Any] = {}
    for name, queries_ND, candidates_ND in (
        ("image_to_text", images_ND, texts_ND),
        ("text_to_image", texts_ND, images_ND),
    ):
        result |= {f"{name}_recall{k}": fraction for k, fraction in recalls(queries_ND, candidates_ND).items()}
    chance = {f"chance_recall{k}": min(k / len(common), 1.0) for k in RANKS}
    return result | chance | {"pairs": len(common), "skipped": pairs.samples - len(common)}


def _encode(job: Job, pairs: Corpus, modality: Modality) -> Features:
    sources = [replace(source, modalities=[modality] * len(source.shards)) for source in pairs.sources]
    return job.encode(replace(pairs, sources=sources), f"encoding {modality}s")


def _refuse_shared(keys: Sequence[str]) -> None:
    """Raise UserError if two samples have one key: it is then unknown which caption belongs to which image."""
    twice = next((key for key, count in Counter(keys).items() if count > 1), None)
    if twice is not None:
        raise UserError(
            f"--val: two samples have the key {twice}; name each shard once, and give each sample its own key"
        )


def _rows(features: Features, keys: set[str]) -> Tensor:
    return features.features_ND[[row for row, key in enumerate(features.keys) if key in keys]]


def _draw(job: Job, pairs: Corpus, keys: list[str], images_ND: Tensor, texts_ND: Tensor) -> None:
    """Draw what is found for some captions, and for some images; the own ones are green."""
    count = min(_SHOWN, len(keys))
    rows = [number * len(keys) // count for number in range(count)]
    for name, queries_ND, candidates_ND in (
        ("text_to_image", texts_ND, images_ND),
        ("image_to_text", images_ND, texts_ND),
    ):
        asked, found = name.split("_to_")
        similarity_QN = F.normalize(queries_ND[rows], dim=1) @ F.normalize(candidates_ND, dim=1).T
        best = similarity_QN.topk(min(_BEST, len(keys)), dim=1).indices.tolist()
        samples = job.samples(pairs, [keys[row] for row in {*rows, *(row for some in best for row in some)}])
        sheet = []
        for row, some in zip(rows, best):
            cells = [_cell(job, samples.get(keys[row]), asked)]
            cells += [_cell(job, samples.get(keys[other]), found, other == row) for other in some]
            sheet.append(cells)
        draw_sheet(job.out / f"{name}.png", sheet, (asked, "found, best first"))


def _cell(job: Job, sample: Sample | None, modality: str, own: bool = False) -> Cell:
    """Return one half of a pair."""
    colour = GREEN if own else BLACK
    if sample is None or modality == "text":
        return job.cell(sample and replace(sample, image=None), colour=colour)
    return job.cell(sample, "its own" if own else "", colour)
