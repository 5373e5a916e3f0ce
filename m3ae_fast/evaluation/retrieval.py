"""Image-to-text and text-to-image retrieval by the pooled features of images and of captions, which are encoded
separately.

M3AE is not trained to align the two modalities; the task measures how well they are nevertheless aligned.

Shapes: N pairs, R of them on this rank, Q queries, B candidates of a block, W ranks, D width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
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
from m3ae_fast.evaluation.feature_bank import FeatureBank
from m3ae_fast.evaluation.job import Job, summary
from m3ae_fast.evaluation.neighbours import nearest
from m3ae_fast.evaluation.significance import ERROR, standard_error
from m3ae_fast.process.collectives import all_gather, all_reduce

RANKS, WAYS = (1, 5, 10), ("image_to_text", "text_to_image")
AT_CHANCE = (
    "note: the recall is at chance level. M3AE is trained to predict masked tokens and patches, not to align the "
    "embeddings of captions and images, so the pooled features of a matching pair need not be similar"
)
_AT_A_TIME = 1024
_SHOWN, _BEST = 5, 5  # number of queries in the figure, and of results per query


def own_ranks(queries: FeatureBank, candidates: FeatureBank) -> Tensor:
    """Return the position of each query's match (the candidate with the same number) in the list of candidates sorted
    by cosine similarity: int64 [N], from 1 (most similar), on every rank. In a tie, the match comes last, so that
    constant features have the lowest recall.

    Each rank compares the queries of all ranks with its own candidates, in float64 rounded to float32, so the result
    does not depend on the number of ranks. On each rank, both banks must contain the samples with the same numbers.
    """
    ranks, device = queries.ranks, queries.stored_SD.device
    own_R = queries.own
    most = len(own_R) if ranks is None else max(ranks.gather(len(own_R)))
    at_a_time = max(_AT_A_TIME // (ranks.world if ranks else 1), 1)
    places = []
    for start in track(range(0, most, at_a_time), "ranking"):
        part = slice(start, start + at_a_time)
        unit_QD, wanted_QD = (F.normalize(bank.take(part).double(), dim=1) for bank in (queries, candidates))
        similar_Q, number_Q = (unit_QD * wanted_QD).sum(1).float(), own_R[part].to(device)
        missing = min(most - start, at_a_time) - len(unit_QD)  # this rank may have fewer queries than others
        padded = (F.pad(unit_QD, (0, 0, 0, missing)), F.pad(similar_Q, (0, missing)), F.pad(number_Q, (0, missing)))
        all_QD, all_Q, numbers_Q = (all_gather(each, ranks).flatten(0, 1) for each in padded)
        above_Q = torch.zeros_like(numbers_Q)
        for first in range(0, len(candidates.own), _AT_A_TIME):
            block = slice(first, first + _AT_A_TIME)
            similarity_QB = (all_QD @ F.normalize(candidates.take(block).double(), dim=1).T).float()
            other_QB = numbers_Q[:, None] != candidates.own[block].to(device)
            above_Q += ((similarity_QB >= all_Q[:, None]) & other_QB).sum(1)
        above_WQ = all_reduce(above_Q, ranks).view(-1, min(most - start, at_a_time))
        places.append(1 + above_WQ[ranks.rank if ranks else 0, : len(unit_QD)])
    return queries.complete(torch.cat(places) if places else own_R)


def recalls(ranks_N: Tensor) -> dict[int, float]:
    """Return the recall at k, from 0 to 1, for each k in RANKS: the fraction of queries whose match is among the k most
    similar candidates. `ranks_N`: the result of `own_ranks`."""
    return {k: (ranks_N <= k).double().mean().item() for k in RANKS}


def run(job: Job) -> dict[str, Any]:
    """Run the task and return its result. Raises UserError if there are fewer than two pairs, or if two samples have
    the same key."""
    pairs = job.open(job.config.data.val)
    result: dict[str, Any] = {}
    columns: dict[str, Any] = {}
    job.print(
        f"retrieval: the images and the captions of {pairs.samples:,} samples are encoded; then all captions are "
        "ranked for each image, and all images for each caption"
    )

    images, texts = _encode(job, pairs)
    for features in (images, texts):
        _refuse_shared(features.keys)
    common = set(images.keys) & set(texts.keys)
    if len(common) < 2:
        raise UserError(f"{len(common)} samples of --val have an image and a caption, but retrieval needs at least two")
    images, texts = (_pairs(features, common) for features in (images, texts))
    keys = images.keys
    shown = {name: _shown(*way) for name, way in _ways(images, texts).items()}
    job.pictures.append(lambda: _draw(job, pairs, keys, shown))
    columns["key"] = keys
    for name, way in _ways(images, texts).items():
        ranks_N = own_ranks(*way)
        columns[f"{name}_rank"] = ranks_N.tolist()
        found = {f"{name}_recall{k}": fraction for k, fraction in recalls(ranks_N).items()}
        errors = {name + ERROR: standard_error(fraction, len(keys)) for name, fraction in found.items()}
        result |= found | errors
        job.print(f"{name}: {summary(found | errors)}")
    job.keep(columns)
    chance = {f"chance_recall{k}": min(k / len(common), 1.0) for k in RANKS}
    result |= chance | {"pairs": len(common), "skipped": pairs.samples - len(common)}
    if at_chance(result):
        job.print(AT_CHANCE)
    return result


def at_chance(result: dict[str, Any]) -> bool:
    """Return whether no recall exceeds its chance level by more than two standard errors. The standard error is that of
    a recall equal to the chance level."""

    def above(name: str) -> bool:
        chance = result[f"chance_{name.rpartition('_')[2]}"]
        return result[name] - chance > 2 * standard_error(chance, result["pairs"])

    return not any(above(f"{way}_recall{k}") for way in WAYS for k in RANKS)


def _encode(job: Job, pairs: Corpus) -> tuple[FeatureBank, FeatureBank]:
    """Return the features of the images and of the captions, which are encoded separately."""
    config = job.model.config
    tokens: dict[Modality, int] = {"image": config.most_patches, "text": config.text_length}  # maximum numbers
    encode, parts = job.encoder(pairs.samples * sum(tokens.values())), []
    for modality, cost in tokens.items():
        sources = [replace(source, modalities=[modality] * len(source.shards)) for source in pairs.sources]
        parts.append(encode(replace(pairs, sources=sources), f"encoding {modality}s", cost))
    return parts[0], parts[1]


def _refuse_shared(keys: Sequence[str]) -> None:
    """Raise UserError if two samples have the same key, because images and captions are matched by key."""
    twice = next((key for key, count in Counter(keys).items() if count > 1), None)
    if twice is not None:
        raise UserError(
            f"--val: two samples have the key {twice}; specify each shard only once, and give each sample a unique key"
        )


def _pairs(features: FeatureBank, keys: set[str]) -> FeatureBank:
    return features.rows([row for row, key in enumerate(features.keys) if key in keys])


def _ways(images: FeatureBank, texts: FeatureBank) -> dict[str, tuple[FeatureBank, FeatureBank]]:
    """Return the queries and the candidates for both directions of retrieval."""
    return dict(zip(WAYS, ((images, texts), (texts, images))))


def _shown(queries: FeatureBank, candidates: FeatureBank) -> dict[int, list[int]]:
    """Return the numbers of the best candidates for some evenly spaced queries, keyed by the query's number. Every rank
    must call it."""
    count = min(_SHOWN, len(queries.keys))
    rows = [number * len(queries.keys) // count for number in range(count)]
    some = queries.rows(rows)
    return dict(zip(rows, some.complete(nearest(candidates, some, _BEST, "ranking").number_QK).tolist()))


def _draw(job: Job, pairs: Corpus, keys: list[str], shown: Mapping[str, Mapping[int, Sequence[int]]]) -> None:
    """Plot the results for some captions and for some images; the text of a match is green. `shown`: for each
    direction, the numbers of the candidates, keyed by the query's number."""
    for name, best in shown.items():
        query_kind, found = name.split("_to_")
        samples = job.samples(pairs, [keys[row] for row in {*best, *(row for some in best.values() for row in some)}])
        sheet = []
        for row, some in best.items():
            cells = [_cell(job, samples.get(keys[row]), query_kind)]
            cells += [_cell(job, samples.get(keys[other]), found, other == row) for other in some]
            sheet.append(cells)
        draw_sheet(job.out / f"{name}.png", sheet, (f"query ({query_kind})", "results, most similar first"))


def _cell(job: Job, sample: Sample | None, modality: str, own: bool = False) -> Cell:
    """Return a cell of a figure with the image or the caption of a sample. `own`: whether it matches the query."""
    colour = GREEN if own else BLACK
    if sample is None or modality == "text":
        return job.cell(sample and replace(sample, image=None), colour=colour)
    return job.cell(sample, "its own" if own else "", colour)
