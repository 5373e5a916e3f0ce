"""The task knn: k-nearest-neighbour classification of frozen features, without training, in one pass over the data.

Shapes: M held-out samples, K neighbours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from m3ae_fast.drawing.figures import BLACK, GREEN, RED, draw_sheet
from m3ae_fast.evaluation.job import Job
from m3ae_fast.evaluation.probe_grid import run_probes
from m3ae_fast.evaluation.tasks import Knn
from m3ae_fast.heads.feature_bank import FeatureBank
from m3ae_fast.heads.nearest_neighbours import nearest

_SHOWN, _NEIGHBOURS = 8, 7  # number of queries in the figure, and of neighbours per query


def run(job: Job[Knn]) -> dict[str, Any]:
    """Run the task and return its result. Raises UserError as `run_probes` does."""
    entries, found, encoded = run_probes(job)
    if encoded and not job.options.is_grid:
        (bank,), (queries,) = encoded.train.values(), encoded.val.values()
        shown, predicted_M = _shown(bank, queries), None if bank.has_lists else found.best_NK[:, 0]
        job.pictures.append(lambda: _draw_neighbours(job, (bank, queries), shown, predicted_M))
    return entries


def _shown(bank: FeatureBank, queries: FeatureBank) -> dict[int, list[int]]:
    """Return the numbers of the training samples nearest to some evenly spaced queries, keyed by the query's number.
    Every rank must call it."""
    count = min(_SHOWN, len(queries.keys))
    rows = [number * len(queries.keys) // count for number in range(count)]
    some = queries.rows(rows)
    return dict(zip(rows, some.complete(nearest(bank, some, _NEIGHBOURS).number_QK).tolist()))


def _draw_neighbours(
    job: Job,
    features: tuple[FeatureBank, FeatureBank],
    shown: Mapping[int, Sequence[int]],
    predicted_M: Tensor | None,
) -> None:
    """Plot some queries with the training samples that are most similar to each. The text of a training sample is green
    if it has the query's class or, for lists of labels, one of the query's classes.

    Args:
        job: the job.
        features: features of the training and the held-out samples.
        shown: numbers of the training samples, keyed by the query's number.
        predicted_M: predicted classes of the held-out samples; None for lists of labels.
    """
    bank, queries = features
    keys = [bank.keys[row] for rows in shown.values() for row in rows], [queries.keys[row] for row in shown]
    neighbours, shown_queries = (job.samples(corpus, names) for corpus, names in zip(job.corpora, keys))
    sheet = []
    for row, nearest_K in shown.items():
        classes = _classes(queries, row)
        text, colour = _text(job, classes), BLACK
        if predicted_M is not None:
            predicted = int(predicted_M[row])
            colour = GREEN if predicted in classes else RED
            text += "" if predicted in classes else f", predicted as {job.names[predicted]}"
        cells = [job.cell(shown_queries.get(queries.keys[row]), text, colour)]
        for other in nearest_K:
            own = _classes(bank, other)
            colour = RED if classes.isdisjoint(own) else GREEN
            cells.append(job.cell(neighbours.get(bank.keys[other]), _text(job, own), colour))
        sheet.append(cells)
    draw_sheet(job.out / "neighbours.png", sheet, ("held-out sample", "nearest training samples"))


def _classes(bank: FeatureBank, row: int) -> set[int]:
    """Return the class ids of a sample: all classes in its list of labels, or its only class."""
    label = bank.labels[row]
    return {*label.nonzero()[:, 0].tolist()} if bank.has_lists else {int(label)}


def _text(job: Job, classes: Iterable[int]) -> str:
    return ", ".join(job.names[number] for number in sorted(classes))
