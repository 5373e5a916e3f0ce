"""Tests of an encoder, or of raw pixels, on labelled images that are not training images of the encoder.

Shapes: N samples, M held-out samples, D width, L patches.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet
import torch
from PIL import Image

from m3ae_fast.config import SourceConfig
from m3ae_fast.config.evaluation import EvaluationConfig
from m3ae_fast.data import ShardStore, open_corpus
from m3ae_fast.evaluation.encoding import PassMonitor, encode_corpus
from m3ae_fast.evaluation.feature_bank import FeatureBank
from m3ae_fast.evaluation.job import RESULT_FILE
from m3ae_fast.evaluation.ood import Scores, auroc_and_fpr, auroc_interval
from m3ae_fast.evaluation.predictions import FILE as PREDICTIONS
from m3ae_fast.evaluation.probe_grid import few_shot
from m3ae_fast.evaluation.probes import PROBES, Setting
from m3ae_fast.evaluation.retrieval import own_ranks
from m3ae_fast.evaluation.task_runner import evaluate
from m3ae_fast.model.m3ae import M3AE
from m3ae_fast.process.session import Session

SHOTS, DRAWS = (1, 5, 10), 5
RETRIEVED = 10  # k of the recall at k in retrieval
OTHERS = 1000  # maximum number of images of an out-of-distribution dataset
LOSSES = {"val_image_loss": "image loss", "val_text_loss": "text loss", "val_text_accuracy": "text accuracy",
          "val_text_relative": "text loss / unigram entropy"}  # fmt: skip
SCORES = ("mahalanobis", "max_softmax")  # the scores in the paper

# function that returns features, given shards, whether to keep patch tokens, and whether to encode captions, not images
Encode = Callable[[Sequence[Path], bool, bool], FeatureBank]
Labels = dict[str, dict[str, str]]  # see lab.study.shards


class Split(NamedTuple):
    """The shards that are used with a seed."""

    train: dict[str, list[Path]]  # emoji by vendor
    test: dict[str, list[Path]]
    clothes: tuple[list[Path], list[Path]]  # for training and for testing a probe
    out_of_distribution: dict[
        str, list[Path]
    ]  # out-of-distribution images by name, possibly including those of `clothes`


@dataclass
class EncoderResults:
    """Results of an encoder: by test and key, the fraction of the test's probes that classify the sample correctly; and
    other metrics."""

    correct: dict[str, dict[str, float]]
    numbers: dict[str, float]


class Measuring:
    """The tests of an encoder."""

    def __init__(
        self, encode: Encode, split: Split, labels: Labels, config: EvaluationConfig, heads: int, session: Session
    ):
        """Prepare the tests.

        Args:
            encode: the encoder.
            split: the shards.
            labels: labels of all samples.
            config: settings of the probes.
            heads: number of attention heads of the attentive probe.
            session: session of the program.
        """
        self.encode, self.split, self.labels, self.config = encode, split, labels, config
        self.heads, self.session = heads, session
        self.found = EncoderResults({}, {})

    def emoji(self, *, attentive: bool = False) -> tuple[FeatureBank, FeatureBank]:
        """Probe the categories and subcategories of emoji, also across vendors and with few shots, and return the
        features of training and test images. `attentive`: also use the attentive probe."""
        parts = []
        for shards in (self.split.train, self.split.test):
            by_vendor = {vendor: self.encode(paths, attentive, False) for vendor, paths in shards.items()}
            parts.append((by_vendor, _joined([*by_vendor.values()])))
        (styles, bank), (tested, held_out) = parts
        if attentive:
            self.probe("attentive", "attentive", bank.tokens(), held_out.tokens())
        bank, held_out = (each.pooled() for each in (bank, held_out))
        for probe in ("knn", "linear"):
            self.probe(probe, probe, bank, held_out)
        self.probe("subcategory", "linear", bank, held_out, field="subcategory")
        style, *others = self.split.train
        for probe in ("knn", "linear"):
            names = {style: f"same_style_{probe}"} | {other: f"shift_{probe}" for other in others}
            for vendor, name in names.items():
                self.probe(name, probe, *(each.pooled() for each in (styles[style], tested[vendor])))
        labelled, classes = self.labelled(bank, "category")
        for shots in SHOTS:
            for draw in range(DRAWS):
                few = few_shot(labelled, shots, draw, classes)
                self.probe(f"shots{shots}", "knn", few, held_out, parts=DRAWS)
        return bank, held_out

    def clothes(self) -> FeatureBank:
        """Probe the classes of clothes, and return the features of the test images."""
        bank, held_out = (self.encode(paths, False, False) for paths in self.split.clothes)
        for probe in ("knn", "linear"):
            self.probe(f"clothes_{probe}", probe, bank, held_out)
        return held_out

    def out_of_distribution(self, bank: FeatureBank, held_out: FeatureBank, known: dict[str, FeatureBank]) -> None:
        """Measure the detection of out-of-distribution images, with test emoji as in-distribution images. `known`:
        features that have already been computed, by name."""
        labelled, _ = self.labelled(bank, "category")
        seed = self.config.run.seed
        scores = Scores(labelled, self.config.knn.k)
        inside = scores(held_out)
        for name, shards in self.split.out_of_distribution.items():
            features = known[name] if name in known else self.encode(shards, False, False)
            outside = scores(features.rows(range(min(OTHERS, len(features.keys)))))
            for score in SCORES:
                area, _ = auroc_and_fpr(inside[score], outside[score])
                low, high = auroc_interval(inside[score], outside[score], seed)
                names = (f"ood_{name}_{score}{suffix}" for suffix in ("", "_low", "_high"))
                self.found.numbers |= dict(zip(names, (area, low, high)))

    def retrieval(self) -> None:
        """Measure image-to-text and text-to-image retrieval on the test images of a vendor."""
        shards = next(iter(self.split.test.values()))
        images, texts = (self.encode(shards, False, text) for text in (False, True))
        assert images.keys == texts.keys
        for name, queries, others in (("image_to_text", images, texts), ("text_to_image", texts, images)):
            ranks_N = own_ranks(queries, others)
            self._keep(name, images.keys, (ranks_N <= RETRIEVED).tolist())
        self.found.numbers["retrieval_chance"] = RETRIEVED / len(images.keys)

    def probe(
        self,
        name: str,
        probe: str,
        bank: FeatureBank,
        held_out: FeatureBank,
        *,
        field: str = "category",
        parts: int = 1,
    ) -> None:
        """Train a probe and store its results on held-out samples. With several `parts`, each has the same weight."""
        bank, classes = self.labelled(bank, field)
        held_out, _ = self.labelled(held_out, field, classes)
        ranks, _, heartbeats, _ = self.session
        setting = Setting(self.config, len(classes), self.heads, self.config.run.seed, ranks, heartbeats)
        predictions = PROBES[probe].predict({0: bank}, {0: held_out}, setting)[0]
        self._keep(name, predictions.keys, [value / parts for value in predictions.correct_N.tolist()])

    def labelled(
        self, features: FeatureBank, field: str, classes: list[str] | None = None
    ) -> tuple[FeatureBank, list[str]]:
        """Return the samples with class ids, and the classes. `classes`: names of the classes to keep; None: all
        classes of the samples."""
        names = [self.labels[key][field] for key in features.keys]
        classes = classes or sorted({*names})
        features = features.rows([row for row, name in enumerate(names) if name in {*classes}])
        labels = torch.tensor([classes.index(self.labels[key][field]) for key in features.keys])
        return replace(features, labels_N=labels), classes

    def _keep(self, name: str, keys: Sequence[str], values: Sequence[float]) -> None:
        own = self.found.correct.setdefault(name, dict.fromkeys(keys, 0.0))
        for key, value in zip(keys, values):
            own[key] += value


def _joined(parts: Sequence[FeatureBank]) -> FeatureBank:
    keys = [key for part in parts for key in part.keys]
    patches = [part.patches_RLD for part in parts if part.patches_RLD is not None]
    patches_NLD = torch.cat(patches) if patches else None
    return FeatureBank(keys, torch.cat([part.features_RD for part in parts]), None, patches_NLD, [])


def encoder(model: M3AE, config: EvaluationConfig, session: Session) -> Encode:
    """Return a function that computes the features of images or of captions with the frozen encoder."""

    def encode(shards: Sequence[Path], patches: bool, text: bool) -> FeatureBank:
        source = SourceConfig(shards=[str(path) for path in shards], modality="text" if text else "image")
        corpus = open_corpus([source], ShardStore(None))
        monitor = PassMonitor(heartbeats=session.heartbeats)
        found = encode_corpus(model, corpus, config.data, config.encode, session.ranks, monitor, patches=patches)
        return replace(found.gathered(), keys=[key.rpartition("/")[2] for key in found.keys])

    return encode


def pixels(side: int, mean: Sequence[float], std: Sequence[float]) -> Encode:
    """Return a function that computes pixels in place of features: images are scaled to `side` x `side` and normalised
    as for the encoder, [N, 3 side²]."""

    def encode(shards: Sequence[Path], patches: bool, text: bool) -> FeatureBank:
        keys, rows = [], []
        for path in shards:
            for key, content in images_of(path):
                image = Image.open(io.BytesIO(content)).convert("RGB")
                values = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC), np.float32) / 255
                rows.append(((values - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)).ravel())
                keys.append(key)
        return FeatureBank(keys, torch.from_numpy(np.stack(rows)), None, None, [])

    return encode


def captions_alone(split: Split, labels: Labels, captions: dict[str, str]) -> EncoderResults:
    """Return the results of a logistic regression that predicts the categories only from the words in the captions."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    train, test = (
        [key for shards in part.values() for path in shards for key in keys_of(path)]
        for part in (split.train, split.test)
    )
    words = make_pipeline(CountVectorizer(binary=True), LogisticRegression(max_iter=1000))
    words.fit([captions[key] for key in train], [labels[key]["category"] for key in train])
    predicted = words.predict([captions[key] for key in test])
    right = {key: float(labels[key]["category"] == found) for key, found in zip(test, predicted)}
    return EncoderResults({"linear": right}, {})


def finetune(
    model: str, train: Path, held_out: Sequence[Path], out: Path, settings: dict[str, Any]
) -> dict[str, int] | None:
    """Fine-tune a model, and return whether each held-out image was classified correctly, 0 or 1 by key. Return None if
    the training was stopped.

    Args:
        model: name of the model, see `m3ae_fast.evaluate`.
        train, held_out: shards of labelled images.
        out: output folder, from which an interrupted training is resumed.
        settings: values of settings by full name; the others have their defaults.
    """
    given = {"data.workers": 0, "finetune.log_every": 100} | settings
    complete = out / RESULT_FILE  # a stopped training leaves predictions of an earlier step, but not this file
    if not complete.exists():
        overrides = [f"{name}={json.dumps(value)}" for name, value in given.items()]
        shards = [str(path) for path in held_out]
        evaluate(
            "finetune",
            model,
            train=str(train),
            val=shards,
            out=out,
            resume="auto",
            baselines=False,  # they are models of the study
            overrides=overrides,
        )
    if not complete.exists():
        return None
    return {key.rpartition("/")[2]: right for key, right in correct_in(out).items()}


def correct_in(out: Path) -> dict[str, int]:
    """Return whether each held-out image of an evaluation in the folder `out` was classified correctly, 0 or 1 by
    "shard/key"."""
    table = pyarrow.parquet.read_table(out / PREDICTIONS).to_pydict()
    return {key: int(a == b) for key, a, b in zip(table["key"], table["label"], table["prediction"])}


def images_of(shard: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the key and the JPEG file of each image in a shard."""
    with tarfile.open(shard) as tar:
        for member in tar:
            if member.name.endswith(".jpg") and (file := tar.extractfile(member)):
                yield member.name.removesuffix(".jpg"), file.read()


def keys_of(shard: Path) -> list[str]:
    """Return the keys of a shard's images."""
    with tarfile.open(shard) as tar:
        return [name.removesuffix(".jpg") for name in tar.getnames() if name.endswith(".jpg")]


def numbers_of(found: EncoderResults) -> dict[str, Any]:
    """Return the accuracies and other metrics of an encoder."""
    return {test: float(np.mean([*own.values()])) for test, own in found.correct.items()} | found.numbers
