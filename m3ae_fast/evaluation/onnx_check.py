"""k-NN accuracy and speed of the ONNX files of an encoder on labelled shards, compared with torch.

Shapes: B images, C channels, S image size, D width; N training samples, M samples to classify.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from m3ae_fast.base.progress import track
from m3ae_fast.batch.masking import UNMASKED
from m3ae_fast.batch.packing import Geometry
from m3ae_fast.config import ModelConfig
from m3ae_fast.config.evaluation import EvaluationConfig, evaluation_config
from m3ae_fast.data import Corpus, Preparation, ShardStore, Share, eval_loader, open_corpus
from m3ae_fast.data.labels import label_corpus
from m3ae_fast.evaluation.encoding import check_skipped
from m3ae_fast.evaluation.feature_bank import FeatureBank
from m3ae_fast.evaluation.knn import knn_predictions
from m3ae_fast.weights.onnx_model import ImageEncoder, as_input, session

Encode = Callable[[np.ndarray], Tensor]  # pixels [B, C, S, S] with the dtype of `input_dtype` -> float32 [B, D]


class Labelled(NamedTuple):
    """Labelled images: training samples, which are the neighbours, and held-out samples, which are classified."""

    config: EvaluationConfig
    train: Corpus
    val: Corpus
    classes: int


def open_labelled(train: list[str], val: list[str], labels: str) -> Labelled:
    """Open labelled shards. `labels`: as in `read_labels`. Raises UserError if the shards or their labels cannot be
    used."""
    parts = {"train": train, "val": val}
    data = {name: [{"shards": shards, "modality": "image"}] for name, shards in parts.items()}
    config = evaluation_config({"data": data}, [])
    opened = (open_corpus(sources, ShardStore(), progress=True) for sources in (config.data.train, config.data.val))
    (bank, classes), queries = label_corpus(next(opened), labels), next(opened)
    return Labelled(config, bank, label_corpus(queries, labels, classes)[0], len(classes))


class Measured(NamedTuple):
    """The results of an encoder on labelled images."""

    name: str  # "torch", or the name of the ONNX file
    accuracy: float  # k-NN accuracy, from 0 to 1
    error: float  # standard error of the accuracy
    images_per_second: float


class OnnxCheck(NamedTuple):
    """The results of the float32 encoder in torch and of its ONNX files on the same images."""

    torch: Measured
    files: list[Measured]
    train: int  # number of training images
    val: int  # number of images that were classified
    classes: int
    k: int
    batch: int  # images per batch

    def lines(self) -> list[str]:
        """Return the lines that describe the results to the user."""
        counts = f"k-NN on {self.val:,} images of {self.classes} classes, with neighbours from {self.train:,} images"
        lines = [f"{counts} (k {self.k}, batches of {self.batch}):"]
        for each in (self.torch, *self.files):
            text = f"{each.name}: k-NN {each.accuracy:.1%} ± {each.error:.1%}"
            if each is not self.torch:
                text += f", {100 * (each.accuracy - self.torch.accuracy):+.1f} points relative to torch"
            lines.append(f"{text}, {each.images_per_second:.3g} images/s on this machine")
        return lines


def check_onnx(files: Sequence[Path], config: ModelConfig, state: dict[str, Tensor], images: Labelled) -> OnnxCheck:
    """Measure the k-NN accuracy, and the throughput on this machine, of the encoder in torch and of its ONNX files.
    Raises UserError if too few images can be read."""
    encoder = ImageEncoder(config, {name: tensor.float() for name, tensor in state.items()}).eval()
    encoders: dict[str, Encode] = {"torch": lambda pixels: encoder(torch.from_numpy(pixels))}
    for path in files:
        encoders[path.name] = _runs(path)
    (bank, _), (queries, seconds) = (
        _encode(part, images.config, config, encoders) for part in (images.train, images.val)
    )
    train_samples, val_samples = (len(part["torch"].keys) for part in (bank, queries))
    k, measured = images.config.knn.fixed_k, []
    knn = images.config.knn.model_copy(update={"k": k})
    for name in encoders:
        found = knn_predictions(bank[name], queries[name], images.classes, knn)[0].accuracies()
        measured.append(Measured(name, found["top1"], found["top1_se"], val_samples / seconds[name]))
    return OnnxCheck(
        measured[0], measured[1:], train_samples, val_samples, images.classes, k, images.config.encode.batch
    )


def _runs(path: Path) -> Encode:
    run = session(path).run
    return lambda pixels: torch.from_numpy(run(None, {"pixels": pixels})[0])


@torch.no_grad()
def _encode(
    corpus: Corpus, transfer: EvaluationConfig, config: ModelConfig, encoders: dict[str, Encode]
) -> tuple[dict[str, FeatureBank], dict[str, float]]:
    """Return, for each encoder, the features of the central squares and the encoding time in seconds."""
    preparation = Preparation(Geometry.of(config), UNMASKED, None, seed=0)
    loader = eval_loader(transfer.data, corpus, preparation, Share(transfer.encode.batch))
    features: dict[str, list[Tensor]] = {name: [] for name in encoders}
    keys, labels, skipped, seconds = [], [], [], dict.fromkeys(encoders, 0.0)
    for batch in track(loader, "encoding with torch and ONNX", len(loader)):
        skipped += batch.skipped
        assert batch.labels is not None
        keys += batch.keys
        labels.append(batch.labels)
        for name, encode in encoders.items():
            started = time.perf_counter()
            features[name].append(encode(as_input(batch.images, config)))
            seconds[name] += time.perf_counter() - started
    check_skipped(skipped, corpus.samples, transfer.data.max_bad_fraction)
    labels_N = torch.cat(labels)
    return {name: FeatureBank(keys, torch.cat(parts), labels_N) for name, parts in features.items()}, seconds
