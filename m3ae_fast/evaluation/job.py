"""The job that is passed to every task, and functions that write its result."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader

from m3ae_fast.base.atomic_file import write_text_atomically
from m3ae_fast.base.errors import UserError
from m3ae_fast.base.hardware import pins_memory
from m3ae_fast.base.pace import Pace, duration
from m3ae_fast.base.parquet import write_parquet
from m3ae_fast.base.wording import counted
from m3ae_fast.batch.masking import UNMASKED
from m3ae_fast.batch.packed import PackedBatch
from m3ae_fast.batch.packing import Sample
from m3ae_fast.config import Pool, SourceConfig
from m3ae_fast.config.evaluation import EncodeConfig, EvaluationConfig
from m3ae_fast.data import Corpus, Layout, Preparation, ShardStore, Share, open_corpus, samples_of, train_loader
from m3ae_fast.data.dataset import Transform
from m3ae_fast.data.label_lists import are_lists, list_corpus
from m3ae_fast.data.labels import Classes, class_names, label_corpus
from m3ae_fast.drawing.figures import BLACK, Cell, Colour, levels
from m3ae_fast.evaluation.tasks import Modality, Task, WithLabels, WithLists
from m3ae_fast.heads.classifier import Classifier, ClassifierConfig, Head
from m3ae_fast.heads.feature_bank import FeatureBank, FeatureType
from m3ae_fast.heads.logistic_regression import Tried
from m3ae_fast.heads.modules import LinearProbeHead
from m3ae_fast.heads.predictions import FILE as PREDICTIONS_FILE
from m3ae_fast.heads.standard_error import ERROR
from m3ae_fast.model.encoder import MultimodalEncoder
from m3ae_fast.process.session import Session
from m3ae_fast.shards.overview import part_of
from m3ae_fast.training.run_lock import RunFolder

RESULT_FILE = "result.json"

# On a CPU, if a task takes more than LONG_S seconds, a note suggests options that reduce this to about SHORT_S seconds.
LONG_S, SHORT_S = 15 * 60, 10 * 60

Columns = Mapping[str, Sequence[Any]]
T_co = TypeVar("T_co", bound=Task, covariant=True)


class Encoded(NamedTuple):
    """Features of the training and of the held-out samples, by type of the features."""

    train: Mapping[FeatureType, FeatureBank]
    val: Mapping[FeatureType, FeatureBank]
    is_network: bool = True  # whether the model has layers and poolings; False for FixedFeatures
    # result of `try_strengths` for the training features, if the choice of the pooling has computed it for all samples
    tried: Tried | None = None


@dataclass
class SharedFeatures:
    """Features that several tasks with the same model and samples share, so that the samples are encoded only once. The
    first of these tasks stores its features here."""

    encoded: dict[str, Encoded] = field(default_factory=dict)  # with the keys of `probe_grid._encoded`
    warnings: list[str] = field(default_factory=list)  # warnings of the encoding


@dataclass
class Job(Generic[T_co]):
    """A run of a task on a model."""

    options: T_co
    modality: Modality  # input of the encoder
    config: EvaluationConfig
    session: Session
    folder: RunFolder | None  # the output folder; None on all ranks but the main rank
    # on the ranks' device: an M3AE, FixedFeatures or, if the task evaluates one, a Classifier; None if the task opens
    # several models
    model: Any
    # returns the baselines that the task evaluates, by name, on the ranks' device
    open_baselines: Callable[[], Mapping[str, MultimodalEncoder]] = dict
    classes: Classes = ()  # labels by class id; see `open_labelled`
    names: list[str] = field(default_factory=list)  # names of the classes in figures
    pictures: list[Callable[[], None]] = field(default_factory=list)  # functions that plot figures after the task
    warnings: list[str] = field(default_factory=list)  # warnings for the result, which have been printed
    shared: SharedFeatures = field(default_factory=SharedFeatures)

    def __post_init__(self) -> None:
        self.ranks, self.stop, self.heartbeats = self.session

    @property
    def out(self) -> Path:
        return self.config.run.dir

    @property
    def encoder(self) -> MultimodalEncoder:
        """Return the model, or the encoder of a classifier."""
        return getattr(self.model, "backbone", self.model)

    @property
    def encode_config(self) -> EncodeConfig:
        """Return the settings of the encoding, with the pooling of the model if they contain none."""
        return self.config.encode.of_model(self.encoder.config, texts=self.modality != "image")

    def open(self, sources: Sequence[SourceConfig]) -> Corpus:
        """Open the samples of the sources, whether or not they have labels. Raises UserError as `open_corpus` does."""
        store = ShardStore(self.config.data.cache_dir, self.config.data.cache_gb)
        corpus = self.ranks.main_first(lambda: open_corpus(sources, store, progress=self.ranks.is_main))
        for damaged in corpus.damaged:
            self.print(str(damaged))
        if corpus.ignored:
            self.print(f"ignored files in the shards: {corpus.ignored}")
        return corpus

    @cached_property
    def corpora(self) -> tuple[Corpus, Corpus]:
        """Return the training and the held-out samples, whether or not they have labels. Raises UserError as
        `open_corpus` does."""
        train, val = self.open(self.config.data.train), self.open(self.config.data.val)
        if self.model is not None:
            self.warn_of_colours(train, self.encoder.config.channels)
        if shared := val.shared_with(train):
            parts = f"{len(shared):,} of its shards {'is' if len(shared) == 1 else 'are'}"
            self.print(
                f"note: --val: {parts} also in --train (for example, {shared[0]}), so accuracies are not measured on "
                "unseen samples"
            )
        return train, val

    def open_labelled(self: Job[WithLabels]) -> tuple[Corpus, Corpus, Classes]:
        """Return the training and held-out samples that have a class or, if the task supports them, lists of labels,
        and the classes by id. Sets `classes` and `names`. Raises UserError as `open_corpus`, `label_corpus` and
        `list_corpus` do."""
        field, progress = self.options.labels, self.ranks.is_main
        has_lists = isinstance(self.options, WithLists) and are_lists(self.corpora[0], field)
        classes: Classes | None = None
        labelled = []
        for corpus in self.corpora:
            if has_lists:
                found, classes, unknown = list_corpus(corpus, field, classes, progress=progress)
                about = f"{found.samples:,} samples with lists of labels, {len(classes):,} classes"
                if unknown:
                    about += f"\nnote: left out {counted(unknown, 'label')} of --val that no training sample has"
            else:
                found, classes = label_corpus(corpus, field, classes, progress=progress)
                about = f"{found.samples:,} of {corpus.samples:,} samples belong to one of the {len(classes)} classes"
            labelled.append(found)
            self.print(about)
        assert classes is not None
        self.classes, self.names = classes, [*map(str, classes)] if has_lists else class_names(labelled[0], classes)
        return labelled[0], labelled[1], classes

    def warn_of_colours(self, corpus: Corpus, channels: int, name: str = "the model") -> None:
        """Warn if a model with this number of channels reads the images as grey although some of them have colours.
        `name`: name of the model in the warning."""
        if channels > 1:
            return
        kinds = self.ranks.broadcast(lambda: part_of(corpus, "the images", "", None).kinds)
        if colours := sum(kind.channels == 3 for kind in kinds):
            self.warn(
                f"{name} reads grey images, so the colours of the images are ignored ({colours:,} of {len(kinds):,} "
                "inspected images have colours)"
            )

    @property
    def preparation(self) -> Preparation:
        """Return the preparation of samples for the encoder, without masking."""
        return Preparation(self.encoder.geometry, UNMASKED, self.encoder.tokenizer, self.config.run.seed)

    def batches(
        self,
        train: Corpus,
        share: Share,
        steps: range,
        layout: Layout,
        transform: Transform | None = None,
    ) -> DataLoader[PackedBatch]:
        """Return a loader of this rank's training batches for the given steps."""
        preparation, node = replace(self.preparation, transform=transform), self.ranks.node()
        pin = pins_memory(self.ranks.device)
        return train_loader(
            self.config.data, train, preparation, share, steps, layout=layout, node=node, pin_memory=pin
        )

    def samples(self, corpus: Corpus, keys: Sequence[str]) -> dict[str, Sample]:
        """Return the samples with these keys, by key, as the encoder has seen them."""
        return samples_of(corpus, self.preparation, keys)

    def cell(self, sample: Sample | None, text: str | None = None, colour: Colour = BLACK) -> Cell:
        """Return a cell of a figure with the sample's image, or its caption if it has no image, and a text below it. By
        default, the text is the caption. An empty cell is returned if there is no sample."""
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

    def print(self, text: str) -> None:
        """Print a line, once for all ranks."""
        if self.ranks.is_main:
            print(text, flush=True)

    def warn(self, text: str) -> None:
        """Print a warning, once for all ranks, and add it to the warnings of the result. Every rank must call it."""
        self.print(f"warning: {text}")
        self.warnings.append(text)

    def pace(self, total: float, *, shorter: Callable[[float], str]) -> Pace:
        """Return the pace of the task. On a CPU, a note is printed as soon as it is clear that the task takes long.

        Args:
            total: as in `Pace`.
            shorter: function that is called with a fraction, and returns a suggestion of options that reduce the time
                of the task to about this fraction.
        """

        def report(left: float) -> None:
            if self.ranks.device.type == "cpu" and left > LONG_S:
                self.print(
                    f"note: the task takes about {duration(left)} on this CPU; to reduce the time: "
                    f"{shorter(SHORT_S / left)}"
                )

        return Pace(total, report=report)

    def keep(self, columns: Columns) -> None:
        """Write the predictions of each sample to predictions.parquet."""
        self.ranks.on_main(lambda: write_parquet(self.out / PREDICTIONS_FILE, columns))

    def save_probe(self, kind: Head, head: LinearProbeHead, pool: Pool) -> None:
        """Write a classifier that consists of the model and a head that was trained on its features with the pooling
        `pool`, as `Classifier.save_pretrained` does. Every rank must call it."""

        def save() -> None:
            classifier = Classifier(
                ClassifierConfig(
                    model=self.model.config,
                    head=kind,
                    pool=pool,
                    modality=self.modality,
                    classes=list(self.classes),
                )
            )
            classifier.load_backbone(self.model)
            classifier.head.load_state_dict(head.state_dict())
            classifier.save_pretrained(self.out)

        self.ranks.on_main(save)

    def described(self, result: dict[str, Any]) -> dict[str, Any]:
        """Return the result with the task, the model, the modality, the options and the config added."""
        options = self.options
        about = {"modality": self.modality, "options": options.entries(), "config": options.uses.values(self.config)}
        return {"task": options.name()} | result | options.model_dump(include={"model"}) | about


def refuse_existing(out: Path) -> None:
    """Raise UserError if `out` contains a result."""
    if (out / RESULT_FILE).exists():
        raise UserError(f"--out {out}: already contains a {RESULT_FILE}; choose another folder")


def write_result(out: Path, result: dict[str, Any]) -> None:
    """Write a result atomically to result.json."""
    write_text_atomically(out / RESULT_FILE, json.dumps(result, indent=2) + "\n")


def numbers_of(result: dict[str, Any]) -> dict[str, int | float]:
    """Return the entries of a result that are numbers."""
    return {
        name: value for name, value in result.items() if isinstance(value, int | float) and not isinstance(value, bool)
    }


def summary(result: dict[str, Any]) -> str:
    """Return the numbers of a result on one line, with their standard errors if these are known."""
    numbers = numbers_of(result)
    shown = {name: f"{value:.4g}" for name, value in numbers.items() if not name.endswith(ERROR)}
    for name in shown:
        if name + ERROR in numbers:
            shown[name] = f"{numbers[name]:.4f} ± {numbers[name + ERROR]:.4f}"
    return "  ".join(f"{name} {value}" for name, value in shown.items())


def show_result(out: Path, result: dict[str, Any]) -> None:
    """Write the numbers of a result, and the figures in `out`, to TensorBoard's event files."""
    from torch.utils.tensorboard import SummaryWriter  # takes a quarter of a second

    with SummaryWriter(str(out / "tensorboard")) as board:
        for name, value in numbers_of(result).items():
            board.add_scalar(f"result/{name}", value)
        for path in sorted(out.glob("*.png")):
            with Image.open(path) as image:
                board.add_image(path.stem, np.asarray(image.convert("RGB")), dataformats="HWC")
