"""Writing of shards from records: parallel, resumable and deterministic (equal input gives equal bytes).

OUT contains `SPLIT-00000.tar`, ... with their indexes, `conversion.json`, which describes their source, and
`classes.json` if labels have names.
"""

from __future__ import annotations

import filecmp
import json
import multiprocessing
import os
import signal
import tarfile
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor
from concurrent.futures import wait as wait_for
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field

from m3ae_fast.base import forking  # noqa: F401  # imported for its effect on the writing processes
from m3ae_fast.base.atomic_file import put_in_place
from m3ae_fast.base.bad_samples import BadSample
from m3ae_fast.base.errors import UserError
from m3ae_fast.base.progress import progress
from m3ae_fast.base.wording import counted
from m3ae_fast.data.index import index_shards
from m3ae_fast.data.order import permutation
from m3ae_fast.data.shard_names import INDEX_SUFFIX
from m3ae_fast.data.shard_store import ShardStore
from m3ae_fast.shards.duplicate_images import join
from m3ae_fast.shards.held_out import split_images, without_whole_classes
from m3ae_fast.shards.options import ShardOptions
from m3ae_fast.shards.output_claim import CLASSES, MANIFEST, claimed
from m3ae_fast.shards.problem_counts import REDUCED, REFUSED, Tally
from m3ae_fast.shards.shrink import as_member, is_deep
from m3ae_fast.shards.sources.folder_layout import HELD_OUT, TRAIN, VAL
from m3ae_fast.shards.sources.interface import Record, Records
from m3ae_fast.shards.tar_member import add_member

_TICK_S = 1.0  # seconds between updates of the number of samples written by the workers


class Settings(ShardOptions):
    """Settings for the creation of shards: the options of the user, and others."""

    quality: Annotated[int, Field(ge=1, le=100)] = 95
    """JPEG quality"""
    of_run: bool = False
    """whether the shards are made by a run of `pretrain`, which may replace them"""
    labels: str | None = None
    """field "json.NAME" with the classes that the run evaluates; None: the classes of the source"""


@dataclass(frozen=True)
class Shard:
    """A shard that is to be written."""

    name: str
    split: str  # split of the records
    numbers: np.ndarray  # int64: numbers of the samples in the split, in the order in which they are written


@dataclass(frozen=True)
class Converted:
    """Counts of a conversion's result. `tally` covers only shards that this call has written, and not shards of
    earlier, interrupted calls."""

    shards: list[Path]
    samples: int
    images: int
    captions: int
    left_out: int  # number of samples that cannot be used
    tally: Tally
    notes: Sequence[str] = ()  # notes for the user about duplicate images and the held-out samples


def convert(records: Records, out: Path, settings: Settings, workers: int) -> Converted:
    """Write the shards of `records` that are missing in `out`, with their indexes, and return counts of the result.
    Raises UserError if the held-out fraction does not fit the samples, if `out` contains other files or cannot be
    written, if no sample of a split is valid, or if a worker process is killed."""
    plan, notes = _plan(records, settings)
    manifest = manifest_of(records, settings)
    created = not out.exists()
    with claimed(out, manifest, records.classes):
        for leftover in out.glob(".*.partial"):
            leftover.unlink()
        todo = [shard for shard in plan if not (out / shard.name).exists()]
        tally = _write_all(records, out, settings, todo, workers)
        shards = [out / shard.name for shard in plan]
        found = [entry.summary for entry in index_shards([str(path) for path in shards], ShardStore())]
        samples = Counter[str]()
        for shard, summary in zip(plan, found):
            samples[shard.name.rpartition("-")[0]] += summary.samples
        if (empty := [split for split, count in samples.items() if not count]) or not samples:
            for name in (MANIFEST, CLASSES, *(path.name + suffix for path in shards for suffix in ("", INDEX_SUFFIX))):
                (out / name).unlink(missing_ok=True)
            if created:
                out.rmdir()
            example = "".join(f"; the first error is: {sample}" for sample in tally.examples.get(REFUSED, ())[:1])
            of = f" of {empty[0]}" if len(empty) < len(samples) else ""
            raise UserError(f"{out}: not written, because no sample{of} can be used{example}")
    images, captions = (sum(getattr(summary, name) for summary in found) for name in ("images", "captions"))
    left_out = sum(len(shard.numbers) for shard in plan) - samples.total()
    return Converted(shards, samples.total(), images, captions, left_out, tally, notes)


def are_reproduced(records: Records, out: Path, settings: Settings) -> bool:
    """Return whether `convert` would write exactly the shards that are in `out`. To find out, each shard is written to
    a temporary folder in `out`, compared with the existing one, and removed. Raises UserError if it cannot be written
    or read."""
    plan, _ = _plan(records, settings)
    if {shard.name for shard in plan} != {path.name for path in out.glob("*.tar")}:
        return False
    try:
        with (
            tempfile.TemporaryDirectory(dir=out, prefix=".again-") as folder,
            progress("comparing shards", sum(len(shard.numbers) for shard in plan)) as advance,
        ):
            for shard in plan:
                _write(records, Path(folder), settings, shard, advance)
                again = Path(folder) / shard.name
                if not filecmp.cmp(again, out / shard.name, shallow=False):
                    return False
                again.unlink()
    except OSError as error:
        raise UserError(f"{error.filename or out}: cannot be compared ({error.strerror or error})") from None
    return True


def manifest_of(records: Records, settings: Settings) -> dict[str, Any]:
    """Return the description of the shards' source, as in conversion.json."""
    return {"source": records.identity, "settings": settings.model_dump(mode="json")}


def _plan(records: Records, settings: Settings) -> tuple[list[Shard], list[str]]:
    """Return the shards with the numbers of their samples, and `Converted.notes`."""
    notes: list[str] = []
    # name of the shards' split, split of the records, numbers of the samples
    parts: list[tuple[str, str, np.ndarray]] = []
    for split, samples in records.splits.items():
        order = np.arange(samples) if settings.keep_order else permutation(samples, 0)
        parts.append((split, split, order))
    if settings.held_out:
        if len(parts) > 1:
            raise UserError(
                f"--held-out: the input is already split ({', '.join(records.splits)}); convert only one of these "
                "splits"
            )
        ((name, split, order),) = parts
        images = records.images(split)
        if found := records.rows(split) - len(np.unique(images)):
            notes.append(f"{found:,} of {records.rows(split):,} images are copies of another image")
        if settings.group is not None:
            images = join(images, _groups(records, split, settings.group))
        images = images[order]
        wanted = max(1, round(len(order) * settings.held_out))
        held = split_images(images, wanted)
        if classes := _classes(records, split, settings.labels):
            held = without_whole_classes(held, images, np.array(classes)[order])
        what = "image" if settings.group is None else f"image or {settings.group}"
        if abs(int(held.sum()) - wanted) > wanted / 2:
            notes.append(
                f"{held.sum():,} of {len(order):,} samples ({held.mean():.0%}) are held out instead of {wanted:,} "
                f"({wanted / len(order):.0%}), because samples with the same {what} are in the same split"
            )
        if held.all():
            if (images == images[0]).all():
                raise UserError(f"all {len(order)} samples have the same {what}, so none of them can be held out")
            raise UserError(f"--held-out {settings.held_out:g}: holds out all {len(order)} samples; lower it")
        parts = [(TRAIN if name in HELD_OUT else name, split, order[~held]), (VAL, split, order[held])]
    shards = []
    for name, split, order in parts:
        pieces = [order[i : i + settings.samples_per_shard] for i in range(0, len(order), settings.samples_per_shard)]
        shards += [Shard(f"{name}-{i:05d}.tar", split, numbers) for i, numbers in enumerate(pieces)]
    return shards, notes


def _classes(records: Records, split: str, field: str | None) -> list[str]:
    """Return the name of the class of each sample, "" for a sample without a class. The list is empty if the classes
    are unknown, or if the samples have lists of labels."""
    if field is None:
        return [name or "" for name in records.classes_of(split) or ()]
    try:
        values = records.values(split, field)
    except UserError:  # only the finished shards contain the field, such as the class_name of a Hugging Face dataset
        return []
    if any(isinstance(value, list) for value in values):
        return []
    return ["" if value is None else str(value) for value in values]


def _groups(records: Records, split: str, field: str) -> np.ndarray:
    """Return group numbers, int64 [samples]: samples with equal values of a field have the same number. Raises
    UserError if a sample does not have the field."""
    seen: dict[str, int] = {}
    numbers = []
    values = records.values(split, field)
    if all(value is None for value in values) and (known := records.fields(split)):
        raise UserError(f"--group {field}: no sample has this field; choose from {', '.join(known)}")
    for number, value in enumerate(values):
        if value is None:
            raise UserError(f"--group {field}: the sample {records.name(split, number)} does not have this field")
        numbers.append(seen.setdefault(_group_name(value), len(seen)))
    return np.array(numbers, dtype=np.int64)


def _group_name(value: Any) -> str:
    """Return the text that identifies a group. Values that differ only in their type, such as 7, 7.0 and "7", or in
    surrounding spaces have the same text, because a table may write one value in several ways."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value.strip() if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def _write_all(records: Records, out: Path, settings: Settings, todo: list[Shard], workers: int) -> Tally:
    total = Tally()
    with progress("writing shards", sum(len(shard.numbers) for shard in todo)) as advance:
        if min(workers, len(todo)) <= 1:
            for shard in todo:
                total.merge(_write(records, out, settings, shard, advance))
            return total
        # forked, so that the records, which may list millions of files, need not be pickled
        context = multiprocessing.get_context("fork")
        # number of written samples of each shard; it has no lock, because a killed worker would keep the lock
        done = context.RawArray("q", len(todo))
        with ProcessPoolExecutor(min(workers, len(todo)), context, _begin, (records, out, settings, done)) as pool:
            try:
                with _no_interrupt():  # the workers are forked here
                    futures = [pool.submit(_write_in_worker, number, shard) for number, shard in enumerate(todo)]
                waiting, shown = set(futures), 0
                while waiting:
                    finished, waiting = wait_for(waiting, _TICK_S, FIRST_COMPLETED)
                    for future in finished:
                        future.result()
                    advance(sum(done) - shown)
                    shown = sum(done)
            except BrokenProcessPool:
                killed = "a worker was killed, perhaps for lack of memory"
                raise UserError(f"{killed}; repeat the command with fewer --workers") from None
            except BaseException:
                workers_left = multiprocessing.active_children()
                for process in workers_left:
                    process.terminate()
                for process in workers_left:  # the workers hold the folder's lock until they have ended
                    process.join()
                for shard in todo:
                    _partial(out, shard).unlink(missing_ok=True)
                raise
    for future in futures:  # in the order of the shards
        total.merge(future.result())
    return total


@contextmanager
def _no_interrupt() -> Iterator[None]:
    """Delay Ctrl-C during a fork: Python would print a KeyboardInterrupt raised in the middle of a fork and ignore
    it."""
    if threading.current_thread() is not threading.main_thread():  # Ctrl-C interrupts only the main thread
        yield
        return
    came: list[tuple[int, Any]] = []
    before = signal.signal(signal.SIGINT, lambda *which: came.append(which))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came and callable(before):
        before(*came[0])


_of_worker: tuple[Records, Path, Settings, Any]  # the last element is the number of written samples by shard


def _begin(*arguments: Any) -> None:
    global _of_worker
    _of_worker = arguments  # type: ignore[assignment]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process handles Ctrl-C
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Make this worker exit when the main process ends. Otherwise, it would wait for work forever if the main process
    were killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _write_in_worker(number: int, shard: Shard) -> Tally:
    """Write the shard with this number, and return the tally of its samples."""
    records, out, settings, done = _of_worker

    def advance(count: int) -> None:
        done[number] += count

    return _write(records, out, settings, shard, advance)


def _write(records: Records, out: Path, settings: Settings, shard: Shard, advance: Callable[[int], None]) -> Tally:
    """Write one shard atomically, and return the tally of its samples."""
    tally = Tally()
    partial = _partial(out, shard)
    try:
        with tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
            for number in shard.numbers.tolist():
                key = f"{number:09d}"
                name = records.name(shard.split, number)
                try:
                    record = records.read(shard.split, number)
                    files = _files(record, settings)
                    if record.image is not None and "jpg" in files and is_deep(record.image):
                        tally.add(REDUCED, name)
                    tally.add_caption(record.caption, name)
                except BadSample as error:
                    tally.add(REFUSED, f"{name}: {error}")
                    files = {}
                for suffix, data in files.items():
                    add_member(tar, f"{key}.{suffix}", data)
                advance(1)
        put_in_place(partial, out / shard.name)
    finally:
        partial.unlink(missing_ok=True)
    return tally


def _partial(out: Path, shard: Shard) -> Path:
    """Return the path of a shard until it is complete."""
    return out / f".{shard.name}.partial"


def _files(record: Record, settings: Settings) -> dict[str, bytes]:
    """Return the members of a sample by suffix. Raises BadSample if the record has neither image nor caption."""
    caption = (record.caption or "").strip()
    files = {}
    if record.image is not None:
        suffix, data = as_member(record.image, settings.short_side, settings.quality, settings.value_range)
        files[suffix] = data
    if caption:
        files["txt"] = caption.encode("utf-8", "replace")
    if not files:
        raise BadSample("the sample has neither image nor caption")
    about = dict(record.about)
    if record.label is not None:
        files["cls"] = str(record.label).encode()
        about.setdefault("label", record.label)  # a table may have another field with this name
    if about:
        files["json"] = json.dumps(about, sort_keys=True).encode()
    return files | record.members


def describe_conversion(out: Path, converted: Converted) -> str:
    """Return a description of the result for the user, with the lines for a config."""
    c = converted
    paired = c.images + c.captions - c.samples
    kinds = {"paired": paired, "image-only": c.images - paired, "text-only": c.captions - paired}
    listed = ", ".join(f"{count:,} {kind}" for kind, count in kinds.items() if count)
    shards = counted(len(c.shards), "shard")
    lines = [f"{out}: {counted(c.samples, 'sample')} in {shards} ({listed}), {c.captions:,} with a caption"]
    lines += [*c.notes, *c.tally.lines()]
    if earlier := c.left_out - c.tally.counts[REFUSED]:
        lines.append(f"{counted(earlier, 'sample')} left out before the conversion was interrupted")
    for split in dict.fromkeys(path.name.rpartition("-")[0] for path in c.shards):
        lines.append(f'  "{split}": [{{"shards": "{out / split}-*.tar"}}]')
    return "\n".join(lines)
