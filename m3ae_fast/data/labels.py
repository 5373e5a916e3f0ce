"""Labels of samples: reading them from shards, validation, and conversion to class ids.

A label is an integer in a sample's `.cls` member, or an integer or text in a field of its `.json` member; -1 excludes
the sample. The labels of the training samples are the classes. They are numbered in sorted order.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from m3ae_fast.base.errors import UserError
from m3ae_fast.base.progress import track
from m3ae_fast.base.untrusted_file import read_json
from m3ae_fast.data.corpus import Corpus, Source
from m3ae_fast.data.index import MISSING, IndexedShard, printable
from m3ae_fast.data.reader import Reader
from m3ae_fast.data.shard_store import ShardStore

T = TypeVar("T")
MAX_CLASSES = 1 << 20
LEFT_OUT = -1
_MAX_BYTES = 1 << 20  # maximum number of bytes that are read from a member with a label
_SHOWN = 10  # maximum number of fields in a message

_INT64 = np.iinfo(np.int64)

Label = int | str
Classes = Sequence[Label]  # the label of each class, by id


@dataclass(frozen=True, eq=False)
class _Part(IndexedShard):
    """A subset of the samples of a shard."""

    whole: IndexedShard
    rows: np.ndarray  # int64

    def table(self) -> np.ndarray:
        return self.whole.table()[self.rows]

    def reindexed(self, store: ShardStore) -> IndexedShard:
        return replace(self, whole=self.whole.reindexed(store))


def check_field(field: str) -> None:
    """Raise UserError if `field` is neither "cls" nor "json.NAME"."""
    if field != "cls" and not (field.startswith("json.") and len(field) > len("json.")):
        raise UserError(f"labels {field!r}: must be cls, or json.FIELD such as json.label")


def read_labels(corpus: Corpus, field: str, *, progress: bool = False) -> list[list[Label | None]]:
    """Return the labels of all samples of each source in file order; None for a sample without a label. `field`: "cls"
    or "json.NAME". Raises UserError if `field` is invalid, a shard cannot be read, or a label is neither an integer nor
    text."""
    check_field(field)
    return read_members(corpus, field, _parse, progress=progress)


def read_members(
    corpus: Corpus, field: str, parse: Callable[[bytes, str, str], T], *, progress: bool = False
) -> list[list[T | None]]:
    """Return the parsed .cls or .json member of each sample of each source, in file order; None for a sample without
    this member. `field`: "cls" for .cls members, "json.NAME" for .json members. `parse`: function that is called with
    the bytes of a member, `field`, and the sample's name for messages. Raises UserError if a shard cannot be read, or
    if `parse` raises UserError."""
    shards = [(number, shard) for number, source in enumerate(corpus.sources) for shard in source.shards]
    found: list[list[T | None]] = [[] for _ in corpus.sources]
    for number, shard in track(shards, "reading labels", len(shards), show=progress):
        found[number] += _read_shard(shard, corpus.store, field, parse)
    return found


def label_corpus(
    corpus: Corpus, field: str, classes: Classes | None = None, *, progress: bool = False
) -> tuple[Corpus, Classes]:
    """Return the dataset without the samples whose label is -1, and the classes by id. `Source.labels` of the returned
    dataset contains class ids.

    `field`: as in `read_labels`. `classes`: classes of the training samples; None: the samples are training samples and
    define the classes.

    Raises:
        UserError: a sample has no label, all labels are -1, a label is out of range or not among `classes`, numbers and
            texts are mixed, or there is only one class; also as in `read_labels`.
    """
    sources = [replace(source, shards=[shard.located() for shard in source.shards]) for source in corpus.sources]
    # the shards of a manifest are indexed first, because labels are read from each of them
    corpus = replace(corpus, sources=sources)
    where = f"shards {corpus.sources[0].shards[0].shard}" + (" ..." if len(corpus.sources[0].shards) > 1 else "")
    labels = read_labels(corpus, field, progress=progress)
    _refuse_missing(corpus, labels, where, field)
    used = {label for source in labels for label in source if label is not None} - {LEFT_OUT}
    if not used:
        raise UserError(f"{where}: no sample has a label ({field}) other than -1")
    if classes is None:
        classes = _define_classes(used, where, field)
    ids = {label: number for number, label in enumerate(classes)} | {LEFT_OUT: LEFT_OUT}
    for label in used:
        if label not in ids:
            raise UserError(
                f"{where}: no training sample has the label {label!r} ({field}); add training samples of this class, "
                "or change the label to -1 to exclude these samples"
            )
    sources = [
        select_labelled(source, np.array([ids[label] for label in own], dtype=np.int64))  # type: ignore[index]
        for source, own in zip(corpus.sources, labels)
    ]
    return replace(corpus, sources=[source for source in sources if source.shards]), classes


def class_names(corpus: Corpus, classes: Classes) -> list[str]:
    """Return the names of the classes of a labelled dataset, by id, for use in figures. A text label is its own name.
    The names of integer labels are taken from the file classes.json next to the shards, or from `class_name` in the
    samples' json if no class has several names. A label without a name is shown as its integer."""
    if any(isinstance(label, str) for label in classes):
        return [str(label) for label in classes]
    names = _listed_names(corpus) or _written_names(corpus, classes)
    return [names.get(int(label), str(label)) for label in classes]


def _listed_names(corpus: Corpus) -> dict[int, str]:
    """Return the names in classes.json next to the first shard, by label; empty if there is no such file."""
    try:
        found = read_json(Path(corpus.sources[0].shards[0].shard).parent / "classes.json")
    except (OSError, ValueError):
        return {}
    return dict(enumerate(map(str, found))) if isinstance(found, list) else {}


def _written_names(corpus: Corpus, classes: Classes) -> dict[int, str]:
    """Return the `class_name` in the samples' json, by label; empty if the samples of one label have different
    names."""
    try:
        written = read_labels(corpus, "json.class_name")
    except UserError:  # raised if a name is neither an integer nor text, or if a shard cannot be read
        return {}
    names: dict[int, str] = {}
    for source, own in zip(corpus.sources, written):
        assert source.labels is not None
        for number, name in zip(source.labels.tolist(), own):
            if name is not None and names.setdefault(int(classes[number]), str(name)) != str(name):
                return {}
    return names


def _refuse_missing(corpus: Corpus, labels: list[list[Label | None]], where: str, field: str) -> None:
    missing = sum(label is None for own in labels for label in own)
    if not missing:
        return
    total = sum(len(own) for own in labels)
    source, sample = next((one, own.index(None)) for one, own in zip(corpus.sources, labels) if None in own)
    reader = Reader(source, corpus.store)
    shard, row = reader.find(sample)
    others = _fields(source.shards[shard], row, corpus.store)
    advice = (
        f"the samples have {', '.join(others)}: choose one with --labels, or "
        if others
        else "the samples have neither .cls nor .json (the files of a sample must be adjacent in the tar file): "
    )
    raise UserError(
        f"{where}: {missing:,} of {total:,} samples have no label ({field}), for example {source.shards[shard].shard}/"
        f"{reader.key(shard, row)}; {advice}label these samples (-1 excludes a sample)"
    )


def _fields(shard: IndexedShard, row: int, store: ShardStore) -> list[str]:
    """Return the first few fields of a sample that may be labels, in the notation of `read_labels`."""
    entry = shard.table()[row]
    found = ["cls"] if entry["cls_offset"] != MISSING else []
    if entry["json_offset"] != MISSING:
        with open(store.path(shard.shard), "rb") as file:
            data = os.pread(file.fileno(), min(int(entry["json_size"]), _MAX_BYTES), int(entry["json_offset"]))
        try:
            content = json.loads(data)
        except (ValueError, RecursionError):
            content = None
        if isinstance(content, dict):
            kept = (name for name, value in content.items() if isinstance(value, int | str))
            found += [f"json.{printable(name)}" for name in kept if name != "caption"]
    more = [f"{len(found) - _SHOWN:,} more"] if len(found) > _SHOWN else []
    return found[:_SHOWN] + more


def _define_classes(used: set[Label], where: str, field: str) -> Classes:
    names = sorted(label for label in used if isinstance(label, str))
    if names and len(names) < len(used):
        raise UserError(
            f"{where}: some labels ({field}) are integers and some are text, such as {names[0]!r}; "
            "use only one of the two"
        )
    if len(used) == 1:
        raise UserError(
            f"{where}: all samples have the label {next(iter(used))!r} ({field}); at least two classes are required"
        )
    if names:
        return names
    numbers = sorted(label for label in used if isinstance(label, int))
    low, high = numbers[0], numbers[-1]
    if low < 0 or high >= MAX_CLASSES:
        raise UserError(
            f"{where}: the label {low if low < 0 else high} ({field}) is out of range; class ids must be from 0 to "
            f"{MAX_CLASSES - 1}, or -1 to exclude a sample"
        )
    return numbers


def select_labelled(source: Source, ids: np.ndarray) -> Source:
    """Return the source without the samples whose id is LEFT_OUT. The ids become the labels of the remaining samples.

    `ids`: int64, one for each sample in file order.
    """
    shards: list[IndexedShard] = []
    modalities, start = [], 0
    for shard, modality in zip(source.shards, source.modalities):
        rows = np.flatnonzero(ids[start : start + shard.summary.samples] != LEFT_OUT)
        start += shard.summary.samples
        if len(rows):
            summary = replace(shard.summary, samples=len(rows))
            shards.append(_Part(shard.shard, summary, shard.sidecar, shard, rows))
            modalities.append(modality)
    return replace(source, shards=shards, modalities=modalities, labels=ids[ids != LEFT_OUT])


def _read_shard(
    shard: IndexedShard, store: ShardStore, field: str, parse: Callable[[bytes, str, str], T]
) -> list[T | None]:
    member = "cls" if field == "cls" else "json"
    labels: list[T | None] = []
    try:
        table = shard.table()
        with open(store.path(shard.shard), "rb") as file:
            for offset, size, key in zip(*(table[name] for name in (f"{member}_offset", f"{member}_size", "key"))):
                if offset == MISSING:
                    labels.append(None)
                    continue
                data = os.pread(file.fileno(), min(int(size), _MAX_BYTES), int(offset))
                labels.append(parse(data, field, f"{shard.shard}/{key.decode('utf-8', 'replace')}"))
    except OSError as error:
        raise UserError(f"shard {shard.shard}: cannot be read ({error.strerror or error})") from None
    return labels


def _parse(data: bytes, field: str, where: str) -> Label | None:
    if field == "cls":
        text = data.decode("utf-8", "replace").strip()
        if not re.fullmatch(r"-?[0-9]{1,18}", text):
            raise UserError(f"{where}: its cls member must be an integer of at most 18 digits, but is {text[:40]!r}")
        return int(text)
    value = json_field(data, field, where)
    if isinstance(value, list):
        raise UserError(
            f"{where}: {field} is a list; lists of labels are supported only by evaluate knn, logistic and attentive"
        )
    return parse_label(value, field, where)


def json_field(data: bytes, field: str, where: str) -> Any:
    """Return the value of a field of a .json member; None if there is no such field. `field`: "json.NAME"; `where`:
    name of the sample, for messages. Raises UserError if the member is not valid JSON."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        raise UserError(f"{where}: its json is not valid JSON") from None
    return content.get(field.removeprefix("json.")) if isinstance(content, dict) else None


def parse_label(value: Any, field: str, where: str) -> Label | None:
    """Return the label in a JSON field; None if the value is null. Raises UserError if the value is neither a 64-bit
    integer nor text. `where`: name of the sample, for the message."""
    if isinstance(value, int) and not _INT64.min <= value <= _INT64.max:
        raise UserError(f"{where}: {field} is {str(value)[:40]}, which does not fit into a 64-bit integer")
    if value is None or (isinstance(value, int | str) and not isinstance(value, bool)):
        return value
    raise UserError(f"{where}: {field} must be an integer or text, but is {json.dumps(value)[:40]}")
