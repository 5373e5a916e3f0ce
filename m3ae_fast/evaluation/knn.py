"""The task knn: k-nearest-neighbour classification of frozen features, without training, in one pass over the data.

Shapes: M held-out samples, K neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from m3ae_fast.drawing.figures import GREEN, RED, draw_sheet
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
        if not bank.has_lists:
            shown, predicted_M = _shown(bank, queries), found.best_NK[:, 0]
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
    predicted_M: Tensor,
) -> None:
    """Plot some queries with the training samples that are most similar to each. The text of a training sample is green
    if it has the query's class. `shown`: numbers of the training samples, keyed by the query's number."""
    bank, queries = features
    keys = [bank.keys[row] for rows in shown.values() for row in rows], [queries.keys[row] for row in shown]
    neighbours, shown_queries = (job.samples(corpus, names) for corpus, names in zip(job.corpora, keys))
    sheet = []
    for row, nearest_K in shown.items():
        label, predicted = int(queries.labels[row]), int(predicted_M[row])
        right = GREEN if label == predicted else RED
        text = job.names[label] + ("" if label == predicted else f", predicted as {job.names[predicted]}")
        cells = [job.cell(shown_queries.get(queries.keys[row]), text, right)]
        for other in nearest_K:
            own = int(bank.labels[other])
            cells.append(job.cell(neighbours.get(bank.keys[other]), job.names[own], GREEN if own == label else RED))
        sheet.append(cells)
    draw_sheet(job.out / "neighbours.png", sheet, ("held-out sample", "nearest training samples"))
