"""The image encoder as an ONNX file: pixels in, the features of `M3AE.encode` out, for runtimes without torch. Pixels
have the model's image_dtype, uint16 as int32, and are not normalised yet: of floats, black is 0 and white 1.

And what such files are good for: k-NN accuracy on labelled shards, beside torch's, and images/s.

Shapes: B images, C channels, S image size, D width; N training samples, M samples to classify.
"""

from __future__ import annotations

import importlib.util
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from m3ae_kernels.pixels import LARGEST
from torch import Tensor, nn

from m3ae_fast.batch.normal import to_unit
from m3ae_fast.batch.packing import Geometry
from m3ae_fast.config import ModelConfig
from m3ae_fast.config.transfer import TransferConfig, transfer_config
from m3ae_fast.convert.timm_model import model_arguments, timm_weights
from m3ae_fast.data import Corpus, Preparation, ShardStore, Share, eval_loader, open_corpus
from m3ae_fast.data.dataset import UNMASKED
from m3ae_fast.data.labels import label_corpus
from m3ae_fast.encoding import check_skipped
from m3ae_fast.errors import UserError
from m3ae_fast.progress import track
from m3ae_fast.transfer.knn import knn_scores
from m3ae_fast.transfer.predictions import Predictions
from m3ae_fast.whole_file import whole_file

SUFFIX, INT8_SUFFIX = ".onnx", ".int8.onnx"
NEEDED = 0.99999  # cosine of the file's features with torch's, in float32
_BATCH, _TIMED = 8, 3  # images of a batch that is timed, and how many are

Encode = Callable[[np.ndarray], Tensor]  # pixels [B, C, S, S] as `input_dtype` says -> float32 [B, D]


class Checked(NamedTuple):
    """An ONNX file with its accuracy and speed, measured on this machine."""

    path: Path
    cosine: float  # lowest, with torch's float32 features
    images_per_s: float

    def __str__(self) -> str:
        return f"{self.path}: cosine with torch {self.cosine:.6f}, {self.images_per_s:.3g} images/s on this machine"


class ImageEncoder(nn.Module):
    """timm's VisionTransformer with the encoder's weights: pixels [B, C, S, S] -> float32 [B, D]."""

    mean: Tensor
    scale: Tensor

    def __init__(self, config: ModelConfig, state: dict[str, Tensor]) -> None:
        super().__init__()
        from timm.models import VisionTransformer

        self.vit = VisionTransformer(**model_arguments(config))
        self.vit.load_state_dict(timm_weights(config, state))
        mean, std = (torch.tensor(values)[:, None, None] for values in (config.image_mean, config.image_std))
        white = LARGEST.get(getattr(torch, config.image_dtype), 1)
        self.register_buffer("mean", white * mean)
        self.register_buffer("scale", 1 / (white * std))

    def forward(self, pixels_BCSS: Tensor) -> Tensor:
        return self.vit((pixels_BCSS.float() - self.mean) * self.scale)


def input_dtype(config: ModelConfig) -> np.dtype:
    """Return the dtype of a file's input: torch exports nothing of uint16."""
    return np.dtype("int32" if config.image_dtype == "uint16" else config.image_dtype)


def as_input(images: Tensor, config: ModelConfig) -> np.ndarray:
    """Return a batch's images as a file takes them."""
    pixels = to_unit(images, config.image_mean, config.image_std) if images.is_floating_point() else images
    return pixels.numpy().astype(input_dtype(config), copy=False)


def file_names(out: Path) -> tuple[Path, Path]:
    """Return the names of the float32 and of the int8 file of an export to `out`."""
    return out, out.with_name(out.name.removesuffix(SUFFIX) + INT8_SUFFIX)


def write_onnx(out: str | Path, config: ModelConfig, state: dict[str, Tensor]) -> list[Checked]:
    """Write the encoder of images to `out` in float32, and beside it, as NAME.int8.onnx, with weights of matrices in
    int8 and their inputs quantised as they come. Return how near each is to torch, and how fast. Raises UserError where
    `out` is no name of an ONNX file, a library is missing, or the float32 file gives other features."""
    out = Path(out)
    if out.suffix != SUFFIX:
        raise UserError(f"{out}: must end in {SUFFIX}")
    if missing := [name for name in ("onnx", "onnxruntime", "timm") if importlib.util.find_spec(name) is None]:
        raise UserError(f"--format onnx needs {', '.join(missing)}: pip install 'm3ae-fast[onnx]'")
    encoder = ImageEncoder(config, {name: tensor.float() for name, tensor in state.items()}).eval()
    with whole_file(out) as partial:
        _export(encoder, config, partial)
        exact = _checked(encoder, config, partial)
        if exact.cosine < NEEDED:
            raise UserError(f"{out}: its features differ from torch's (cosine {exact.cosine:.6f}); no file was written")
    _, small = file_names(out)
    with whole_file(small) as partial:
        _quantise(out, partial)
        quick = _checked(encoder, config, partial)
    return [exact._replace(path=out), quick._replace(path=small)]


def _export(encoder: ImageEncoder, config: ModelConfig, path: Path) -> None:
    # of 2 images: 1 would be taken for a constant
    pixels = torch.zeros(2, config.channels, config.image_size, config.image_size)
    pixels = torch.from_numpy(pixels.numpy().astype(input_dtype(config)))
    names: dict[str, Any] = {"input_names": ["pixels"], "output_names": ["features"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that shapes are fixed, and that there is another exporter, which needs more
        torch.onnx.export(
            encoder,
            (pixels,),
            str(path),
            **names,
            dynamic_axes={"pixels": {0: "batch"}, "features": {0: "batch"}},
            opset_version=17,
            dynamo=False,
        )


def _quantise(path: Path, out: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(path, out, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul", "Gemm"])


def session(path: Path) -> Any:
    """Return onnxruntime's session of a file, on the CPU."""
    import onnxruntime

    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


@torch.no_grad()
def _checked(encoder: ImageEncoder, config: ModelConfig, path: Path) -> Checked:
    run = session(path).run
    shape = (_BATCH, config.channels, config.image_size, config.image_size)
    white = LARGEST.get(getattr(torch, config.image_dtype), 1)
    pixels = (np.random.default_rng(0).random(shape) * (white + (white > 1))).astype(input_dtype(config))
    cosines = []
    for part in (pixels, pixels[:1]):  # any number of images
        (found,) = run(None, {"pixels": part})
        cosines.append(torch.cosine_similarity(torch.from_numpy(found), encoder(torch.from_numpy(part))).min().item())
    started = time.perf_counter()
    for _ in range(_TIMED):
        run(None, {"pixels": pixels})
    return Checked(path, min(cosines), _BATCH * _TIMED / (time.perf_counter() - started))


class Labelled(NamedTuple):
    """Images with a class: those to look for neighbours in, and those to classify by them."""

    config: TransferConfig
    train: Corpus
    val: Corpus
    classes: int


def open_labelled(train: list[str], val: list[str], labels: str) -> Labelled:
    """Open shards. Raises UserError where they, or their labels (see `read_labels`), cannot be used."""
    parts = {"train": train, "val": val}
    data = {name: [{"shards": shards, "modality": "image"}] for name, shards in parts.items()}
    config = transfer_config({"data": data}, [])
    opened = (open_corpus(sources, ShardStore(), progress=True) for sources in (config.data.train, config.data.val))
    (bank, classes), queries = label_corpus(next(opened), labels), next(opened)
    return Labelled(config, bank, label_corpus(queries, labels, classes)[0], len(classes))


def knn_lines(files: Sequence[Path], config: ModelConfig, state: dict[str, Tensor], images: Labelled) -> list[str]:
    """Return a line for torch's encoder, in float32, and for each file: k-NN accuracy with its standard error, its
    distance to torch's, and images/s on this machine. Raises UserError where too few images can be read."""
    encoder = ImageEncoder(config, {name: tensor.float() for name, tensor in state.items()}).eval()
    encoders: dict[str, Encode] = {"torch": lambda pixels: encoder(torch.from_numpy(pixels))}
    for path in files:
        encoders[path.name] = _runs(path)
    (bank, labels_N, _), (queries, labels_M, seconds) = (
        _encode(part, images.config, config, encoders) for part in (images.train, images.val)
    )
    knn, lines, exact = images.config.knn, [], 0.0
    for name in encoders:
        scores = knn_scores(bank[name], labels_N, queries[name], images.classes, knn.k, knn.temperature)
        keys = [""] * len(labels_M)
        found = Predictions.of(keys, labels_M, scores, votes=True).accuracies()
        exact = found["top1"] if name == "torch" else exact
        text = f"{name}: k-NN {found['top1']:.1%} ± {found['top1_se']:.1%}"
        text += "" if name == "torch" else f", {100 * (found['top1'] - exact):+.1f} points from torch"
        lines.append(f"{text}, {len(labels_M) / seconds[name]:.3g} images/s on this machine")
    counts = f"k-NN on {len(labels_M):,} of {images.classes} classes, neighbours among {len(labels_N):,}"
    return [f"{counts} (k {knn.k}, batches of {images.config.encode.batch}):", *lines]


def _runs(path: Path) -> Encode:
    run = session(path).run
    return lambda pixels: torch.from_numpy(run(None, {"pixels": pixels})[0])


@torch.no_grad()
def _encode(
    corpus: Corpus, transfer: TransferConfig, config: ModelConfig, encoders: dict[str, Encode]
) -> tuple[dict[str, Tensor], Tensor, dict[str, float]]:
    """Return the features of the central squares by each encoder, the labels, and the seconds that each took."""
    preparation = Preparation(Geometry.of(config), UNMASKED, None, seed=0)
    loader = eval_loader(transfer.data, corpus, preparation, Share(transfer.encode.batch))
    features: dict[str, list[Tensor]] = {name: [] for name in encoders}
    labels, skipped, seconds = [], [], dict.fromkeys(encoders, 0.0)
    for batch in track(loader, "encoding with torch and ONNX", len(loader)):
        skipped += batch.skipped
        assert batch.labels is not None
        labels.append(batch.labels)
        for name, encode in encoders.items():
            started = time.perf_counter()
            features[name].append(encode(as_input(batch.images, config)))
            seconds[name] += time.perf_counter() - started
    check_skipped(skipped, corpus.samples, transfer.data.max_bad_fraction)
    return {name: torch.cat(parts) for name, parts in features.items()}, torch.cat(labels), seconds
