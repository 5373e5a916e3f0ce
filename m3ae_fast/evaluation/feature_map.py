"""t-SNE maps of several models' features of the same samples, with measures of how well the classes are separated.

Shapes: N samples, K neighbours, D width.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from m3ae_fast.base.environment import Device
from m3ae_fast.base.errors import UserError
from m3ae_fast.config import DataConfig
from m3ae_fast.config.evaluation import EncodeConfig
from m3ae_fast.data import Corpus
from m3ae_fast.data.labels import Classes
from m3ae_fast.drawing.figures import MapPanel, draw_map
from m3ae_fast.evaluation.encoding import encode_corpus
from m3ae_fast.process.ranks import join_ranks
from m3ae_fast.weights.open_model import open_model

NEIGHBOURS = 10
_PERPLEXITY = 30.0


class Separation(NamedTuple):
    """Measures of how well classes of points are separated."""

    silhouette: float  # mean over points, from -1 to 1 (Rousseeuw 1987); NaN if it is not defined
    knn: float  # k-NN accuracy: fraction of points whose class is the most frequent one among their neighbours
    neighbours: int

    def __str__(self) -> str:
        return f"silhouette {self.silhouette:.3f}, {self.neighbours}-NN accuracy {100 * self.knn:.1f} %"


def draw_feature_map(
    path: Path,
    models: Sequence[str],
    corpus: Corpus,
    classes: Classes,
    data: DataConfig,
    seed: int,
    most: int | None = None,
    device: Device | None = None,
) -> None:
    """Write a PNG with a t-SNE map for each model, and print the captions of the maps.

    Args:
        path: the file to write.
        models: names of the models.
        corpus: labelled dataset.
        classes: names of the classes by id.
        data: settings of the data loader.
        seed: random seed of t-SNE.
        most: maximum number of samples on a map, evenly spaced over the dataset; None: all samples.
        device: as in `join_ranks`.

    Raises:
        UserError: there are fewer than 4 samples, the models cannot read the same samples, or `open_model` or
            `encode_corpus` raises it.
    """
    with join_ranks(device) as ranks:
        opened = (open_model(name, text=False).to(ranks.device) for name in models)
        found = [encode_corpus(model, corpus, data, EncodeConfig(), ranks).gathered() for model in opened]
    for name, features in zip(models, found):
        if features.keys != found[0].keys:
            raise UserError(
                f"{name}: cannot read the same samples as {models[0]}; choose shards that both models can read"
            )
    if len(found[0].keys) < 4:
        raise UserError(f"{len(found[0].keys)} samples have a class, but a map requires at least 4")
    if most and most < len(found[0].keys):
        rows = np.linspace(0, len(found[0].keys) - 1, most).astype(int).tolist()
        found = [features.rows(rows) for features in found]
    labels_N = found[0].labels.numpy()
    panels = []
    for name, features in zip(models, found):
        # t-SNE itself shows no progress
        print(f"t-SNE of {len(features.keys):,} samples of {name}", file=sys.stderr, flush=True)
        points_N2 = _tsne(features.features_RD.numpy(), seed)
        panels.append(MapPanel(name, points_N2, f"{separation(points_N2, labels_N)}, {len(labels_N):,} samples"))
        print(f"{name}: {panels[-1].caption}")
    draw_map(path, panels, labels_N, classes)


def _tsne(features_ND: np.ndarray, seed: int) -> np.ndarray:
    from sklearn.manifold import TSNE

    perplexity = min(_PERPLEXITY, (len(features_ND) - 1) / 3)
    return TSNE(init="pca", perplexity=perplexity, random_state=seed).fit_transform(features_ND)


def separation(points_N2: np.ndarray, labels_N: np.ndarray, neighbours: int = NEIGHBOURS) -> Separation:
    """Return measures of how well the classes of points in the plane are separated. `neighbours`: number of neighbours,
    at most N - 1, that vote for the class of a point; in a tie, the lowest class id wins."""
    from scipy.stats import mode
    from sklearn.metrics import silhouette_score
    from sklearn.neighbors import NearestNeighbors

    neighbours = min(neighbours, len(points_N2) - 1)
    nearest_NK = NearestNeighbors(n_neighbors=neighbours).fit(points_N2).kneighbors(return_distance=False)
    right = float((mode(labels_N[nearest_NK], axis=1).mode == labels_N).mean())
    defined = 1 < len(np.unique(labels_N)) < len(labels_N)
    return Separation(float(silhouette_score(points_N2, labels_N)) if defined else np.nan, right, neighbours)
