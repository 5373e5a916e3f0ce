"""The frozen teacher, whose features are the targets of masked patches (`model.image_targets: features`).

The teacher is not a part of the model that is trained: it has no gradients and no optimiser, it is the same on every
rank at every ZeRO stage, and checkpoints contain only a hash of its weights.

The views of a sample (`data.repeats`) share their crop, which the batch contains once: one pass of the teacher serves
all of them.

Shapes: B images, C channels, S x S pixels of the student, L patches of the student in rows x columns, K features of the
teacher, h x w positions of a feature map of the teacher, I patches in the image loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from m3ae_fast.base.errors import UserError
from m3ae_fast.batch.packed import PackedBatch
from m3ae_fast.batch.packing import Sample, pack
from m3ae_fast.config import Config
from m3ae_fast.engine.memory_estimate import PeakOfPass, in_bf16, typical_batch
from m3ae_fast.images.normalisation import from_unit, to_unit
from m3ae_fast.model.encoder import MultimodalEncoder
from m3ae_fast.model.flops import encoding_flops, executed_flops
from m3ae_fast.model.inference import encoding
from m3ae_fast.model.m3ae import M3AE
from m3ae_fast.model.pooling import patch_rows
from m3ae_fast.model.pretrained import ENCODER, weights_digest
from m3ae_fast.weights.library_model import LibraryModel, output_of
from m3ae_fast.weights.model_name import LIBRARIES, TIMM, TIMM_SOURCES
from m3ae_fast.weights.open_library_model import open_library_model
from m3ae_fast.weights.open_model import load_model

_CHUNK = 64  # number of images in a forward pass of the teacher, which limits its memory
# stages of a network of another library whose feature maps are used in addition to the last map, as negative indices
_EARLIER = [-3, -2]
_LUMA = (0.299, 0.587, 0.114)  # weights of red, green and blue in grey, as in Pillow


class _Network(NamedTuple):
    """A network that computes one or more feature maps, with the images that it expects."""

    kind: str  # architecture, for messages and checkpoints
    maps: nn.Module  # normalised images, float32 [B, C, S, S] -> list of feature maps [B, channels, h, w]
    side: int  # height and width of the images in pixels
    channels: int
    mean: Sequence[float]
    std: Sequence[float]
    width: int  # K, the channels of all maps together
    flops: float  # FLOPs of the forward pass of an image


class Teacher:
    """A frozen model that computes a feature vector for each patch of the student's images.

    The image of the student, after its crop and flip, is resized to the size of the teacher and normalised as in the
    teacher's own training. The teacher's feature maps are interpolated to the patches of the student. The features of a
    patch in a map are standardised to mean 0 and variance 1 over the channels of the map, as in MaskDistill (arXiv
    2210.10615) and data2vec (arXiv 2202.03555). If there are several maps, their features are concatenated, and scaled
    so that the mean squared error over all K features is the mean of the errors of the maps.
    """

    def __init__(self, name: str, network: _Network, config: Config) -> None:
        """Create the teacher of a run on the CPU. `name`: its name in `loss.teacher`. Raises UserError if the teacher
        cannot read the images of the run."""
        given, own = config.model.channels, network.channels
        if given != own and {given, own} != {1, 3}:
            raise UserError(
                f"loss.teacher: {name}: reads images with {own} channels, but the images of the run have {given} "
                f"(model.channels); choose a teacher with {given} channels"
            )
        self.name, self.width, self.flops = name, network.width, network.flops
        self._network, self._student, self._views = network, config.model, config.data.repeats
        self._precision = "bf16" if in_bf16(config) else "fp32"
        self._maps = network.maps.requires_grad_(False).eval()
        self.bytes = sum(each.nbytes for each in self._maps.parameters())
        side, digest = network.side, weights_digest(self._maps.state_dict())
        scale = weights_digest({"mean": torch.tensor(network.mean), "std": torch.tensor(network.std)})
        self.identity = f"{network.kind}, images of {side} x {side} pixels, normalisation {scale}, weights {digest}"

    def pass_bytes(self, samples: int, parts: int = 1) -> float:
        """Return the estimated bytes that a step requires in addition to the teacher's weights. They consist of the
        activations of a pass, which are measured with one image on the device of the weights, and of the features of
        all patches. `samples`: number of samples in a micro-batch; `parts`: number of micro-batches in a step, whose
        targets exist at the same time."""
        c, device = self._student, next(self._maps.parameters()).device
        image = torch.zeros(
            1, c.channels, c.image_size, c.image_size, device=device, dtype=getattr(torch, c.image_dtype)
        )
        with PeakOfPass(image) as measured:
            self._features(image)
        images = math.ceil(samples / self._views)
        features = 4 * c.patches_per_image * self.width
        return min(images, _CHUNK) * measured.peak + (images + samples * parts) * features

    def to(self, device: torch.device) -> Teacher:
        """Move the weights to a device, and return the teacher."""
        self._maps.to(device)
        return self

    def describe(self, config: Config) -> str:
        """Return a line for the log about the teacher and its cost relative to that of the student. `config`: config of
        the run, with the width of the teacher."""
        with torch.device("meta"):
            model = M3AE(config.model, config.loss)
        student = executed_flops(config.model, typical_batch(config, model))
        views = config.data.repeats
        ratio = self.flops / (views * student)
        shared = "" if views == 1 else f" on its {views} views"
        line = (
            f"the targets are the {self.width} features per patch of {self.name} ({self.identity}); per image, "
            f"the teacher takes {self.flops / 1e9:.3g} GFLOP, {ratio:.2g} times as many as the training of the "
            f"student{shared}"
        )
        if ratio <= 1:
            return line
        smaller = "NAME@SIDE" if self.name.startswith(LIBRARIES) else "a teacher for smaller images"
        return (
            f"{line}, so the teacher is slower than the student: a smaller teacher, {smaller}, or a higher "
            "data.repeats would be faster"
        )

    def with_targets(self, batch: PackedBatch) -> PackedBatch:
        """Return `batch` with image targets, float32 [I, K]: the features of each patch that carries loss. The batch
        and the teacher must be on the same device."""
        features_BLK = self.features(batch.images)
        ids_I = batch.image_patch_ids.long()  # image * L + patch
        return replace(batch, image_targets=features_BLK.flatten(0, 1).index_select(0, ids_I))

    def features(self, images_BCSS: Tensor) -> Tensor:
        """Return the standardised features of all patches, float32 [B, L, K], for images of the student: uint8, uint16
        or floating-point and normalised."""
        count = len(images_BCSS)
        found_BLK = torch.empty(count, self._student.patches_per_image, self.width, device=images_BCSS.device)
        for start in range(0, count, _CHUNK):
            found_BLK[start : start + _CHUNK] = self._features(images_BCSS[start : start + _CHUNK])
        return found_BLK

    @torch.no_grad()
    def _features(self, images_BCSS: Tensor) -> Tensor:
        inputs = self._inputs(images_BCSS)
        with encoding(self._maps, self._precision, images_BCSS.device):
            maps = [each.float() for each in self._maps(inputs)]
        side = self._student.image_size // self._student.patch_size
        parts = []
        for map_BKhw in maps:
            if map_BKhw.shape[2:] != (side, side):
                map_BKhw = F.interpolate(map_BKhw, (side, side), mode="bilinear", antialias=True)
            channels = map_BKhw.shape[1]
            part_BLK = F.layer_norm(map_BKhw.flatten(2).mT, (channels,))
            parts.append(part_BLK * math.sqrt(self.width / (len(maps) * channels)))
        return torch.cat(parts, 2)

    def _inputs(self, images_BCSS: Tensor) -> Tensor:
        """Return the images as the teacher expects them, float32."""
        is_float = images_BCSS.is_floating_point()
        channels, side = self._network.channels, self._network.side
        unit = to_unit(images_BCSS, self._student.image_mean, self._student.image_std).float()
        if unit.shape[1] != channels:  # grey images and a teacher of colour images, or the reverse
            luma = unit.new_tensor(_LUMA)[:, None, None]
            unit = unit.expand(-1, 3, -1, -1) if channels == 3 else (unit * luma).sum(1, keepdim=True)
        if unit.shape[-1] != side:
            unit = F.interpolate(unit, (side, side), mode="bicubic", antialias=True)
            unit = unit if is_float else unit.clamp(0, 1)  # bicubic interpolation overshoots at edges
        return from_unit(unit, self._network.mean, self._network.std)


class _LibraryMaps(nn.Module):
    """The feature maps of a model of timm or transformers: the last map and, if the network has stages of decreasing
    resolution as a CNN has, the maps of the two stages before it, because the last map of a small image has only a few
    positions. The constructor raises UserError if the last features are not a square map."""

    def __init__(self, opened: LibraryModel, where: str) -> None:
        super().__init__()
        # convolutions of channels-last images are faster, on a CPU in bf16 up to twice as fast
        self.network = opened.network.to(memory_format=torch.channels_last)
        self.channels = opened.network.num_features  # of the last map
        self.prefix = getattr(opened.network, "num_prefix_tokens", 0)  # cls and register tokens
        with FlopCounterMode(display=False) as counter:
            found = output_of(opened, self.network.forward_features, where)
        self.flops = float(counter.get_total_flops())
        if not isinstance(found, Tensor) or self._as_map(found) is None:
            shape = [*found.shape[1:]] if isinstance(found, Tensor) else type(found).__name__
            raise UserError(f"{where}: its last features are {shape}, not a square map of {self.channels} features")
        earlier = self._earlier(opened.black_image(), found)
        self._has_stages = bool(earlier)
        self.width = self.channels + sum(each.shape[1] for each in earlier)

    def forward(self, images: Tensor) -> list[Tensor]:
        images = images.contiguous(memory_format=torch.channels_last)
        if self._has_stages:
            last, earlier = self.network.forward_intermediates(images, indices=_EARLIER)
        else:
            last, earlier = self.network.forward_features(images), []
        found = self._as_map(last)
        assert found is not None
        return [*earlier, found]

    @torch.no_grad()
    def _earlier(self, image: Tensor, last: Tensor) -> list[Tensor]:
        """Return the maps of the earlier stages for an image; [] if the network has no stages of decreasing resolution,
        or if the library does not return their maps. `last`: the last features of this image."""
        if last.ndim != 4:
            return []
        try:
            again, maps = self.network.forward_intermediates(image, indices=_EARLIER)
        except Exception:  # some networks lack this method, do not support it, or have fewer stages
            return []
        return maps if torch.equal(again, last) and all(each.ndim == 4 for each in maps) else []

    def _as_map(self, found: Tensor) -> Tensor | None:
        """Return the output of the network as a map [B, K, h, w]; None if it is not one."""
        if found.ndim == 4 and self.channels in (found.shape[1], found.shape[3]):
            return found if found.shape[1] == self.channels else found.permute(0, 3, 1, 2)
        side = math.isqrt(max(found.shape[1] - self.prefix, 0))
        if found.ndim == 3 and found.shape[1:] == (self.prefix + side**2, self.channels) and side:
            return found[:, self.prefix :].mT.unflatten(2, (side, side))
        return None


class _OwnMaps(nn.Module):
    """The patch tokens of the encoder of an M3AE, after its final LayerNorm."""

    def __init__(self, model: M3AE) -> None:
        super().__init__()
        self.encoder = MultimodalEncoder(model.config)  # the encoder of `model`, without its decoder
        state = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(ENCODER)}
        self.encoder.load_state_dict(state)
        self._packed = lru_cache(8)(self._pack)

    def forward(self, images: Tensor) -> list[Tensor]:
        batch, config = replace(self._packed(len(images), images.device), images=images), self.encoder.config
        side = config.image_size // config.patch_size
        return [patch_rows(self.encoder.forward_encoder(batch), batch, config).mT.unflatten(2, (side, side))]

    def _pack(self, count: int, device: torch.device) -> PackedBatch:
        """Return a batch of `count` unmasked images on a device, without their pixels."""
        c = self.encoder.config
        image, mask = (
            torch.zeros(()).expand(c.channels, c.image_size, c.image_size),
            torch.zeros(c.patches_per_image).bool(),
        )
        batch = pack([Sample(str(i), image, mask) for i in range(count)], self.encoder.geometry)
        return replace(batch, images=image[None, :0]).to(device)


def open_teacher(config: Config) -> Teacher | None:
    """Return the teacher of a run on the CPU; None if the run has none. The state of torch's random number
    generator is changed. Raises UserError if the teacher does not exist or is damaged, or cannot read the images of the
    run."""
    name = config.loss.teacher
    if name is None:
        return None
    return Teacher(name, _network(name), config)


def width_of(name: str) -> int:
    """Return the number of features of a teacher. Raises UserError if it does not exist or is damaged."""
    return _network(name).width


def _network(name: str) -> _Network:
    try:
        if name.startswith(TIMM_SOURCES):
            raise UserError(f"{name}: write {TIMM}{name}")
        return _of_library(name) if name.startswith(LIBRARIES) else _own(name)
    except UserError as error:
        raise UserError(f"loss.teacher: {error}") from None


def _of_library(name: str) -> _Network:
    opened = open_library_model(name)
    maps = _LibraryMaps(opened, name)
    return _Network(
        opened.architecture, maps, opened.side, opened.channels, opened.mean, opened.std, maps.width, maps.flops
    )


def _own(name: str) -> _Network:
    model = load_model(name)
    c = model.config
    if c.resize == "native":
        raise UserError(f"{name}: has model.resize native; specify a teacher for square images")
    images = (c.image_size, c.channels, c.image_mean, c.image_std)
    return _Network("M3AE", _OwnMaps(model), *images, c.emb_dim, encoding_flops(c))


def with_target_width(config: Config, teacher: Teacher | None) -> Config:
    """Return the config with the width of its teacher as `model.target_width`. Raises UserError if the config has
    another width."""
    if teacher is None:
        return config
    width = config.model.target_width
    if width not in (None, teacher.width):
        raise UserError(
            f"model.target_width is {width}, but the teacher {teacher.name} has {teacher.width} features: set "
            f"model.target_width to {teacher.width} or null"
        )
    return config.model_copy(update={"model": config.model.model_copy(update={"target_width": teacher.width})})
