"""Features of the frozen encoder, for images and texts in memory and for whole shards.

Shapes: S samples, C channels, L patches per image, D encoder width, N samples of a corpus.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import NamedTuple, TypeVar

import torch
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import DataLoader

from m3ae_fast.config import DataConfig, MaskingConfig
from m3ae_fast.config.transfer import EncodeConfig
from m3ae_fast.data import Corpus, Preparation, Share, Skipped, eval_loader
from m3ae_fast.data.crops import centre_crop
from m3ae_fast.data.images import pixels_of
from m3ae_fast.engine.pulse import Pulse
from m3ae_fast.engine.ranks import Ranks
from m3ae_fast.engine.signals import StopRequest
from m3ae_fast.engine.stopping import until_stopped
from m3ae_fast.errors import UserError
from m3ae_fast.hardware import dtype_of, fast_precision, pins_memory
from m3ae_fast.model.batch import PackedBatch
from m3ae_fast.model.encoder import MultimodalEncoder
from m3ae_fast.model.packing import Sample, pack
from m3ae_fast.model.pooling import Pool
from m3ae_fast.progress import track

T = TypeVar("T")
UNMASKED = MaskingConfig(image_ratio=0, text_ratio=0)


@dataclass(frozen=True)
class Features:
    """Of the samples that could be read, in file order."""

    keys: list[str]
    features_ND: Tensor  # float32, on the CPU
    labels_N: Tensor | None  # int64 ids of classes; None for a corpus without labels
    patches_NLD: Tensor | None  # float16, on the CPU
    skipped: list[Skipped]


def encode_corpus(
    model: MultimodalEncoder,
    corpus: Corpus,
    data: DataConfig,
    config: EncodeConfig,
    ranks: Ranks,
    *,
    title: str = "encoding",
    patches: bool = False,
    pulse: Pulse | None = None,
    stop: StopRequest | None = None,
) -> Features:
    """Pooled features of the central square and the caption of every sample, whole on every rank.

    Args:
        model: on the device of `ranks`.
        corpus: what its sources' modalities say is encoded: images, texts, or pairs. Labels go along.
        data: workers, prefetch and max_bad_fraction.
        config: pooling, batch and precision.
        title: of the progress bar.
        patches: keep the features of all patches too.
        pulse: marked at each batch.
        stop: checked before each batch.

    Raises:
        Stopped: a rank is asked to stop.
        UserError: too many samples cannot be read, or there are captions and the model has no tokenizer.
    """
    share = Share(config.batch * ranks.world, rank=ranks.rank, world=ranks.world)
    loader = encoding_loader(model, corpus, data, share, ranks.device)
    batches: Iterable[PackedBatch] = pulse.watch(loader, title) if pulse else loader
    if stop:
        batches = until_stopped(batches, ranks, stop)
    shown = track(batches, title, len(loader), show=ranks.is_main)
    with encoding(model, config.precision, ranks.device):
        encode = partial(_pool_and_patches if patches else _pool, model, pool=config.pool)
        own = [
            _Part(
                batch.keys,
                pooled_SD.cpu(),
                patches_SLD if patches_SLD is None else patches_SLD.cpu(),
                batch.labels,
                batch.skipped,
            )
            for batch, (pooled_SD, patches_SLD) in _one_behind(encode, shown, ranks.device)
        ]
    # rank r's b-th batch is the stream's number b x world + r
    parts = list(chain.from_iterable(zip(*ranks.gather(own)))) if ranks.world > 1 else own
    keys, pooled, patches_SLD, labels, skipped = ([getattr(part, name) for part in parts] for name in _Part._fields)
    skipped = list(chain.from_iterable(skipped))
    check_skipped(skipped, corpus.samples, data.max_bad_fraction)
    return Features(list(chain.from_iterable(keys)), torch.cat(pooled), _join(labels), _join(patches_SLD), skipped)


class _Part(NamedTuple):
    """Of a batch."""

    keys: list[str]
    pooled_SD: Tensor
    patches_SLD: Tensor | None
    labels_S: Tensor | None
    skipped: tuple[Skipped, ...]


def _join(parts: list[Tensor | None]) -> Tensor | None:
    """None where a part is missing."""
    whole = [part for part in parts if part is not None]
    return torch.cat(whole) if len(whole) == len(parts) else None


def encoding_loader(
    model: MultimodalEncoder, corpus: Corpus, data: DataConfig, share: Share, device: torch.device
) -> DataLoader[PackedBatch]:
    """Unmasked batches of all samples in file order. Raises UserError where captions have no tokenizer."""
    if corpus.has_captions:
        require_tokenizer(model)
    preparation = Preparation(model.geometry, UNMASKED, model.tokenizer, seed=0)
    return eval_loader(data, corpus, preparation, share, pin_memory=pins_memory(device))


def require_tokenizer(model: MultimodalEncoder) -> None:
    """Raises UserError where the model cannot take text."""
    if not model.config.vocab_size:
        raise UserError("the model is image-only (vocab_size 0): it cannot take captions; use images only")
    if model.tokenizer is None:
        raise UserError("the model has no tokenizer: name the one it was trained with (data.tokenizer, M3AE.tokenizer)")


@contextmanager
def encoding(model: MultimodalEncoder, precision: str, device: torch.device) -> Iterator[None]:
    """Inference with the model as it is in evaluation; the weights are cast once for all batches within."""
    was_training = model.training
    model.eval()
    dtype = dtype_of(fast_precision(device) if precision == "auto" else precision)
    try:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            yield
    finally:
        model.train(was_training)


def _one_behind(
    encode: Callable[[PackedBatch], T], batches: Iterable[PackedBatch], device: torch.device
) -> Iterator[tuple[PackedBatch, T]]:
    """Each batch with what it gives, handed out when the next one has been launched: a GPU never waits for a copy."""
    last = None
    for batch in batches:
        encoded = encode(batch.to(device, non_blocking=True))
        if last:
            yield last
        last = batch, encoded
    if last:
        yield last


def _pool(model: MultimodalEncoder, batch: PackedBatch, pool: Pool) -> tuple[Tensor, None]:
    return model.pooled(batch, pool), None


def _pool_and_patches(model: MultimodalEncoder, batch: PackedBatch, pool: Pool) -> tuple[Tensor, Tensor]:
    pooled_SD, rows_TD = model.pooled_and_rows(batch, pool)
    cls_S = batch.encoder.cu_seqlens[: len(batch.keys)].long()  # segments of padding come after the samples
    patches_L = torch.arange(1, 1 + model.config.patches_per_image, device=rows_TD.device)
    return pooled_SD, rows_TD[cls_S[:, None] + patches_L].half()


def check_skipped(skipped: Sequence[Skipped], samples: int, max_fraction: float) -> None:
    """Raises UserError where none, or too few, of the samples could be used."""
    if len(skipped) == samples or len(skipped) > max_fraction * samples:
        raise UserError(
            f"{len(skipped):,} of {samples:,} samples cannot be used, such as {skipped[0]}; "
            f"repair the shards or raise data.max_bad_fraction ({max_fraction:g})"
        )


def encode(
    model: MultimodalEncoder,
    images: Sequence[Image | Tensor] | Tensor | None,
    texts: Sequence[str] | None,
    *,
    pool: Pool,
    batch: int,
    precision: str,
) -> Tensor:
    """See `M3AE.encode`."""
    if images is None and texts is None:
        raise ValueError("encode needs images, texts or both")
    if images is not None and texts is not None and len(images) != len(texts):
        raise ValueError(f"{len(images)} images and {len(texts)} texts")
    if texts is not None:
        require_tokenizer(model)
    count = len(images if images is not None else texts or [])
    device = model.encoder_input.cls_token.device
    parts = [torch.empty(0, model.config.emb_dim, device=device)]
    with encoding(model, precision, device):
        for start in range(0, count, batch):
            numbers = range(start, min(start + batch, count))
            samples = [
                _sample(model, i, None if images is None else images[i], None if texts is None else texts[i])
                for i in numbers
            ]
            parts.append(model.pooled(pack(samples, model.geometry).to(device), pool))
    return torch.cat(parts)


def _sample(model: MultimodalEncoder, number: int, image: Image | Tensor | None, text: str | None) -> Sample:
    sample = Sample(str(number))
    if image is not None:
        sample.image = prepare_image(model, image)
        sample.image_mask = torch.zeros(model.config.patches_per_image, dtype=torch.bool)
    if text is not None:
        assert model.tokenizer is not None
        sample.tokens = torch.from_numpy(model.tokenizer.encode(text))
        sample.text_mask = torch.zeros(len(sample.tokens), dtype=torch.bool)
    return sample


def prepare_image(model: MultimodalEncoder, image: Image | Tensor) -> Tensor:
    """[C, image_size, image_size] on the CPU: uint8, or as it is where it is floating. Raises ValueError where an image
    does not fit the model."""
    channels, size = model.config.channels, model.config.image_size
    if isinstance(image, Image):
        return centre_crop(pixels_of(image, channels), size)
    if image.ndim != 3 or image.shape[0] != channels:
        raise ValueError(f"an image has shape {list(image.shape)}, not [{channels}, height, width]")
    if image.is_floating_point():
        if image.shape[1:] != (size, size):
            raise ValueError(f"a floating image has shape {list(image.shape)}, not {[channels, size, size]}")
        return image.cpu()
    if image.dtype != torch.uint8:
        raise ValueError(f"an image is {image.dtype}, neither uint8 nor floating")
    return centre_crop(image.cpu(), size)
