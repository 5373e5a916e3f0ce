"""Out-of-distribution detection: how well scores separate the samples of --ood from those of --val. The scores are
computed from the features of a frozen encoder or of a fine-tuned classifier.

There are four scores, which are higher for samples that look in-distribution:

- max_softmax: the highest softmax probability (arXiv 1610.02136);
- energy: logsumexp of the logits (arXiv 2010.03759);
- knn: minus the distance of the normalised features to the k-th nearest training sample (arXiv 2204.06507);
- mahalanobis: minus the squared Mahalanobis distance to the nearest class mean, with one covariance for all classes
(arXiv 1807.03888).

The logits are those of the classifier's head or, with frozen features, of a logistic regression.

Shapes: N training samples, M samples to score, R samples of one of these sets on this rank, B samples at a time, K
classes, D width, V different scores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from m3ae_fast.base.errors import UserError
from m3ae_fast.base.pace import Pace
from m3ae_fast.base.progress import track
from m3ae_fast.config import SourceConfig
from m3ae_fast.config.evaluation import EncodeConfig
from m3ae_fast.data import Corpus
from m3ae_fast.data.labels import Classes
from m3ae_fast.drawing.figures import draw_detection
from m3ae_fast.evaluation.baseline_results import WARNINGS
from m3ae_fast.evaluation.job import Job, summary
from m3ae_fast.evaluation.significance import area_under_roc, middle
from m3ae_fast.evaluation.task_features import encode
from m3ae_fast.evaluation.tasks import Ood
from m3ae_fast.heads.classifier import Classifier
from m3ae_fast.heads.feature_bank import FeatureBank
from m3ae_fast.heads.fit_heads import logits
from m3ae_fast.heads.logistic_regression import fit
from m3ae_fast.heads.nearest_neighbours import nearest
from m3ae_fast.heads.predictions import IMAGE_HASH
from m3ae_fast.heads.standard_error import image_clusters
from m3ae_fast.process.collectives import all_reduce

TRAIN, VAL = "train", "val"  # names of the in-distribution samples in results
SCORES = ("max_softmax", "energy", "knn", "mahalanobis")
TRUE_POSITIVES = 0.95
BOOTSTRAPS = 1000
_AT_A_TIME = 4096  # number of samples whose squares are summed at a time


def auroc_and_fpr(inside: np.ndarray, outside: np.ndarray) -> tuple[float, float]:
    """Return the area under the ROC curve with in-distribution samples as positives, and the false positive rate at a
    true positive rate of 95 % (FPR95). `inside`, `outside`: scores of the in-distribution and of the
    out-of-distribution samples, one-dimensional arrays of finite numbers."""
    from sklearn.metrics import roc_auc_score

    truth = np.concatenate((np.ones(len(inside)), np.zeros(len(outside))))
    area = roc_auc_score(truth, np.concatenate((inside, outside)))
    threshold = np.sort(inside)[len(inside) - int(np.ceil(TRUE_POSITIVES * len(inside)))]
    return float(area), float((outside >= threshold).mean())


def precision_recall_areas(inside: np.ndarray, outside: np.ndarray) -> tuple[float, float]:
    """Return the areas under two precision-recall curves (average precisions) of scores as in `auroc_and_fpr`: with
    in-distribution samples as positives, and with out-of-distribution samples, which have low scores, as positives.
    Unlike the area under the ROC curve, both areas depend on the numbers of samples: for an uninformative score, the
    area is the fraction of positives."""
    from sklearn.metrics import average_precision_score

    truth, scores = np.repeat([1, 0], (len(inside), len(outside))), np.concatenate((inside, outside))
    return float(average_precision_score(truth, scores)), float(average_precision_score(1 - truth, -scores))


def bootstrap_areas(
    inside: np.ndarray, outside: np.ndarray, seed: int, clusters: Sequence[np.ndarray] = ()
) -> np.ndarray:
    """Return the areas under the ROC curves of BOOTSTRAPS bootstrap samples of the scores `inside` and `outside` (see
    `auroc_and_fpr`), float64 [BOOTSTRAPS]. All samples of a cluster are drawn together, and the draws depend only on
    the seed, the numbers of samples and the clusters. `clusters`: the clusters of the samples of both sets, int64 (see
    `image_clusters`); empty: every sample is a cluster of its own."""
    drawn = [(ids, ids.max() + 1) for ids in clusters or map(np.arange, map(len, (inside, outside)))]
    random = np.random.default_rng(seed)
    values_V, place = np.unique(np.concatenate((inside, outside)), return_inverse=True)
    parts = place[: len(inside)], place[len(inside) :]

    def area() -> float:
        known_V, other_V = (
            np.bincount(part, np.bincount(random.integers(count, size=count), minlength=count)[ids], len(values_V))
            for part, (ids, count) in zip(parts, drawn)
        )
        return area_under_roc(known_V, other_V)

    return np.array([area() for _ in track(range(BOOTSTRAPS), "bootstrap")])


def auroc_interval(
    inside: np.ndarray, outside: np.ndarray, seed: int, clusters: Sequence[np.ndarray] = ()
) -> tuple[float, float]:
    """Return the 95 % confidence interval of the area under the ROC curve, computed by the bootstrap; see
    `bootstrap_areas`."""
    return middle(bootstrap_areas(inside, outside, seed, clusters))


class Scores:
    """The four scores, which are fitted to training features. Every rank must create and call this object; no rank
    gathers the features of other ranks.

    Args:
        bank: features of the training samples, with labels.
        k: number of the nearest neighbour whose distance gives the score `knn`. With fewer than k training samples, the
            distance to the most distant sample is used.
        head: head of a classifier, features [R, D] -> logits [R, K]; None: a logistic regression is fitted.
    """

    def __init__(self, bank: FeatureBank, k: int, head: Callable[[Tensor], Tensor] | None = None) -> None:
        self.bank, self.k = bank, k
        present, ids_N = bank.labels.unique(return_inverse=True)
        self.means_KD, self.whitening_DD = _normal_distributions(bank, ids_N[bank.own], len(present))
        self.logits = _read(head) if head else partial(logits, fit(bank, ids_N, len(present)))

    def __call__(self, queries: FeatureBank) -> dict[str, np.ndarray]:
        """Return the scores of all queries by name, [M] each, on every rank. Every rank must call it."""
        features_RD = queries.features_RD.to(self.means_KD.device)
        logits_RK = self.logits(queries).double().cpu()
        white_RD, means_KD = (each.double() @ self.whitening_DD for each in (features_RD, self.means_KD))
        similarity_R = nearest(self.bank, queries, self.k).similarity_QK[:, -1].double()
        scores = {
            "max_softmax": logits_RK.softmax(1).max(1).values,
            "energy": logits_RK.logsumexp(1),
            "knn": -(2 - 2 * similarity_R).clamp(min=0).sqrt(),  # distance of normalised features
            "mahalanobis": -torch.cdist(white_RD, means_KD).min(1).values.square().cpu(),
        }
        return dict(zip(scores, queries.complete(torch.stack([*scores.values()], 1)).T.numpy()))


def _read(head: Callable[[Tensor], Tensor]) -> Callable[[FeatureBank], Tensor]:
    """Return a function that maps features of samples to their logits."""
    return torch.no_grad()(lambda queries: head(queries.features_RD))


def _normal_distributions(bank: FeatureBank, ids_R: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Return the means of the classes, [K, D], and a whitening matrix, [D, D]. The Mahalanobis distance of two features
    is their Euclidean distance after both have been multiplied by this matrix. Both are float64 on the device of the
    ranks. The covariance is shrunk as proposed by Ledoit and Wolf (2004).

    Args:
        bank: the training features.
        ids_R: the classes of this rank's samples, from 0.
        classes: K, the number of classes.
    """
    device = bank.ranks.device if bank.ranks else bank.stored_SD.device
    width, samples = bank.stored_SD.shape[-1], len(bank.keys)
    ids_R = ids_R.to(device)
    parts = [slice(start, start + _AT_A_TIME) for start in range(0, len(ids_R), _AT_A_TIME)]
    # the last column is the number of samples
    sums_KP = torch.zeros(classes, width + 1, dtype=torch.float64, device=device)
    for part in parts:
        features_BD = bank.take(part).to(device).double()
        sums_KP.index_add_(0, ids_R[part], F.pad(features_BD, (0, 1), value=1.0))
    sums_KP = all_reduce(sums_KP, bank.ranks)
    means_KD = sums_KP[:, :-1] / sums_KP[:, -1:]
    # the last row is the sum of the fourth powers of norms
    squares_PD = torch.zeros(width + 1, width, dtype=torch.float64, device=device)
    for part in parts:
        centred_BD = bank.take(part).to(device).double() - means_KD[ids_R[part]]
        squares_PD[:-1] += centred_BD.T @ centred_BD
        squares_PD[-1] += centred_BD.square().sum(1).square().sum()
    squares_PD = all_reduce(squares_PD, bank.ranks) / samples
    covariance_DD, fourth = squares_PD[:-1], squares_PD[-1, 0]
    variance, length = covariance_DD.trace() / width, covariance_DD.square().sum()
    distance = length - width * variance.square()  # squared distance of the covariance from a multiple of the identity
    error = ((fourth - length) / samples).clamp(max=distance)
    shrinkage = torch.where(error > 0, error / distance, 0.0)
    values_D, vectors_DD = torch.linalg.eigh(covariance_DD)
    values_D = (1 - shrinkage) * values_D.clamp(min=0) + shrinkage * variance
    rounding = width * torch.finfo(torch.float64).eps * values_D.max()
    return means_KD, vectors_DD * torch.where(values_D > rounding, values_D.rsqrt(), 0.0)


def run(job: Job[Ood]) -> dict[str, Any]:
    """Run the task and return its result. Raises UserError if the training samples do not have the classes of the
    classifier, or if `encode.pool` is not the pooling of its head. Also raises the errors of `Job.open_labelled`."""
    if isinstance(job.model, Classifier):
        _check_pool(job.model, job.config.encode)
    labelled, held_out, classes = job.open_labelled()
    sources = {
        name: SourceConfig(shards=list(shards), modality=job.modality) for name, shards in job.options.ood.items()
    }
    outside = {name: job.open([source]) for name, source in sources.items()}
    head = None
    if isinstance(job.model, Classifier):
        _check_classes(job.model, classes)
        head, job = job.model.head, _of_encoder(job, job.model)
    result: dict[str, Any] = {}
    warnings: list[str] = []
    others = sum(corpus.samples for corpus in outside.values())
    job.print(
        f"ood: {labelled.samples:,} training, {held_out.samples:,} held-out and {others:,} out-of-distribution samples "
        "are encoded; then four scores are compared by how well they separate the last two groups"
    )
    whole = Pace(labelled.samples + held_out.samples + others)
    train, val = (
        _encoded(job, corpus, f"encoding {name}", whole) for corpus, name in ((labelled, TRAIN), (held_out, VAL))
    )
    seed = job.config.run.seed
    job.print(f"fitting the scores to {len(train.keys):,} training samples")
    scores = Scores(train, job.config.knn.fixed_k, head)
    known = scores(val)
    columns: dict[str, Any] = {
        "key": [*val.keys],
        "set": [VAL] * len(val.keys),
        **{name: [*own] for name, own in known.items()},
        IMAGE_HASH: val.image_hashes or [""] * len(val.keys),
    }
    samples = {"train_samples": len(train.keys), "val_samples": len(val.keys)}
    for name, corpus in outside.items():
        prefix = f"{name}_" if name else ""
        found = _encoded(job, corpus, f"encoding {name or 'ood'}", whole)
        other = scores(found)
        measured = _compare(known, other, seed, [image_clusters(bank.image_hashes) for bank in (val, found)])
        metrics = {f"{prefix}{key}": value for key, value in measured.items()}
        result |= metrics
        job.print(f"{name or 'ood'}: {summary(metrics)}")
        for warning in filter(None, (unknown_intervals(measured), inverted(measured))):
            warnings.append(f"{name or 'ood'}: {warning}")
        hashes = found.image_hashes or [""] * len(found.keys)
        more: dict[str, Any] = {
            "key": found.keys,
            "set": [name or "ood"] * len(found.keys),
            **other,
            IMAGE_HASH: hashes,
        }
        columns = {column: [*columns[column], *values] for column, values in more.items()}
        samples[f"{name or 'ood'}_samples"] = len(found.keys)
        path = job.out / (f"scores-{name}.png" if name else "scores.png")
        job.pictures.append(partial(draw_detection, path, known, other))
    job.keep(columns)
    return result | {"classes": len(classes), WARNINGS: warnings} | samples


def _encoded(job: Job, corpus: Corpus, title: str, whole: Pace) -> FeatureBank:
    """Return the features of one of several datasets, and print the progress over all of them."""
    found = encode(job, corpus, title, whole)
    assert whole.total is not None
    part = f"{whole.done / whole.total:.0%} of the encoding{whole.describe_left()}"
    job.print(f"{title}: {len(found.keys):,} samples done ({part})")
    return found


def unknown_intervals(found: dict[str, float]) -> str:
    """Return a warning if there are no confidence intervals; otherwise "". `found`: metrics of a set."""
    if any(f"{name}_auroc_high" in found for name in SCORES):
        return ""
    return "the intervals of the AUROC cannot be estimated from a single sample; use more --val and --ood samples"


def inverted(found: dict[str, float]) -> str:
    """Return a warning if there are inverted scores, that is, scores whose AUROC has a confidence interval below 0.5;
    otherwise "". `found`: metrics of a set."""
    low = [
        f"{name} (AUROC {found[f'{name}_auroc']:.2f})" for name in SCORES if found.get(f"{name}_auroc_high", 1) < 0.5
    ]
    if not low:
        return ""
    return (
        f"inverted scores: {', '.join(low)}. They rate out-of-distribution samples as more in-distribution than the "
        "samples of --val; choose another score"
    )


def _check_classes(classifier: Classifier, classes: Classes) -> None:
    """Raise UserError if the classes of the training samples differ from those of the classifier."""
    if (own := classifier.config.classes) != (found := list(classes)):
        differing = sorted(map(str, {*own} ^ {*found}))
        what = f"only one of the two has the class {differing[0]!r}" if differing else "their order differs"
        raise UserError(
            f"--train: the samples have {len(found)} classes, and the classifier has {len(own)}: {what}; pass the "
            "samples on which the classifier was trained"
        )


def _check_pool(classifier: Classifier, encode: EncodeConfig) -> None:
    """Raise UserError if `encode.pool` is set to a pooling with which the classifier's head was not trained."""
    own = classifier.config.pool
    if "pool" in encode.model_fields_set and encode.pool != own:
        raise UserError(
            f"override encode.pool={encode.pool}: the classifier was trained with encode.pool={own}; leave out this "
            "setting"
        )


def _of_encoder(job: Job, classifier: Classifier) -> Job:
    """Return a job for the encoder of a classifier, with the pooling of the classifier's head."""
    encode = job.config.encode.model_copy(update={"pool": classifier.config.pool})
    return replace(job, model=classifier.backbone, config=job.config.model_copy(update={"encode": encode}))


def _compare(
    known: dict[str, np.ndarray], other: dict[str, np.ndarray], seed: int, clusters: Sequence[np.ndarray] = ()
) -> dict[str, float]:
    """Return the metrics of each score: the area under the ROC curve, the areas under the precision-recall curves, and
    FPR95. The area under the ROC curve has a confidence interval unless a set has only one image. `known`, `other`:
    scores of the in-distribution and of the out-of-distribution samples by name. `clusters`: see `bootstrap_areas`."""
    found: dict[str, float] = {}
    for name in known:
        area, passed = auroc_and_fpr(known[name], other[name])
        found |= {f"{name}_auroc": area, f"{name}_fpr95": passed}
        # bootstrap samples of a single image do not vary
        if all(ids.any() for ids in clusters or map(np.arange, map(len, (known[name], other[name])))):
            low, high = auroc_interval(known[name], other[name], seed, clusters)
            found |= {f"{name}_auroc_low": low, f"{name}_auroc_high": high}
        aupr_in, aupr_out = precision_recall_areas(known[name], other[name])
        found |= {f"{name}_aupr_in": aupr_in, f"{name}_aupr_out": aupr_out}
    return found
