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

from m3ae_fast.base.errors import UserError
from m3ae_fast.base.progress import track
from m3ae_fast.batch.packing import Sample
from m3ae_fast.data import Corpus
from m3ae_fast.data.index import Modality
from m3ae_fast.drawing.figures import BLACK, GREEN, Cell, draw_sheet
from m3ae_fast.evaluation.encoding import Features
from m3ae_fast.evaluation.job import Job, SoFar, summary
from m3ae_fast.evaluation.significance import ERROR, standard_error

RANKS, WAYS = (1, 5, 10), ("image_to_text", "text_to_image")
AT_CHANCE = (
    "note: this is what chance gives. M3AE learns to predict words and patches from each other; it learns no alignment "
    "of whole captions with whole images, so that their pooled features need not lie alike"
)
_AT_A_TIME = 512
_SHOWN, _BEST = 5, 5  # queries drawn, and what is found for each


def own_ranks(queries_ND: Tensor, candidates_ND: Tensor) -> Tensor:
    """Return the place of each query's own candidate, the one of the same row, among all by likeness (cosine): int64
    [N], 1 for the most alike. Of a tie it is the last: features that are all the same find nothing."""
    candidates_ND = F.normalize(candidates_ND, dim=1)
    ranks = []
    for start in track(range(0, len(queries_ND), _AT_A_TIME), "ranking"):
        similarity_QN = F.normalize(queries_ND[start : start + _AT_A_TIME], dim=1) @ candidates_ND.T
        own_Q1 = similarity_QN.diagonal(start)[:, None]
        ranks.append((similarity_QN >= own_Q1).sum(1))  # 1 where no other is as alike
    return torch.cat(ranks)


def recalls(ranks_N: Tensor) -> dict[int, float]:
    """Return the fraction of the queries, from 0 to 1, whose rank is at most k, by k of RANKS."""
    return {k: (ranks_N <= k).double().mean().item() for k in RANKS}


def run(job: Job) -> dict[str, Any]:
    """Run the task. Raises UserError if there are fewer than two pairs, or two samples have one key."""
    pairs = job.open(job.config.data.val)
    result: dict[str, Any] = {}
    columns: dict[str, Any] = {}
    job.say(
        f"retrieval: {pairs.samples:,} samples, encoded twice, images and captions; then each image looks for its "
        "caption among all, and each caption for its image"
    )

    def so_far() -> SoFar:
        done = sum(f"{way}_rank" in columns for way in WAYS)
        return SoFar(f"{done} of {len(WAYS)} ways", dict(result), dict(columns))

    job.keep_if_stopped(so_far)
    images, texts = _encode(job, pairs)
    for features in (images, texts):
        _refuse_shared(features.keys)
    common = set(images.keys) & set(texts.keys)
    if len(common) < 2:
        raise UserError(f"{len(common)} samples of --val have an image and a caption; retrieval needs two or more")
    images_ND, texts_ND = (_rows(features, common) for features in (images, texts))
    keys = [key for key in images.keys if key in common]
    job.pictures.append(lambda: _draw(job, pairs, keys, images_ND, texts_ND))
    columns["key"] = keys
    for name, way in _ways(images_ND, texts_ND).items():
        ranks_N = own_ranks(*way)
        columns[f"{name}_rank"] = ranks_N.tolist()
        found = {f"{name}_recall{k}": fraction for k, fraction in recalls(ranks_N).items()}
        errors = {name + ERROR: standard_error(fraction, len(keys)) for name, fraction in found.items()}
        result |= found | errors
        job.say(f"{name}: {summary(found | errors)}")
    job.keep(columns)
    chance = {f"chance_recall{k}": min(k / len(common), 1.0) for k in RANKS}
    result |= chance | {"pairs": len(common), "skipped": pairs.samples - len(common)}
    if at_chance(result):
        job.say(AT_CHANCE)
    return result


def at_chance(result: dict[str, Any]) -> bool:
    """Return whether no recall is above chance by more than two standard errors of chance."""

    def above(name: str) -> bool:
        chance = result[f"chance_{name.rpartition('_')[2]}"]
        return result[name] - chance > 2 * standard_error(chance, result["pairs"])

    return not any(above(f"{way}_recall{k}") for way in WAYS for k in RANKS)


def _encode(job: Job, pairs: Corpus) -> tuple[Features, Features]:
    """Return the features of the images alone, and of the captions alone."""
    config = job.model.config
    tokens: dict[Modality, int] = {"image": config.most_patches, "text": config.text_length}  # at most
    encode, parts = job.encoder(pairs.samples * sum(tokens.values())), []
    for modality, cost in tokens.items():
        sources = [replace(source, modalities=[modality] * len(source.shards)) for source in pairs.sources]
        parts.append(encode(replace(pairs, sources=sources), f"encoding {modality}s", cost))
    return parts[0], parts[1]


def _refuse_shared(keys: Sequence[str]) -> None:
    """Raise UserError if two samples have one key: it is then unknown which caption belongs to which image."""
    twice = next((key for key, count in Counter(keys).items() if count > 1), None)
    if twice is not None:
        raise UserError(
            f"--val: two samples have the key {twice}; name each shard once, and give each sample its own key"
        )


def _rows(features: Features, keys: set[str]) -> Tensor:
    return features.features_ND[[row for row, key in enumerate(features.keys) if key in keys]]


def _ways(images_ND: Tensor, texts_ND: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Return queries and candidates of both ways."""
    return dict(zip(WAYS, ((images_ND, texts_ND), (texts_ND, images_ND))))


def _draw(job: Job, pairs: Corpus, keys: list[str], images_ND: Tensor, texts_ND: Tensor) -> None:
    """Draw what is found for some captions, and for some images; the own ones are green."""
    count = min(_SHOWN, len(keys))
    rows = [number * len(keys) // count for number in range(count)]
    for name, (queries_ND, candidates_ND) in _ways(images_ND, texts_ND).items():
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
