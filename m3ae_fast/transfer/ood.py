"""Out-of-distribution detection on frozen features: how well scores separate --ood from --val samples.

Scores, each higher for what looks familiar: the highest softmax probability (arXiv 1610.02136) and the energy
logsumexp of the logits (arXiv 2010.03759) of a logistic regression; minus the distance to the k-th nearest training
sample among normalised features (arXiv 2204.06507); minus the Mahalanobis distance to the nearest class, with one
covariance for all (arXiv 1807.03888).

Shapes: N training samples, M samples to score, K classes, D width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from m3ae_fast.config import SourceConfig
from m3ae_fast.errors import UserError
from m3ae_fast.pictures.figures import draw_detection
from m3ae_fast.transfer.job import Job, summary

TRUE_POSITIVES = 0.95


def auroc_and_fpr(familiar: np.ndarray, strange: np.ndarray) -> tuple[float, float]:
    """Return the area under the ROC curve with familiar samples as positives, and the fraction of strange samples that
    pass the threshold which 95 % of the familiar ones pass (both from 0 to 1).

    Args:
        familiar, strange: floating scores, one a sample, each higher for what looks familiar.
    """
    from sklearn.metrics import roc_auc_score

    truth = np.concatenate((np.ones(len(familiar)), np.zeros(len(strange))))
    area = roc_auc_score(truth, np.concatenate((familiar, strange)))
    threshold = np.sort(familiar)[len(familiar) - int(np.ceil(TRUE_POSITIVES * len(familiar)))]
    return float(area), float((strange >= threshold).mean())


class Scores:
    """The four scores, fitted to training features.

    Args:
        train_ND: float32 features.
        labels_N: int class ids.
        k: which neighbour's distance counts; at most N.
        seed: of the logistic regression.
    """

    def __init__(self, train_ND: np.ndarray, labels_N: np.ndarray, k: int, seed: int):
        from sklearn.covariance import LedoitWolf
        from sklearn.linear_model import LogisticRegression
        from sklearn.neighbors import NearestNeighbors
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        self.classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000, random_state=seed))
        self.classifier.fit(train_ND, labels_N)
        self.k = min(k, len(train_ND))
        self.neighbours = NearestNeighbors(n_neighbors=self.k).fit(_normalised(train_ND))
        self.means_KD = np.stack([train_ND[labels_N == label].mean(0) for label in np.unique(labels_N)])
        centred_ND = train_ND - self.means_KD[np.unique(labels_N, return_inverse=True)[1]]
        self.precision_DD = LedoitWolf(assume_centered=True).fit(centred_ND).precision_

    def __call__(self, features_MD: np.ndarray) -> dict[str, np.ndarray]:
        """Return scores by name, [M] each."""
        logits_MK = torch.from_numpy(self.classifier.decision_function(features_MD))
        if logits_MK.ndim == 1:  # of two classes scikit-learn gives one: the log-odds
            logits_MK = torch.stack((torch.zeros_like(logits_MK), logits_MK), 1)
        apart_MKD = features_MD[:, None] - self.means_KD
        mahalanobis_MK = np.einsum("mkd,de,mke->mk", apart_MKD, self.precision_DD, apart_MKD, optimize=True)
        return {
            "max_softmax": logits_MK.softmax(1).max(1).values.numpy(),
            "energy": logits_MK.logsumexp(1).numpy(),
            "knn": -self.neighbours.kneighbors(_normalised(features_MD))[0][:, -1],
            "mahalanobis": -mahalanobis_MK.min(1),
        }


def _normalised(features: np.ndarray) -> np.ndarray:
    return F.normalize(torch.from_numpy(features), dim=1).numpy()


def run(job: Job) -> dict[str, Any]:
    """Run the task. Raises UserError if scikit-learn is missing, or as `Job.open_labelled` does."""
    try:
        import sklearn  # noqa: F401
    except ImportError:
        raise UserError("ood needs scikit-learn: pip install 'm3ae-fast[transfer]'") from None
    labelled, held_out, classes = job.open_labelled()
    other = job.open([SourceConfig(shards=job.args.ood, modality=job.args.modality)])
    result: dict[str, Any] = {}
    columns: dict[str, Any] = {}
    job.say(
        f"ood: {labelled.samples:,} training, {held_out.samples:,} validation and {other.samples:,} other samples are "
        "encoded; then four scores tell the last two apart"
    )
    job.keep_if_stopped(lambda: (dict(result), dict(columns)))
    train, val = job.encode(labelled, "encoding train"), job.encode(held_out, "encoding val")
    strange = job.encode(other, "encoding ood")
    assert train.labels_N is not None
    scores = Scores(train.features_ND.numpy(), train.labels_N.numpy(), job.config.knn.k, job.config.run.seed)
    familiar_scores, strange_scores = (scores(part.features_ND.numpy()) for part in (val, strange))
    job.pictures.append(lambda: draw_detection(job.out / "scores.png", familiar_scores, strange_scores))
    columns |= {"key": val.keys + strange.keys, "set": ["val"] * len(val.keys) + ["ood"] * len(strange.keys)}
    for name in familiar_scores:
        area, passed = auroc_and_fpr(familiar_scores[name], strange_scores[name])
        found = {f"{name}_auroc": area, f"{name}_fpr95": passed}
        columns[name] = np.concatenate((familiar_scores[name], strange_scores[name]))
        result |= found
        job.say(f"{name}: {summary(found)}")
    job.keep(columns)
    sizes = {"train": train, "val": val, "ood": strange}
    return result | {"classes": len(classes)} | {f"{name}_samples": len(part.keys) for name, part in sizes.items()}
