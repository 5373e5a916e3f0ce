"""Tests of an encoder, or of raw pixels, on labelled pictures that it was not trained on.

Shapes: N samples, M held-out samples, D width, L patches.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from m3ae_fast.config import SourceConfig
from m3ae_fast.config.evaluation import EvaluationConfig
from m3ae_fast.data import ShardStore, open_corpus
from m3ae_fast.evaluation.encoding import Watch, encode_corpus
from m3ae_fast.evaluation.feature_bank import FeatureBank
from m3ae_fast.evaluation.ood import Scores, auroc_and_fpr, auroc_interval
from m3ae_fast.evaluation.probe_grid import few_shot
from m3ae_fast.evaluation.probes import PROBES, Setting
from m3ae_fast.evaluation.retrieval import own_ranks
from m3ae_fast.model.m3ae import M3AE
from m3ae_fast.process.session import Session

SHOTS, DRAWS = (1, 5, 10), 5
RETRIEVED = 10  # a caption counts as found among so many
STRANGE = 1000  # pictures of a set that is out of distribution, at most
LOSSES = {"val_image_loss": "image loss", "val_text_loss": "text loss", "val_text_accuracy": "text accuracy",
          "val_text_relative": "text loss / unigram entropy"}  # fmt: skip
SCORES = ("mahalanobis", "max_softmax")  # those of the paper

# the shards, and whether patches are wanted, or the caption in place of the image -> features
Encode = Callable[[Sequence[Path], bool, bool], FeatureBank]
Labels = dict[str, dict[str, str]]  # see lab.study.shards


class Split(NamedTuple):
    """Shards of a seed."""

    train: dict[str, list[Path]]  # emoji, by vendor
    test: dict[str, list[Path]]
    clothes: tuple[list[Path], list[Path]]  # for training a probe, and for testing it
    strange: dict[str, list[Path]]  # out of distribution, by name; may hold those of `clothes`


@dataclass
class Found:
    """Measurements of an encoder: whether each sample was right, from 0 to 1, by test and key; and other numbers."""

    correct: dict[str, dict[str, float]]
    numbers: dict[str, float]


class Measuring:
    """Tests of one encoder."""

    def __init__(
        self, encode: Encode, split: Split, labels: Labels, config: EvaluationConfig, heads: int, session: Session
    ):
        """Take the `heads` of the attentive probe, and the `session` of the program that measures."""
        self.encode, self.split, self.labels, self.config = encode, split, labels, config
        self.heads, self.session = heads, session
        self.found = Found({}, {})

    def emoji(self, *, attentive: bool = False) -> tuple[FeatureBank, FeatureBank]:
        """Probe the categories and subcategories of emoji: of both vendors, of the other vendor's, and of few shots;
        `attentive`: by attentive pooling too. Returns features of training and test pictures."""
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
        """Probe the classes of clothes. Returns features of the test pictures."""
        bank, held_out = (self.encode(paths, False, False) for paths in self.split.clothes)
        for probe in ("knn", "linear"):
            self.probe(f"clothes_{probe}", probe, bank, held_out)
        return held_out

    def out_of_distribution(self, bank: FeatureBank, held_out: FeatureBank, known: dict[str, FeatureBank]) -> None:
        """Tell pictures of other kinds from test emoji. `known`: features that there are already, by name."""
        labelled, _ = self.labelled(bank, "category")
        seed = self.config.run.seed
        scores = Scores(labelled, self.config.knn.k, seed)
        familiar = scores(held_out)
        for name, shards in self.split.strange.items():
            features = known[name] if name in known else self.encode(shards, False, False)
            strange = scores(features.rows(range(min(STRANGE, len(features.keys)))))
            for score in SCORES:
                area, _ = auroc_and_fpr(familiar[score], strange[score])
                low, high = auroc_interval(familiar[score], strange[score], seed)
                names = (f"ood_{name}_{score}{suffix}" for suffix in ("", "_low", "_high"))
                self.found.numbers |= dict(zip(names, (area, low, high)))

    def retrieval(self) -> None:
        """Look for the caption of each test picture of a vendor among all, and the other way round."""
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
        """Train a probe and keep what it makes of held-out samples; of several `parts` each counts as much."""
        bank, classes = self.labelled(bank, field)
        held_out, _ = self.labelled(held_out, field, classes)
        ranks, _, pulse, _ = self.session
        setting = Setting(self.config, len(classes), self.heads, self.config.run.seed, ranks, pulse)
        predictions = PROBES[probe].predict({0: bank}, {0: held_out}, setting)[0]
        self._keep(name, predictions.keys, [value / parts for value in predictions.correct_N.tolist()])

    def labelled(
        self, features: FeatureBank, field: str, classes: list[str] | None = None
    ) -> tuple[FeatureBank, list[str]]:
        """Return the samples with their labels, and the classes, those of the samples if None; without the samples of
        other ones."""
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
    """Return the frozen encoder's features, of the image or of the caption alone."""

    def encode(shards: Sequence[Path], patches: bool, text: bool) -> FeatureBank:
        source = SourceConfig(shards=[str(path) for path in shards], modality="text" if text else "image")
        corpus = open_corpus([source], ShardStore(None))
        watch = Watch(pulse=session.pulse)
        found = encode_corpus(model, corpus, config.data, config.encode, session.ranks, watch, patches=patches)
        return replace(found.gathered(), keys=[key.rpartition("/")[2] for key in found.keys])

    return encode


def pixels(side: int, mean: Sequence[float], std: Sequence[float]) -> Encode:
    """Return the pixels themselves, of pictures of `side` x `side`, as the encoder is given them: [N, 3 side²]."""

    def encode(shards: Sequence[Path], patches: bool, text: bool) -> FeatureBank:
        keys, rows = [], []
        for path in shards:
            with tarfile.open(path) as tar:
                for member in tar:
                    if member.name.endswith(".jpg") and (file := tar.extractfile(member)):
                        image = Image.open(io.BytesIO(file.read())).convert("RGB")
                        values = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC), np.float32) / 255
                        rows.append(((values - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)).ravel())
                        keys.append(member.name.removesuffix(".jpg"))
        return FeatureBank(keys, torch.from_numpy(np.stack(rows)), None, None, [])

    return encode


def captions_alone(split: Split, labels: Labels, captions: dict[str, str]) -> Found:
    """Name categories by the words of the caption: a logistic regression of which words there are."""
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
    return Found({"linear": right}, {})


def keys_of(shard: Path) -> list[str]:
    """Return the keys of a shard's images."""
    with tarfile.open(shard) as tar:
        return [name.removesuffix(".jpg") for name in tar.getnames() if name.endswith(".jpg")]


def numbers_of(found: Found) -> dict[str, Any]:
    """Return accuracies and other numbers."""
    return {test: float(np.mean([*own.values()])) for test, own in found.correct.items()} | found.numbers
