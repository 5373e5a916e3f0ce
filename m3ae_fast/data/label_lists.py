"""Lists of labels, for samples that belong to any number of classes.

A list is a field of a sample's `.json` member and contains integers or texts; it is empty if the sample belongs to no
class. Samples with the same list share an id, which is used as their label.

Shapes: L different lists, C classes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from m3ae_fast.base.errors import UserError
from m3ae_fast.data.corpus import Corpus
from m3ae_fast.data.labels import Classes, Label, json_field, parse_label, read_members, select_labelled

MOST_CLASSES = 1 << 14


def are_lists(corpus: Corpus, field: str) -> bool:
    """Return whether the first label in the first shard is a list. `field`: as in `read_labels`. Raises UserError if
    the shard cannot be read."""
    if not field.startswith("json."):
        return False
    first = replace(corpus.sources[0], shards=[corpus.sources[0].shards[0].located()])
    (found,) = read_members(replace(corpus, sources=[first]), field, json_field)
    return isinstance(next((value for value in found if value is not None), None), list)


def list_corpus(
    corpus: Corpus, field: str, classes: Classes | None = None, *, progress: bool = False
) -> tuple[Corpus, Classes, int]:
    """Return the samples of a dataset with the ids of their lists as labels, the classes by id, and the number of
    different labels that are ignored because they are not classes.

    Args:
        corpus: the dataset.
        field: "json." and the name of a field.
        classes: classes of the training samples; other labels are ignored. None: `corpus` contains the training samples
            and defines the classes.
        progress: whether to show a progress bar.

    Raises:
        UserError: a sample has no list, a label is neither an integer nor text, numbers and texts are mixed, no sample
            has a label, no label is one of `classes`, there are more than MOST_CLASSES labels, or a shard cannot be
            read.
    """
    sources = [replace(source, shards=[shard.located() for shard in source.shards]) for source in corpus.sources]
    corpus = replace(corpus, sources=sources)
    where = f"shards {corpus.sources[0].shards[0].shard}" + (" ..." if len(corpus.sources[0].shards) > 1 else "")
    lists = read_members(corpus, field, _parse, progress=progress)
    if missing := sum(each is None for own in lists for each in own):
        total = sum(map(len, lists))
        raise UserError(
            f"{where}: {missing:,} of {total:,} samples have no list of labels ({field}); an empty list means that a "
            "sample has none of the classes"
        )
    used = {label for own in lists for each in own for label in each or ()}
    if classes is None:
        classes = _define_classes(used, where, field)
    ids = {label: number for number, label in enumerate(classes)}
    if not used & ids.keys():
        raise UserError(f"{where}: no list ({field}) contains a label that occurs in the training samples")
    numbers: dict[tuple[Label, ...], int] = {}
    found = [np.array([numbers.setdefault(each or (), len(numbers)) for each in own], dtype=np.int64) for own in lists]
    lists_LC = np.zeros((len(numbers), len(classes)), dtype=bool)
    for each, number in numbers.items():
        lists_LC[number, [ids[label] for label in each if label in ids]] = True
    sources = [select_labelled(source, own) for source, own in zip(corpus.sources, found)]
    return replace(corpus, sources=sources, lists=lists_LC), classes, len(used - ids.keys())


def _define_classes(used: set[Label], where: str, field: str) -> Classes:
    if not used:
        raise UserError(f"{where}: the lists of all samples ({field}) are empty; at least one must contain a label")
    if len({isinstance(label, str) for label in used}) > 1:
        raise UserError(f"{where}: some labels ({field}) are integers and some are text; use only one of the two")
    if len(used) > MOST_CLASSES:
        raise UserError(
            f"{where}: {len(used):,} different labels ({field}), but at most {MOST_CLASSES:,} are supported"
        )
    return sorted(used)  # type: ignore[type-var]


def _parse(data: bytes, field: str, where: str) -> tuple[Label, ...] | None:
    """Return the labels of a sample's list, sorted and without duplicates; None if the sample has no list. Raises
    UserError if the field is not a list of labels."""
    value = json_field(data, field, where)
    if value is None:
        return None
    if not isinstance(value, list):
        raise UserError(f"{where}: {field} is {json.dumps(value)[:40]}, not a list as in other samples")
    found: Sequence[Label | None] = [parse_label(each, field, where) for each in value]
    if None in found:
        raise UserError(f"{where}: the list {field} contains null, which is not a label")
    return tuple(sorted({label for label in found if label is not None}, key=lambda label: (str(type(label)), label)))
