"""Significance tests between results on the same samples: accuracies, or areas under ROC curves.

Shapes: N in-distribution samples, M out-of-distribution samples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from m3ae_fast.base.errors import UserError
from m3ae_fast.base.libraries import require_libraries
from m3ae_fast.base.parquet import read_parquet
from m3ae_fast.evaluation.baselines import (
    BASELINES,
    LARGEST,
    MODEL,
    baseline_name,
    differences,
    not_better,
    warning,
)
from m3ae_fast.evaluation.ood import SCORES, VAL, auroc_and_fpr, bootstrap_areas
from m3ae_fast.evaluation.predictions import FILE, IMAGE_HASH, largest_share
from m3ae_fast.evaluation.significance import difference, image_clusters, middle, verdict

Table = dict[str, list[Any]]
_COLUMNS = ("key", "label", "prediction")
_ADVICE = (
    "to compare results, specify the folders that two or more evaluations wrote, such as runs/knn; to compare models, "
    "add --train, --val and --out"
)


def compare_results(folders: Sequence[Path]) -> str:
    """Return lines that state, for each pair of results, which of them is better: one line for a pair of classifiers,
    one for each attack for results of robustness, and one for each set and score for results of ood. Raises UserError
    if there are fewer than two folders, a folder has no predictions of classes, or the results are not on the same
    samples."""
    if len(folders) < 2:
        raise UserError(f"{folders[0]}: cannot be compared alone; {_ADVICE}")
    if missing := next((folder for folder in folders if not (folder / FILE).is_file()), None):
        raise UserError(f"{missing}: has no {FILE}; {_ADVICE}")
    tables = [(folder, read_parquet(folder / FILE)) for folder in folders]
    return "\n".join(
        _compare((one, other), (first, second)) for (one, first), (other, second) in combinations(tables, 2)
    )


def _compare(folders: tuple[Path, Path], tables: tuple[Table, Table]) -> str:
    """Return the lines about two results."""
    if all({"set", "key", *SCORES} <= table.keys() for table in tables):
        require_libraries({"sklearn": "the comparison of results of ood"})
        return _compare_areas(folders, *tables)
    attacks, others = map(_by_attack, tables)
    if attacks.keys() != others.keys():
        names = ", ".join(sorted((attacks.keys() ^ others.keys()) - {""}))
        raise UserError(
            f"{folders[0]} and {folders[1]}: only one of them contains {names}; "
            "choose two results of the same task with the same settings"
        )
    lines = []
    for attack, first in attacks.items():
        second = others[attack]
        ours, theirs = (_correct(folder, table) for folder, table in zip(folders, (first, second)))
        _require_same(folders, ours.keys(), theirs.keys())
        _require_same_classes(folders, first, second)
        lines.append((f"{attack}: " if attack else "") + _words(ours, theirs, folders, _hashes(first)))
    return "\n".join(lines)


def _by_attack(table: Table) -> dict[str, Table]:
    """Return the parts of a result of robustness by attack; the whole table, with the key "", for other results."""
    rows: dict[str, list[int]] = {}
    for row, attack in enumerate(table.get("condition", ())):
        rows.setdefault(attack, []).append(row)
    return {
        attack: {name: [column[row] for row in own] for name, column in table.items()} for attack, own in rows.items()
    } or {"": table}


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
    baselines = result.get(BASELINES, {})
    own = {baseline_name(other, baselines[other]): each for other, each in differences(result).items()}
    sentences = [each.words(name, other) for other, each in own.items()]
    try:
        others = {other: path for other, path in others.items() if other not in own}
        return sentences + in_words(folder, name, others)
    except UserError:
        return sentences + [str(result[key]) for key in ("verdict",) if key in result]


def in_words(folder: Path, name: str, others: Mapping[str, Path]) -> list[str]:
    """Compare the result of the model `name` with the results of other models on the same samples, and with always
    predicting the largest class of these samples. Return one sentence for each comparison. `others`: folders of the
    other results by name of the model. Raises UserError as `compare_results` does."""
    table = read_parquet(folder / FILE)
    ours = _correct(folder, table)
    compared = {other: _correct(path, read_parquet(path / FILE)) for other, path in others.items()}
    labels = dict(zip(table["key"], table["label"]))
    largest = _largest(labels.values())
    compared[LARGEST] = {key: label == largest for key, label in labels.items()}
    return [_words(ours, theirs, (name, other), _hashes(table)) for other, theirs in compared.items()]


def against_largest_class(folder: Path, result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of result.json that compare the accuracy of a classification task with always predicting the
    largest class; empty for other tasks. `result`: the other entries.

    - "chance": the share of the largest class among the held-out samples;
    - "chance_top5", if there are more than five classes: the share of the five largest classes;
    - "verdict", if there is one prediction per sample: a sentence that states whether the accuracy is significantly
    better than "chance";
    - "warning", unless the accuracy is significantly better than each of the baselines in `result` and, if there is
    one prediction per sample, than "chance".
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
        if not difference(right_N, label_N == largest, image_clusters(_hashes(table))).is_better:
            others = {LARGEST: found["chance"]} | others
    if text := warning("top-1 accuracy", top1, others):
        found["warning"] = text
    return found


def one_prediction_each(table: Table) -> bool:
    """Return whether a table has exactly one prediction for each sample."""
    return len({*table["key"]}) == len(table["key"])


def _largest(labels: Iterable[Any]) -> Any:
    ((largest, _),) = Counter(labels).most_common(1)
    return largest


def _hashes(table: Table) -> list[str]:
    """Return the hashes of the samples' images; see `image_clusters`."""
    return table.get(IMAGE_HASH, [""] * len(table["key"]))


def _words(ours: dict[str, bool], theirs: dict[str, bool], names: Sequence[Any], hashes: Sequence[str]) -> str:
    """Return a sentence that states whether two results differ significantly. A result maps each sample's key to
    whether the sample was classified correctly. `hashes`: those of the samples in `ours`."""
    _require_same(names, ours.keys(), theirs.keys())
    first_N, second_N = (np.array([each[key] for key in ours]) for each in (ours, theirs))
    return difference(first_N, second_N, image_clusters(hashes)).words(str(names[0]), str(names[1]))


def _require_same(folders: Sequence[Any], first: Any, second: Any) -> None:
    if first != second:
        raise UserError(
            f"{folders[0]} and {folders[1]}: {len(first ^ second):,} samples are in only one of them; choose "
            "two results with the same --val, whose paths must be spelled in the same way"
        )


def _require_same_classes(folders: Sequence[Path], first: Table, second: Table) -> None:
    """Raise UserError if the labels of the same samples differ in more than the names of the classes."""
    labels, others = (dict(zip(table["key"], table["label"])) for table in (first, second))
    pairs = {(label, others[key]) for key, label in labels.items()}
    if len(pairs) > min(len({*labels.values()}), len({*others.values()})):
        raise UserError(
            f"{folders[0]} and {folders[1]}: the samples have different classes; choose results with the same --labels"
        )


def _compare_areas(folders: Sequence[Path], first: Table, second: Table) -> str:
    """Return a sentence for each set of out-of-distribution samples and each score; see `areas_apart`."""
    samples, others = (list(zip(table["set"], table["key"])) for table in (first, second))
    _require_same(folders, {*samples}, {*others})
    place = {sample: row for row, sample in enumerate(others)}
    rows_N = np.array([place[sample] for sample in samples])  # rows of the second table in the order of the first
    sets_N, lines = np.array(first["set"]), []
    for name in dict.fromkeys(first["set"]):
        for score in SCORES if name != VAL else ():
            ours_N, theirs_N = np.array(first[score]), np.array(second[score])[rows_N]
            ours, theirs = ([scores_N[sets_N == part] for part in (VAL, name)] for scores_N in (ours_N, theirs_N))
            lines.append(f"{name}, {score}: {areas_apart(ours, theirs, str(folders[0]), str(folders[1]))}")
    return "\n".join(lines)


def areas_apart(first: Sequence[np.ndarray], second: Sequence[np.ndarray], name: str, other: str) -> str:
    """Return a sentence that states whether the areas under the ROC curves of two models' scores differ significantly
    (paired bootstrap over samples). `first`, `second`: scores of the same in-distribution and out-of-distribution
    samples, [N] and [M], in the same order. `name`, `other`: names of the models."""
    apart = auroc_and_fpr(*first)[0] - auroc_and_fpr(*second)[0]
    low, high = middle(bootstrap_areas(first[0], first[1], 0) - bootstrap_areas(second[0], second[1], 0))
    known = min(map(len, first)) > 1  # bootstrap samples of a single sample do not vary
    words = verdict(name, other, apart, known and not low <= 0 <= high)
    return f"{words}: AUROC {apart:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}"


def _correct(folder: Path, table: Table) -> dict[str, bool]:
    """Return whether each sample was classified correctly, by key. Raises UserError unless the table has exactly one
    prediction for each sample."""
    complete = table.keys() >= {*_COLUMNS} and not any(None in table[name] for name in _COLUMNS)
    if not complete or not one_prediction_each(table):
        raise UserError(
            f"{folder}: does not contain exactly one class prediction per sample; specify the folders of knn, "
            "logistic, linear, finetune or attentive results at one layer, or of two robustness or ood results"
        )
    return {
        key: label == prediction for key, label, prediction in zip(table["key"], table["label"], table["prediction"])
    }
