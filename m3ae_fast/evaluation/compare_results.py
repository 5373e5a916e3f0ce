"""Significance tests between results on the same samples: accuracies, mAP, mIoU, or areas under ROC curves.

Shapes: N in-distribution samples, M out-of-distribution samples (of `ood`) or held-out images, C classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from m3ae_fast.base.errors import UserError
from m3ae_fast.base.libraries import require_libraries
from m3ae_fast.base.parquet import read_parquet
from m3ae_fast.base.wording import counted
from m3ae_fast.evaluation import segment
from m3ae_fast.evaluation.baseline_results import (
    BASELINES,
    LARGEST,
    MODEL,
    WARNINGS,
    baseline_name,
    differences,
    not_better,
    warning,
)
from m3ae_fast.evaluation.ood import SCORES, VAL, auroc_and_fpr, bootstrap_areas
from m3ae_fast.evaluation.probe_grid import Case, main_case
from m3ae_fast.evaluation.significance import Difference, difference, middle, resampled_difference, verdict
from m3ae_fast.heads.average_precision import resampled
from m3ae_fast.heads.predictions import FILE, IMAGE_HASH, largest_share
from m3ae_fast.heads.standard_error import Resampled, image_clusters

Table = dict[str, list[Any]]
_COLUMNS = ("key", "label", "prediction")
_ADVICE = (
    "to compare results, specify the folders that two or more evaluations wrote, such as runs/knn; to compare models, "
    "add --train, --val and --out"
)


@dataclass(frozen=True)
class Result:
    """The predictions of a task, from its folder."""

    folder: Path
    table: Table

    @property
    def hashes(self) -> list[str]:
        """Return the hash of each row's image; "" for an unknown hash. See `image_clusters`."""
        return self.table.get(IMAGE_HASH, [""] * len(self.table["key"]))

    @property
    def metric(self) -> str:
        """Return the name of the metric by which the result is compared."""
        return next((name for name, metric in _METRICS.items() if {*metric.columns} <= self.table.keys()), _ACCURACY)

    def rows(self, numbers: Sequence[int]) -> Result:
        """Return the result with only these rows, in this order."""
        return Result(self.folder, {name: [column[row] for row in numbers] for name, column in self.table.items()})

    def parts(self, *names: str) -> dict[tuple[Any, ...], Result]:
        """Return the rows grouped by their values in the columns `names`. The keys are these values, in the order in
        which they first occur."""
        numbers: dict[tuple[Any, ...], list[int]] = {}
        for row, values in enumerate(zip(*(self.table[name] for name in names))):
            numbers.setdefault(values, []).append(row)
        return {values: self.rows(own) for values, own in numbers.items()}

    def matched(self, other: Result, *names: str) -> Result:
        """Return the other result with its rows in the order of the rows of this result. Two rows belong together if
        they are equal in the columns `names`. Raises UserError if the samples of the results differ."""
        own, theirs = (list(zip(*(each.table[name] for name in names))) for each in (self, other))
        _require_same((self.folder, other.folder), {*own}, {*theirs})
        place = {which: row for row, which in enumerate(theirs)}
        return other.rows([place[which] for which in own])


def compare_results(folders: Sequence[Path]) -> str:
    """Return lines that state for each pair of results which result is better. There is one line for each pair, except
    for results of robustness (one line for the clean images and for each attack) and of ood (one line for each set and
    score). If a result has several layers, poolings or numbers of training samples, its main accuracy is compared (see
    `main_case`). Raises UserError if there are fewer than two folders, a folder has no predictions, or the results
    differ in their metric or their samples."""
    if len(folders) < 2:
        raise UserError(f"{folders[0]}: cannot be compared alone; {_ADVICE}")
    if missing := next((folder for folder in folders if not (folder / FILE).is_file()), None):
        raise UserError(f"{missing}: has no {FILE}; {_ADVICE}")
    results = [Result(folder, read_parquet(folder / FILE)) for folder in folders]
    return "\n".join(line for pair in combinations(results, 2) for line in _compare(*pair))


def _compare(one: Result, other: Result) -> Iterator[str]:
    """Yield the lines about two results."""
    if one.metric != other.metric:
        raise UserError(
            f"{one.folder} and {other.folder}: are measured by different metrics, {one.metric} and {other.metric}; "
            "choose results with the same metric"
        )
    yield from _METRICS[one.metric].compare(one, other)


def _compare_accuracies(one: Result, other: Result) -> Iterator[str]:
    """Yield a sentence about the accuracies of two classifiers; for results of robustness, yield one for the clean
    images and for each attack."""
    attacks, others = map(_by_attack, (one, other))
    if attacks.keys() != others.keys():
        names = ", ".join(sorted((attacks.keys() ^ others.keys()) - {""}))
        raise UserError(
            f"{one.folder} and {other.folder}: only one of them contains {names}; "
            "choose two results of the same task with the same settings"
        )
    for attack, first in attacks.items():
        ours, theirs = _classified(first), _classified(others[attack])
        _require_same((one.folder, other.folder), ours.labels.keys(), theirs.labels.keys())
        _require_same_classes((one.folder, other.folder), ours.labels, theirs.labels)
        yield (f"{attack}: " if attack else "") + ours.words(theirs)


def _by_attack(result: Result) -> dict[str, Result]:
    """Return the parts of a result of robustness by attack, of which "clean" is one; the whole result, with the key "",
    for other tasks."""
    if "condition" not in result.table:
        return {"": result}
    return {attack: part for (attack,), part in result.parts("condition").items()}


def _compare_scores(one: Result, other: Result) -> Iterator[str]:
    """Yield a sentence about the mAP of the scores of two results on lists of labels."""
    (one, _), (other, _) = _main_part(one), _main_part(other)
    other = one.matched(other, "key")
    truth_MC, others_MC = (np.array(each.table["truth"]) for each in (one, other))
    if not np.array_equal(truth_MC, others_MC):
        raise UserError(
            f"{one.folder} and {other.folder}: the samples have different lists of labels; choose results with the "
            "same --labels and --train"
        )
    found = [resampled(truth_MC, np.array(each.table["scores"]), one.hashes) for each in (one, other)]
    yield _metrics_apart("mAP", (one, other), *found)


def _compare_segmentations(one: Result, other: Result) -> Iterator[str]:
    """Yield a sentence about the mIoU of two segmentations."""
    other = one.matched(other, "key")
    ours, theirs = segment.Counts.read([each.table for each in (one, other)])
    if not np.array_equal(ours.truth_MC, theirs.truth_MC):
        raise UserError(
            f"{one.folder} and {other.folder}: the masks differ; choose results with the same masks, the same "
            "segment.ignore_label, and models of the same image size"
        )
    found = segment.resampled({"one": ours, "other": theirs}, 0, one.hashes)
    yield _metrics_apart("mIoU", (one, other), found["one"], found["other"])


def _metrics_apart(metric: str, results: tuple[Result, Result], ours: Resampled, theirs: Resampled) -> str:
    """Return a sentence that states whether the values of a metric in two results differ significantly."""
    first, second = (str(each.folder) for each in results)
    if apart := resampled_difference(ours, theirs):
        return f"{metric}: {apart.words(first, second)}"
    same = verdict(first, second, 0.0, is_significant=False)
    return f"{metric}: {same}: no interval can be estimated; use more --val samples"


def _compare_areas(one: Result, other: Result) -> Iterator[str]:
    """Yield a sentence for each set of out-of-distribution samples and each score; see `areas_apart`."""
    require_libraries({"sklearn": "the comparison of results of ood"})
    sets = [
        {name: part for (name,), part in each.parts("set").items()} for each in (one, one.matched(other, "set", "key"))
    ]
    for name in (name for name in sets[0] if name != VAL):
        clusters = [image_clusters(sets[0][part].hashes) for part in (VAL, name)]
        for score in SCORES:
            ours, theirs = ([np.array(own[part].table[score]) for part in (VAL, name)] for own in sets)
            yield f"{name}, {score}: {areas_apart(ours, theirs, str(one.folder), str(other.folder), clusters)}"


class _Metric(NamedTuple):
    """A metric by which results are compared."""

    columns: tuple[str, ...]  # a table that has these columns belongs to this metric
    compare: Callable[[Result, Result], Iterator[str]]


_ACCURACY = "accuracy"
_METRICS = {
    "AUROC": _Metric(("set", "key", *SCORES), _compare_areas),
    "mAP": _Metric(("key", "truth", "scores"), _compare_scores),
    "mIoU": _Metric(("key", *segment.BY_CLASS), _compare_segmentations),
    _ACCURACY: _Metric(_COLUMNS, _compare_accuracies),
}


def verdicts(folder: Path, result: Mapping[str, Any], name: str, others: Mapping[str, Path]) -> list[str]:
    """Return sentences that state whether the model `name` differs significantly from its baselines, from other models
    and from always predicting the largest class.

    Args:
        folder: folder of the model's result.
        result: content of its result.json.
        name: name of the model for display.
        others: folders of the results of other models on the same samples, by name of the model. A model that is a
            baseline in `result` is left out.

    If predictions are missing or belong to different samples, the verdict in `result`, if there is one, replaces the
    sentences about the other models and the largest class.
    """
    found, is_complete = all_differences(folder, result, name, others)
    sentences = [each.words(name, other) for other, each in found.items()]
    return sentences + [str(result[key]) for key in ("verdict",) if key in result and not is_complete]


def all_differences(
    folder: Path, result: Mapping[str, Any], name: str, others: Mapping[str, Path]
) -> tuple[dict[str, Difference], bool]:
    """Return two results: the differences of the model `name` from its baselines, from other models and from always
    predicting the largest class, by name; and whether they are complete. If predictions are missing or belong to
    different samples, only the differences from the baselines are returned. See `verdicts` for the arguments."""
    baselines = result.get(BASELINES, {})
    own = {baseline_name(other, baselines[other]): each for other, each in differences(result).items()}
    try:
        others = {other: path for other, path in others.items() if other not in own}
        return own | _apart(folder, name, others), True
    except UserError:
        return own, False


def in_words(folder: Path, name: str, others: Mapping[str, Path]) -> list[str]:
    """Return one sentence for each of the differences that `_apart` returns."""
    return [each.words(name, other) for other, each in _apart(folder, name, others).items()]


def _apart(folder: Path, name: str, others: Mapping[str, Path]) -> dict[str, Difference]:
    """Return the differences between the accuracy of the model `name` and several other accuracies on the same samples:
    those of the other models, and that of always predicting the largest class of these samples. `others`: folders of
    the other results by name of the model. Raises UserError as `compare_results` does."""
    ours = _classified(Result(folder, read_parquet(folder / FILE)), name)
    compared = [_classified(Result(path, read_parquet(path / FILE)), other) for other, path in others.items()]
    for theirs in compared:
        _require_same((name, theirs.name), ours.labels.keys(), theirs.labels.keys())
    largest = _largest(ours.labels.values())
    always = {key: float(label == largest) for key, label in ours.labels.items()}
    return {theirs.name: ours.minus(theirs) for theirs in (*compared, ours._replace(name=LARGEST, right=always))}


def against_largest_class(folder: Path, result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of result.json that compare the accuracy of a classification task with always predicting the
    largest class; empty for other tasks. `result`: the other entries.

    - "chance": the share of the largest class among the held-out samples;
    - "chance_top5", if there are more than five classes: the share of the five largest classes;
    - "verdict", if there is one prediction per sample: a sentence that states whether the accuracy is significantly
    better than "chance";
    - WARNINGS, a list of one warning, if the accuracy is not significantly better than a baseline in `result` or, if
    there is one prediction per sample, than "chance".
    """
    if not (folder / FILE).exists():
        return {}
    table = read_parquet(folder / FILE)
    if not table.keys() >= {*_COLUMNS} or None in table["label"]:
        return {}
    labels = dict(zip(table["key"], table["label"]))
    found: dict[str, Any] = {"chance": largest_share(labels.values())}
    if len({*labels.values()}) > 5:
        found["chance_top5"] = largest_share(labels.values(), 5)
    others, top1 = not_better(result, "top1"), result.get("top1", 0.0)
    if one_prediction_each(table):
        (found["verdict"],) = in_words(folder, MODEL, {})
        label_N, largest = np.array(table["label"]), _largest(table["label"])
        right_N = label_N == np.array(table["prediction"])
        top1 = float(right_N.mean())
        if not difference(right_N, label_N == largest, image_clusters(Result(folder, table).hashes)).is_better:
            others = {LARGEST: found["chance"]} | others
    if text := warning("top-1 accuracy", top1, others):
        found[WARNINGS] = [text]
    return found


def one_prediction_each(table: Table) -> bool:
    """Return whether a table has exactly one prediction for each sample."""
    return len({*table["key"]}) == len(table["key"])


class _Classified(NamedTuple):
    """Samples that a classifier has classified, by key."""

    name: str  # name of the classifier in sentences
    labels: dict[str, Any]
    # fraction of the probes that classify the sample correctly; each is trained on another draw of training samples
    right: dict[str, float]
    hashes: list[str]  # hash of the image of each sample; see `image_clusters`

    def words(self, other: _Classified) -> str:
        """Return a sentence that states whether the accuracies differ significantly. The samples are the same."""
        return self.minus(other).words(self.name, other.name)

    def minus(self, other: _Classified) -> Difference:
        """Return the difference between the accuracies on the same samples."""
        first_N, second_N = (np.array([each.right[key] for key in self.right]) for each in (self, other))
        return difference(first_N, second_N, image_clusters(self.hashes))


def _classified(result: Result, name: str = "") -> _Classified:
    """Compare the predictions of a result with the labels, and return which samples are classified correctly. If there
    are several layers, poolings or numbers of training samples, the main ones are used. `name`: name of the classifier;
    "": its name is the folder, followed by the main layer, pooling and number of training samples if there are several.
    Raises UserError if the table does not have exactly one prediction for each sample and draw."""
    folder = result.folder
    result, case = _main_part(result)
    draws = [*result.parts("draw").values()] if "draw" in result.table else [result]
    keys = [each.table["key"] for each in draws if each.table.keys() >= {*_COLUMNS}]
    complete = keys and not any(None in result.table[column] for column in _COLUMNS)
    if not complete or any(own != keys[0] for own in keys) or not one_prediction_each(draws[0].table):
        raise UserError(
            f"{folder}: does not contain exactly one class prediction per sample; specify the folders of knn, "
            "logistic, linear, attentive, finetune, segment, robustness or ood results"
        )
    right_DN = np.array([np.array(each.table["label"]) == np.array(each.table["prediction"]) for each in draws])
    labels = dict(zip(keys[0], draws[0].table["label"]))
    right = dict(zip(keys[0], right_DN.mean(0).tolist()))
    return _Classified(name or f"{folder}{case}", labels, right, draws[0].hashes)


def _main_part(result: Result) -> tuple[Result, str]:
    """Return the rows of the main layer, pooling and number of training samples, and a description of these if there
    are several."""
    if not result.table.keys() >= {*Case._fields}:
        return result, ""
    parts = {Case(*values): part for values, part in result.parts(*Case._fields).items()}
    chosen = main_case([*parts])
    return parts[chosen], f" ({chosen.name(pools=True)})" if len(parts) > 1 else ""


def _largest(labels: Iterable[Any]) -> Any:
    ((largest, _),) = Counter(labels).most_common(1)
    return largest


def _require_same(folders: Sequence[Any], first: Any, second: Any) -> None:
    if first != second:
        raise UserError(
            f"{folders[0]} and {folders[1]}: are of different samples ({counted(len(first ^ second), 'sample')} in "
            "only one of the two); choose two results with the same --val, whose paths must be spelled in the same way"
        )


def _require_same_classes(folders: Sequence[Path], labels: Mapping[str, Any], others: Mapping[str, Any]) -> None:
    """Raise UserError if the labels of the same samples differ in more than the names of the classes."""
    pairs = {(label, others[key]) for key, label in labels.items()}
    if len(pairs) > min(len({*labels.values()}), len({*others.values()})):
        raise UserError(
            f"{folders[0]} and {folders[1]}: the samples have different classes; choose results with the same --labels"
        )


def areas_apart(
    first: Sequence[np.ndarray],
    second: Sequence[np.ndarray],
    name: str,
    other: str,
    clusters: Sequence[np.ndarray] = (),
) -> str:
    """Return a sentence that states whether the areas under the ROC curves of two models' scores differ significantly
    (paired bootstrap over images).

    Args:
        first, second: scores of the same in-distribution and out-of-distribution samples, [N] and [M], in the same
            order.
        name, other: names of the models.
        clusters: see `bootstrap_areas`.
    """
    apart = auroc_and_fpr(*first)[0] - auroc_and_fpr(*second)[0]
    ours_B, theirs_B = (bootstrap_areas(inside, outside, 0, clusters) for inside, outside in (first, second))
    low, high = middle(ours_B - theirs_B)
    # bootstrap samples of a single image do not vary
    known = all(ids.any() for ids in clusters or map(np.arange, map(len, first)))
    words = verdict(name, other, apart, known and not low <= 0 <= high)
    return f"{words}: AUROC {apart:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}"
