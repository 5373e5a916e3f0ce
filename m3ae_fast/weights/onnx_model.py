"""Export of the image encoder as an ONNX file for runtimes without torch. The file maps pixels to the features of
`M3AE.encode`. Pixels have the model's image_dtype (int32 instead of uint16) and are not normalised; for floats, black
is 0 and white is 1.

Shapes: B images, C channels, S image size, D width.
"""

from __future__ import annotations

import logging
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from m3ae_kernels.pixels import LARGEST
from torch import Tensor, nn

from m3ae_fast.base.atomic_file import atomic_write
from m3ae_fast.base.errors import UserError
from m3ae_fast.base.libraries import require_libraries
from m3ae_fast.config import ModelConfig
from m3ae_fast.images.normalisation import to_unit
from m3ae_fast.weights.timm_folder import model_arguments, timm_weights

NEEDS = dict.fromkeys(("onnx", "onnxruntime", "timm"), "--format onnx")
SUFFIX, INT8_SUFFIX = ".onnx", ".int8.onnx"
NEEDED = 0.99999  # minimum cosine similarity between the file's features and torch's in float32
_BATCH, _TIMED = 8, 3  # images per timed batch, and number of timed batches


class Checked(NamedTuple):
    """An ONNX file with its accuracy and its speed on this machine."""

    path: Path
    cosine: float  # lowest cosine similarity with torch's float32 features
    images_per_s: float

    def __str__(self) -> str:
        speed = f"{self.images_per_s:.3g} images/s on this machine"
        return f"{self.path}: cosine similarity with torch {self.cosine:.6f}, {speed}"


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
    """Return the dtype of a file's input: int32 instead of uint16, which torch cannot export."""
    return np.dtype("int32" if config.image_dtype == "uint16" else config.image_dtype)


def as_input(images: Tensor, config: ModelConfig) -> np.ndarray:
    """Convert images to the input of an exported file, and return it: an array [B, C, S, S] in `input_dtype`. `images`:
    images of a batch, [B, C, S, S], in model.image_dtype; floating-point images are normalised."""
    pixels = to_unit(images, config.image_mean, config.image_std) if images.is_floating_point() else images
    return pixels.numpy().astype(input_dtype(config), copy=False)


def file_names(out: Path) -> tuple[Path, Path]:
    """Return the paths of the float32 and the int8 file of an export to `out`."""
    return out, out.with_name(out.name.removesuffix(SUFFIX) + INT8_SUFFIX)


def write_onnx(out: str | Path, config: ModelConfig, state: dict[str, Tensor]) -> list[Checked]:
    """Write the image encoder to two files, whose paths `file_names` returns: one in float32, and one with int8 weight
    matrices and dynamically quantised inputs. Return the accuracy and speed of both. `state`: weights by parameter
    name. Raises UserError if `out` is not the name of an ONNX file, a library is missing, a file cannot be written, or
    the features of the float32 file differ from torch's (cosine similarity below NEEDED)."""
    out = Path(out)
    if out.suffix != SUFFIX:
        raise UserError(f"{out}: must end in {SUFFIX}")
    require_libraries(NEEDS)
    encoder = ImageEncoder(config, {name: tensor.float() for name, tensor in state.items()}).eval()
    with atomic_write(out) as partial:
        _export(encoder, config, partial)
        exact = _checked(encoder, config, partial)
        if exact.cosine < NEEDED:
            raise UserError(f"{out}: its features differ from torch's (cosine {exact.cosine:.6f}); no file was written")
    _, small = file_names(out)
    with atomic_write(small) as partial:
        _quantise(out, partial)
        quick = _checked(encoder, config, partial)
    return [exact._replace(path=out), quick._replace(path=small)]


def _export(encoder: ImageEncoder, config: ModelConfig, path: Path) -> None:
    # a batch of 2 images, because a batch size of 1 would become a constant
    pixels = torch.zeros(2, config.channels, config.image_size, config.image_size)
    pixels = torch.from_numpy(pixels.numpy().astype(input_dtype(config)))
    names: dict[str, Any] = {"input_names": ["pixels"], "output_names": ["features"]}
    with warnings.catch_warnings():
        # warnings about fixed shapes, and about another exporter that requires more libraries
        warnings.simplefilter("ignore")
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

    root = logging.getLogger()
    root.addFilter(_is_relevant)
    try:
        quantize_dynamic(path, out, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul", "Gemm"])
    finally:
        root.removeFilter(_is_relevant)


def _is_relevant(record: logging.LogRecord) -> bool:
    """Return whether a log record is relevant. The advice of onnxruntime to infer shapes beforehand is not relevant,
    because shapes are fixed here."""
    return "pre-processing before quantization" not in record.getMessage()


def session(path: Path) -> Any:
    """Return an onnxruntime session of a file on the CPU."""
    import onnxruntime

    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


@torch.no_grad()
def _checked(encoder: ImageEncoder, config: ModelConfig, path: Path) -> Checked:
    run = session(path).run
    shape = (_BATCH, config.channels, config.image_size, config.image_size)
    white = LARGEST.get(getattr(torch, config.image_dtype), 1)
    pixels = (np.random.default_rng(0).random(shape) * (white + (white > 1))).astype(input_dtype(config))
    cosines = []
    for part in (pixels, pixels[:1]):  # checks that any number of images works
        (found,) = run(None, {"pixels": part})
        cosines.append(torch.cosine_similarity(torch.from_numpy(found), encoder(torch.from_numpy(part))).min().item())
    started = time.perf_counter()
    for _ in range(_TIMED):
        run(None, {"pixels": pixels})
    return Checked(path, min(cosines), _BATCH * _TIMED / (time.perf_counter() - started))
