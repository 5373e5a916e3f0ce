"""The job that every task is given, and the writing of its result."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

from m3ae_fast.base.atomic_file import write_whole
from m3ae_fast.base.errors import UserError
from m3ae_fast.base.hardware import pins_memory
from m3ae_fast.base.parquet import write_parquet
from m3ae_fast.base.progress import TimeLeft, duration
from m3ae_fast.batch.packed import PackedBatch
from m3ae_fast.batch.packing import Sample
from m3ae_fast.config import SourceConfig
from m3ae_fast.config.evaluation import EvaluationConfig
from m3ae_fast.data import Corpus, Layout, Preparation, ShardStore, Share, open_corpus, samples_of, train_loader
from m3ae_fast.data.dataset import UNMASKED, Transform
from m3ae_fast.data.labels import Classes, class_names, label_corpus
from m3ae_fast.drawing.figures import BLACK, Cell, Colour, levels
from m3ae_fast.evaluation.encoding import Reduce, Watch, encode_corpus
from m3ae_fast.evaluation.feature_bank import FeatureBank
from m3ae_fast.evaluation.predictions import FILE as PREDICTIONS_FILE
from m3ae_fast.evaluation.significance import ERROR
from m3ae_fast.evaluation.tasks import TASKS, Modality, Options
from m3ae_fast.process.session import Session
from m3ae_fast.training.run_folder import RunFolder

RESULT_FILE, SO_FAR_FILE = "result.json", "result-so-far.json"

LONG_S, SHORT_S = 15 * 60, 10 * 60  # on a CPU: duration that is warned about, and duration that is proposed instead
STARTS_OVER = "the same command starts over"

Columns = Mapping[str, Sequence[Any]]


class SoFar(NamedTuple):
    """What a task has found before its end."""

    done: str  # of what it does
    result: dict[str, Any]  # what result.json would hold of it; empty if nothing was found
    columns: Columns  # of predictions.parquet; empty if that is not to be written
    page: str = ""  # for people


@dataclass
class Job:
    """One task on one model."""

    options: Options
    modality: Modality  # modalities of a sample that the encoder sees
    config: EvaluationConfig
    session: Session
    folder: RunFolder | None  # OUT, on the main rank only
    model: Any  # M3AE, or the Classifier where the task is about one; on the ranks' device
    classes: Classes = ()  # by id, and what pictures call them; see `open_labelled`
    names: list[str] = field(default_factory=list)
    pictures: list[Callable[[], None]] = field(default_factory=list)  # drawn once the result is written

    def __post_init__(self) -> None:
        self.ranks, self.stop, self.pulse, _ = self.session

    @property
    def out(self) -> Path:
        return self.config.run.dir

    def open(self, sources: Sequence[SourceConfig]) -> Corpus:
        """Open the samples of the sources, labelled or not. Raises UserError as `open_corpus` does."""
        store = ShardStore(self.config.data.cache_dir, self.config.data.cache_gb)
        corpus = self.ranks.main_first(lambda: open_corpus(sources, store, progress=self.ranks.is_main))
        for damaged in corpus.damaged:
            self.say(str(damaged))
        if corpus.ignored:
            self.say(f"members of the shards that nothing reads: {corpus.ignored}")
        return corpus

    def open_labelled(self) -> tuple[Corpus, Corpus, Classes]:
        """Return training and validation samples that have a class, and the classes by id; `classes` and `names` then
        have those and what to call them. Raises UserError as `open_corpus` and `label_corpus` do."""
        field, progress = self.options.labels, self.ranks.is_main
        train, val = self.open(self.config.data.train), self.open(self.config.data.val)
        classes: Classes | None = None
        labelled = []
        for corpus in (train, val):
            found, classes = label_corpus(corpus, field, classes, progress=progress)
            labelled.append(found)
            self.say(f"{found.samples:,} of {corpus.samples:,} samples have one of {len(classes)} classes")
        assert classes is not None
        if shared := val.shared_with(train):
            parts = f"{len(shared):,} of its shards {'is' if len(shared) == 1 else 'are'}"
            self.say(
                f"note: --val: {parts} in --train too, such as {shared[0]}: accuracies are therefore not on "
                "unseen samples"
            )
        self.classes, self.names = classes, class_names(labelled[0], classes)
        return labelled[0], labelled[1], classes

    def encode(
        self,
        corpus: Corpus,
        title: str,
        whole: TimeLeft | None = None,
        part: float = 0.0,
        *,
        layers: Sequence[int] | None = None,
        patches: bool = False,
        reduce: Reduce | None = None,
    ) -> FeatureBank:
        """Return pooled features of all samples; `layers`, `patches` and `reduce` as in `encode_corpus`, `whole` and
        `part` as in `Watch`."""
        watch, config = Watch(title, self.pulse, whole=whole, part=part), self.config
        return encode_corpus(
            self.model,
            corpus,
            config.data,
            config.encode,
            self.ranks,
            watch,
            layers=layers,
            patches=patches,
            reduce=reduce,
            folder=self.out,
        )

    def encoder(self, passes: float) -> Callable[..., FeatureBank]:
        """Return an `encode` that reports the progress over `passes` sample-passes of all datasets, and the time
        left."""
        time_left = TimeLeft(passes)

        def encode(corpus: Corpus, title: str, cost: float = 1.0) -> FeatureBank:
            part = cost * corpus.samples
            found = self.encode(corpus, title, time_left, part)
            left = time_left.after(part)
            self.say(f"{title}: {len(found.keys):,} samples done ({time_left.done / passes:.0%} of the encoding{left})")
            return found

        return encode

    @property
    def preparation(self) -> Preparation:
        """Return the preparation of samples for the encoder, without masking."""
        encoder = getattr(self.model, "backbone", self.model)  # of a classifier
        return Preparation(encoder.geometry, UNMASKED, encoder.tokenizer, self.config.run.seed)

    def batches(
        self, train: Corpus, share: Share, steps: range, layout: Layout, transform: Transform | None = None
    ) -> DataLoader[PackedBatch]:
        """Return this rank's batches of `steps`."""
        more: dict[str, Any] = {"node": self.session.node(), "pin_memory": pins_memory(self.ranks.device)}
        return train_loader(
            self.config.data, train, self.preparation, share, steps, layout=layout, transform=transform, **more
        )

    def samples(self, corpus: Corpus, keys: Sequence[str]) -> dict[str, Sample]:
        """Return samples of a corpus as the encoder saw them, by key."""
        return samples_of(corpus, self.preparation, keys)

    def cell(self, sample: Sample | None, text: str | None = None, colour: Colour = BLACK) -> Cell:
        """Return a sample to be shown: its image, or else its caption, with a text below it."""
        if sample is None:
            return Cell(None)
        caption = ""
        if sample.tokens is not None:
            assert self.model.tokenizer is not None
            caption = self.model.tokenizer.decode(sample.tokens.tolist())
        if sample.image is None:
            return Cell(None, caption if text is None else f"{text}: {caption}", colour)
        image = levels(sample.image, self.model.config, self.config.data.show_channels)
        return Cell(image, caption if text is None else text, colour)

    def say(self, text: str) -> None:
        """Print a line, once for all ranks."""
        if self.ranks.is_main:
            print(text, flush=True)

    def time_left(self, total: float, beside: float = 0.0, *, shorter: Callable[[float], str]) -> TimeLeft:
        """Return the time left of the task, see there. Once that can be estimated, and would be long on a CPU, print it
        with what `shorter` says: how to take about the fraction of it that it is given. Every rank may call it."""

        def told(left: float) -> None:
            if self.ranks.device.type == "cpu" and left > LONG_S:
                self.say(f"note: this takes about {duration(left)} on this CPU; shorter: {shorter(SHORT_S / left)}")

        left = TimeLeft(total, beside, told)
        if beside > LONG_S:
            left.tell(beside)  # at once, whatever the rest takes
        return left

    def keep(self, columns: Columns) -> None:
        """Write the predictions of each sample, as predictions.parquet."""
        self.ranks.on_main(lambda: write_parquet(self.out / PREDICTIONS_FILE, columns))

    def described(self, result: dict[str, Any], *, partial: bool) -> dict[str, Any]:
        """Return a complete or partial result with a description of its model and data."""
        options, config = self.options, self.config.model_dump(mode="json")
        about = {"task": options.task, "partial": partial}
        model = list(options.models) if TASKS[options.task].compares else options.model
        return about | result | {"model": model, "modality": self.modality, "config": config}

    def keep_if_stopped(self, found: Callable[[], SoFar]) -> None:
        """From now on, if a rank is asked to stop, write and print what was found so far, before the ranks leave.
        `found`: called then on the main rank, in a thread of its own."""
        self.stop.at_leaving = lambda: self._leave(found) if self.ranks.is_main else ""

    def _leave(self, found: Callable[[], SoFar]) -> str:
        if (self.out / RESULT_FILE).exists():
            return f"the result is in {self.out / RESULT_FILE}"
        return self.write_partial(found(), STARTS_OVER)

    def write_partial(self, found: SoFar, rerun: str) -> str:
        """Write what was found so far, and return what to say of it; main rank only. `rerun`: how the task goes on."""
        if not found.result:
            return f"nothing was found yet ({found.done}); {rerun}"
        if found.columns:
            write_parquet(self.out / PREDICTIONS_FILE, found.columns)
        result = self.described({"done": found.done, **found.result}, partial=True)
        write_result(self.out, result, SO_FAR_FILE)
        if found.page:
            print(found.page, flush=True)
        return f"partial result, {found.done}, in {self.out / SO_FAR_FILE}: {summary(found.result)}; {rerun}"


def refuse_existing(out: Path) -> None:
    """Raise UserError if `out` holds a result."""
    if (out / RESULT_FILE).exists():
        raise UserError(f"--out {out}: already holds a {RESULT_FILE}; choose another folder")


def write_result(out: Path, result: dict[str, Any], name: str = RESULT_FILE) -> None:
    """Write result.json, which is whole or not there."""
    write_whole(out / name, json.dumps(result, indent=2) + "\n")
    if name == RESULT_FILE:
        (out / SO_FAR_FILE).unlink(missing_ok=True)


def numbers_of(result: dict[str, Any]) -> dict[str, int | float]:
    """Return the entries of a result that are numbers."""
    return {
        name: value for name, value in result.items() if isinstance(value, int | float) and not isinstance(value, bool)
    }


def summary(result: dict[str, Any]) -> str:
    """Return the numbers of a result as a line, each with its standard error where that is known."""
    numbers = numbers_of(result)
    shown = {name: f"{value:.4g}" for name, value in numbers.items() if not name.endswith(ERROR)}
    for name in shown:
        if name + ERROR in numbers:
            shown[name] = f"{numbers[name]:.4f} ± {numbers[name + ERROR]:.4f}"
    return "  ".join(f"{name} {value}" for name, value in shown.items())


def show_result(out: Path, result: dict[str, Any]) -> None:
    """Give the numbers of a result and the pictures in `out` to TensorBoard."""
    with SummaryWriter(str(out / "tensorboard")) as board:
        for name, value in numbers_of(result).items():
            board.add_scalar(f"result/{name}", value)
        for path in sorted(out.glob("*.png")):
            with Image.open(path) as image:
                board.add_image(path.stem, np.asarray(image.convert("RGB")), dataformats="HWC")
