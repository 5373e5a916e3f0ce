"""The encoder of M3AE, which downstream tasks use: a ViT over image patches and text tokens.

Shapes: T encoder rows, N visible patches, D width, L patches of an image, V vocabulary, S samples, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from numbers import Integral
from typing import Any, Literal, TypeVar

import torch
from m3ae_kernels import PatchEmbed, scatter_tokens
from torch import Tensor, nn

from m3ae_fast.base.errors import UserError
from m3ae_fast.batch.inputs import (
    OneImage,
    Preprocess,
    ValueRange,
    as_images,
    check_present,
    check_values,
    in_unit,
    unmasked_sample,
)
from m3ae_fast.batch.packed import PackedBatch, Segments
from m3ae_fast.batch.packing import Geometry, Sample, pack
from m3ae_fast.batch.tokenizer import CaptionTokenizer
from m3ae_fast.config import FOR_TEXTS, POOLINGS, POOLS, ModelConfig, Pool
from m3ae_fast.images.normalisation import from_unit
from m3ae_fast.model.inference import check_finite, encoding
from m3ae_fast.model.pooling import only_cls, patch_rows, pool_rows, reads_only_cls
from m3ae_fast.model.positions import Positions
from m3ae_fast.model.transformer import Transformer

# Methods of other libraries' models, and the call of `encode` that replaces each.
_ELSEWHERE = {
    "encode_image": "images",
    "encode_text": "texts=texts",
    "forward_features": "images",
    "forward_head": "images",
    "get_image_features": "images",
    "get_text_features": "texts=texts",
}
_Function = TypeVar("_Function", bound=Callable[..., Any])


def _untraced(function: _Function) -> _Function:
    """Return the function in a form that torch.compile does not trace, because it reads values or runs NumPy. Outside
    torch.compile, the function itself is returned: torch.compiler.disable would import torch._dynamo, which takes
    longer than importing torch."""
    return torch.compiler.disable(function) if torch.compiler.is_compiling() else function


def pixel_options(config: ModelConfig) -> dict[str, Any]:
    """Return the options with which the ops read images."""
    return {
        "patch_size": config.patch_size,
        "channels": config.channels,
        "mean": config.image_mean,
        "std": config.image_std,
    }


def _wide(x: Tensor) -> Tensor:
    """Return `x` with at least float32 precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class EncoderInput(nn.Module):
    """Maps patch embeddings, text tokens and cls tokens to encoder rows, and adds positions and types."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim = config.emb_dim
        self.cls_token = nn.Parameter(torch.empty(1, dim))
        self.image_type = nn.Parameter(torch.empty(1, dim)) if config.use_type_embedding else None
        self.text_type = nn.Parameter(torch.empty(1, dim)) if config.use_type_embedding and config.vocab_size else None
        self.text_embedding = nn.Parameter(torch.empty(config.vocab_size, dim)) if config.vocab_size else None
        self.positions = Positions(config, dim)

    def forward(self, patches_ND: Tensor, batch: PackedBatch) -> Tensor:
        """Return the encoder's input rows, [T, D] in the dtype of `patches_ND`. `patches_ND`: the embeddings of the
        batch's visible patches."""
        table = torch.cat((self.cls_token, *self.positions(self.image_type, self.text_type, batch.grids)))
        words_VD = table[:0] if self.text_embedding is None else self.text_embedding
        return scatter_tokens(
            patches_ND, batch.encoder_src, words_VD, batch.token_ids, table, batch.encoder_table_ids,
            fill_order=batch.token_order, table_order=batch.encoder_table_order,
        )  # fmt: skip


class MultimodalEncoder(nn.Module):
    """The patch and text embeddings, followed by the transformer. The weights are uninitialised until
    `reset_parameters` is called or weights are loaded."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.tokenizer: CaptionTokenizer | None = None  # used by `encode`; set by the code that loads the model
        self.patch_embed = PatchEmbed(config.emb_dim, **pixel_options(config))
        self.encoder_input = EncoderInput(config)
        sizes = config.emb_dim, config.depth, config.num_heads, config.mlp_ratio
        self.encoder = Transformer(*sizes, gelu=config.gelu, drop_path=config.drop_path)

    def __getattr__(self, name: str) -> Any:
        if name in _ELSEWHERE:
            raise AttributeError(
                f"{type(self).__name__} has no {name}: use encode({_ELSEWHERE[name]}) or, with gradients, "
                "representation"
            )
        return super().__getattr__(name)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the weights as in the official code: weight matrices with Xavier-uniform values, text embeddings
        from N(0, 1), and other embeddings from N(0, 0.02²)."""
        for name, p in self.named_parameters():
            if name.endswith("text_embedding"):
                nn.init.normal_(p)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
            elif not name.endswith("weight"):
                nn.init.normal_(p, std=0.02)
            elif p.ndim == 2:
                nn.init.xavier_uniform_(p)
            else:
                nn.init.ones_(p)

    @property
    def geometry(self) -> Geometry:
        """Return the geometry of the model's input, which image decoding and `pack` require."""
        return Geometry.of(self.config)

    @property
    def preprocess(self) -> Preprocess:
        """Return the transform that converts a PIL image or an image file to the tensor that `encode` and
        `representation` accept: the central square or, with native aspect ratio, the whole image, resized, usually as
        uint8; see `Preprocess`. Data loaders can apply it in their workers."""
        return Preprocess(self.config)

    def forward_encoder(self, batch: PackedBatch) -> Tensor:
        """Return encoder rows [T, D] of a batch on the model's device, after the final LayerNorm, in the dtype in which
        the encoder computes. Differentiable."""
        return self.encoder.norm(self.encoder(self._input(batch), batch.encoder, batch.draws))

    def pooled(self, batch: PackedBatch, pool: Pool = "mean") -> Tensor:
        """Return features [S, D] pooled over each sample's visible rows, with the final LayerNorm, in at least float32.
        Differentiable.

        Args:
            batch: the batch, on the model's device.
            pool: one of `config.POOLINGS`, with the LayerNorm before or after the pooling according to the config's
                `mean_pool`. The functions in `model.pooling` describe the features. Grids need unmasked images; D is
                the number of cells times the width of the encoder.
        """
        return self.pooled_of_layers(batch, [self.config.depth], [pool]).flatten(1)

    def pooled_of_layers(self, batch: PackedBatch, layers: Sequence[int], pools: Sequence[Pool] = ("mean",)) -> Tensor:
        """Return features after each of several blocks, computed in one forward pass. They are pooled and normalised as
        in `pooled`.

        Args:
            batch: the batch, on the model's device.
            layers: numbers of the blocks, from 1.
            pools: the poolings.

        Returns:
            Feature vectors [S, K, D] of all pairs of a layer and a pooling, beginning with all poolings of the first
                layer. `POOLINGS` has the number of vectors of each pooling. The features of the last block are
                bitwise equal to those of `pooled`, except that the features of the cls token may differ by rounding if
                there are several poolings.
        """
        only, whole = reads_only_cls(pools), batch.encoder
        rows = (whole.cu_seqlens[:-1], only_cls(whole)) if only else ()  # rows that the last block computes
        found: dict[int, Tensor] = {}
        for layer, x_TD in self._after(layers, batch, *rows):
            segments = only_cls(whole) if only and layer == self.config.depth else whole
            found[layer] = pool_rows(pools, x_TD, segments, batch, self.encoder.norm, self.config)
        return torch.cat([found[layer] for layer in layers], 1)

    def pooled_and_rows(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """Return the features of `pooled` with the pooling "mean", [S, D], and the rows of `forward_encoder`, [T, D],
        in one forward pass."""
        ((_, x_TD),) = self._after([self.config.depth], batch)
        norm = self.encoder.norm
        return pool_rows(["mean"], x_TD, batch.encoder, batch, norm, self.config).flatten(1), norm(x_TD)

    def pooled_and_patches(
        self, batch: PackedBatch, layers: Sequence[int], pools: Sequence[Pool] = ("mean",)
    ) -> tuple[Tensor, Tensor]:
        """Return the features of `pooled_of_layers` and the patch tokens [S, K, L, D] after each of K blocks, with the
        final LayerNorm, in one forward pass. All samples must have an image. L is the number of patches of the largest
        image; smaller images are padded with zeros. The features have at least float32 precision, and the patch tokens
        have the dtype in which the encoder computes. `layers`, `pools`: as in `pooled_of_layers`."""
        norm, found = self.encoder.norm, {}
        for layer, x_TD in self._after(layers, batch):
            features_SKD = pool_rows(pools, x_TD, batch.encoder, batch, norm, self.config)
            found[layer] = features_SKD, patch_rows(norm(x_TD), batch, self.config)
        features, patches = zip(*(found[layer] for layer in layers))
        return torch.cat(features, 1), torch.stack(patches, 1)

    def _after(
        self,
        layers: Sequence[int],
        batch: PackedBatch,
        rows_M: Tensor | None = None,
        queries: Segments | None = None,
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield the number and the output rows of each of `layers`, before the final LayerNorm. Blocks after the last
        of these layers are not computed. `rows_M`, `queries`: rows that the encoder's last block computes; see
        `Transformer.forward`."""
        rows = self.encoder.layers(self._input(batch), batch.encoder, batch.draws, rows_M, queries)
        for layer, x_TD in enumerate(islice(rows, max(layers)), 1):
            if layer in layers:
                yield layer, x_TD

    def _input(self, batch: PackedBatch) -> Tensor:
        images = batch.images
        if images.is_floating_point():
            # like all activations, images are 16-bit if ZeRO keeps the weights in 16 bits
            images = images.to(self.patch_embed.weight.dtype)
        return self.encoder_input(self.patch_embed(images, batch.patch_ids), batch)

    def encode(
        self,
        images: OneImage | Sequence[OneImage] | None = None,
        texts: str | Sequence[str] | None = None,
        *,
        value_range: ValueRange = None,
        pool: Pool | None = None,
        layer: int | None = None,
        batch_size: int = 64,
        precision: Literal["auto", "bf16", "fp32"] = "auto",
    ) -> Tensor:
        """Return pooled features of images, texts, or pairs of them. The inputs are not masked, and no gradients are
        computed. Stochastic depth is off, even if the model is in training mode. Modules that you have added, such as
        dropout in adapters, follow the model's mode.

        Args:
            images: a path, a PIL image, a uint8 tensor [C, H, W] or array [H, W, C] of any size, or a floating-point
                tensor (see `value_range`); a list of these, or one tensor or array of several images; or None. Images
                are cropped to the central square unless the model has native aspect ratio.
            texts: a text or a list of texts, which require the model's `tokenizer`; or None. An empty text alone has no
                tokens, so that with pool="mean" its features are 0.
            value_range: value range of inputs that do not have 8-bit levels: floating-point tensors and arrays, and
                files, PIL images and arrays with more than 8 bits per channel. It replaces the model's value_range.
                None or "normalised": tensors are already normalised, (x - mean) / std, with image_mean and image_std of
                `config` and x from 0 to 1. Their shape is [C, image_size, image_size]; for native aspect ratio, their
                sides are multiples of the patch size. (black, white): the values of black and white in images of any
                size, such as (0, 1) for the output of torchvision's ToTensor or (0, 255) for 8-bit levels stored as
                floats. With None, tensors that are evidently not normalised raise ValueError, and float32 arrays are
                read with the model's value_range.
            pool: the pooling, one of `config.POOLINGS`. A grid such as "grid2" keeps positions in the image. None:
                `config.pool`, or "mean" if that is a grid and there are texts.
            layer: number of the block after which features are taken, from 1; None: the last block.
            batch_size: samples per forward pass.
            precision: precision of matmuls; "auto": bf16 if it is faster on the hardware.

        Returns:
            Features [S, D] on the model's device: float32, or float64 if the weights are float64. D is the width of the
                encoder, or a multiple of it for a grid.

        Raises:
            ValueError: images and texts are both None or differ in number, one of the items is None, an image does not
                fit the model, floating-point images evidently contradict value_range, or the layer, pool,
                batch_size, precision or value_range is invalid.
            UserError: a file cannot be read, texts are given but the model has no tokenizer, or a feature is not
                finite.
        """
        if images is None and texts is None:
            raise ValueError("encode requires images, texts or both")
        pool = self.config.default_pool(texts=texts is not None) if pool is None else pool
        if pool not in POOLS:
            raise ValueError(f"pool {pool!r}: must be one of {', '.join(POOLS)}")
        if POOLINGS[pool].needs_images and images is None:
            raise ValueError(f"pool {pool!r}: texts alone have no patches; use {FOR_TEXTS}")
        images, texts = self._checked(images, texts, value_range)
        batches, layers = self._batches(images, texts, value_range, batch_size, precision), self._layers(layer)
        device = self.encoder_input.cls_token.device
        parts = [torch.empty(0, POOLINGS[pool].vectors * self.config.emb_dim, device=device)]
        with encoding(self, precision, device):
            parts += [self.pooled_of_layers(packed, layers, [pool]).flatten(1) for packed in batches]
        features_SD = torch.cat(parts)
        check_finite(features_SD, [f"number {i}" for i in range(len(features_SD))])
        return features_SD

    def patch_features(
        self,
        images: OneImage | Sequence[OneImage],
        *,
        value_range: ValueRange = None,
        layer: int | None = None,
        batch_size: int = 64,
        precision: Literal["auto", "bf16", "fp32"] = "auto",
    ) -> Tensor:
        """Return the features of each image's patches as a feature map, without gradients. See `encode` for the
        arguments and errors.

        Returns:
            Features [B, H, W, D] with the final LayerNorm, where H x W are the rows and columns of patches, on the
                model's device: float32, or float64 if the weights are float64.

        Raises:
            ValueError: as in `encode`, or native images have patch grids of different sizes.
        """
        found, _ = self._checked(images, None, value_range)
        batches, layers = self._batches(found, None, value_range, batch_size, precision), self._layers(layer)
        device, c = self.encoder_input.cls_token.device, self.config
        grids, parts = set(), [torch.empty(0, c.longest_side, c.longest_side, c.emb_dim, device=device)]
        with encoding(self, precision, device):
            for packed in batches:
                grids.update(packed.grids)
                if len(grids) > 1:
                    sizes = " and ".join(f"{rows} x {columns}" for rows, columns in sorted(grids)[:2])
                    raise ValueError(
                        f"the images have patch maps of different sizes, {sizes}: pass images of one size at a time"
                    )
                ((rows, columns),) = grids
                patches_SLD = self.pooled_and_patches(packed, layers)[1][:, 0, : rows * columns]
                parts.append(_wide(patches_SLD).unflatten(1, (rows, columns)))
        features_BHWD = torch.cat(parts[1:] or parts)
        check_finite(features_BHWD, [f"number {i}" for i in range(len(features_BHWD))])
        return features_BHWD

    def _layers(self, layer: int | None) -> list[int]:
        """Return a list with the number of the block after which features are taken. Raises ValueError if there is no
        such block."""
        if layer is not None and not (isinstance(layer, Integral) and 1 <= layer <= self.config.depth):
            raise ValueError(f"layer {layer!r}: the encoder has layers 1 to {self.config.depth}")
        return [layer or self.config.depth]

    def _checked(
        self, images: OneImage | Sequence[OneImage] | None, texts: str | Sequence[str] | None, value_range: ValueRange
    ) -> tuple[list[OneImage] | None, list[str] | None]:
        """Return images and texts as lists. Raises ValueError and UserError as `encode` does."""
        if images is not None:
            images = list(as_images(images, self.config.channels))
            check_values(images, value_range, self.config)
        if texts is not None:
            texts = [texts] if isinstance(texts, str) else list(texts)
        check_present(images, texts)
        if images is not None and texts is not None and len(images) != len(texts):
            raise ValueError(f"the numbers of images ({len(images)}) and texts ({len(texts)}) differ")
        if texts is not None:
            self.require_tokenizer()
        return images, texts

    def _batches(
        self,
        images: Sequence[OneImage] | None,
        texts: Sequence[str] | None,
        value_range: ValueRange,
        batch_size: int,
        precision: str,
    ) -> Iterator[PackedBatch]:
        """Return an iterator over unmasked batches on the model's device. Raises ValueError if the batch size or the
        precision is invalid. Also raises the errors of `unmasked_sample`."""
        if not isinstance(batch_size, Integral) or batch_size < 1:
            raise ValueError(f"batch_size {batch_size!r}: must be an integer of at least 1")
        if precision not in ("auto", "bf16", "fp32"):
            raise ValueError(f"precision {precision!r}: must be auto, bf16 or fp32")
        device = self.encoder_input.cls_token.device

        def sample(number: int) -> Sample:
            image = None if images is None else images[number]
            text = None if texts is None else texts[number]
            return unmasked_sample(number, image, text, self.config, self.tokenizer, value_range)

        count = len(images if images is not None else texts or [])
        starts = range(0, count, batch_size)
        return (
            _untraced(pack)([sample(i) for i in range(start, min(start + batch_size, count))], self.geometry).to(device)
            for start in starts
        )

    def require_tokenizer(self) -> None:
        """Raise UserError if the model does not accept text."""
        if not self.config.vocab_size:
            raise UserError("the model is image-only (vocab_size 0) and does not accept captions; pass only images")
        if self.tokenizer is None:
            raise UserError(
                "the model has no tokenizer: set the tokenizer with which it was trained (data.tokenizer, "
                "M3AE.tokenizer)"
            )

    def representation(
        self,
        images: Tensor | None = None,
        text: Tensor | None = None,
        padding_mask: Tensor | None = None,
        *,
        value_range: ValueRange = None,
    ) -> Tensor:
        """Return the encoder's output on unmasked input, which serves as features for downstream tasks. Differentiable.

        Args:
            images: [S, C, H, W] of the model's size, uint8, uint16 or floating-point; or None.
            text: int [S, n] token ids, n <= text_length; or None.
            padding_mask: [S, n], nonzero for padding in `text`; None: no padding.
            value_range: value range of floating-point images, as in `encode`: already normalised, or (black, white).

        Returns:
            [S, 1 + L + n, D], in the dtype of the weights unless autocast is enabled: the cls token, the patches (if
                there are images) and the text tokens (if there is text). The rows of padding are 0.

        Raises:
            TypeError: an argument is not a tensor.
            ValueError: images and text are both None or empty, batch sizes differ, padding precedes tokens, a size does
                not fit the model, floating-point images evidently contradict value_range, or `text` has ids outside the
                vocabulary.
        """
        if images is None and text is None:
            raise ValueError("representation requires images, text or both")
        for name, given in {"images": images, "text": text, "padding_mask": padding_mask}.items():
            if given is not None and not isinstance(given, Tensor):
                advice = "; encode accepts arrays, PIL images and files" if name == "images" else ""
                raise TypeError(f"representation: {name} must be a tensor, not {type(given).__name__}{advice}")
        size = len(images) if images is not None else len(text if text is not None else ())
        if images is not None and text is not None and len(text) != size:
            raise ValueError(f"batch sizes differ: {size} images but {len(text)} texts")
        if not size:
            raise ValueError("representation requires at least one image or text, but the batch is empty")
        if text is not None:
            self._check_ids(text, padding_mask)
        if images is not None and images.is_floating_point():
            _untraced(check_values)([images], value_range, self.config)
            if value_range is not None and not isinstance(value_range, str):
                images = from_unit(in_unit(images, value_range), self.config.image_mean, self.config.image_std)
        lengths = [math.prod(self.geometry.grid(image)) for image in images] if images is not None else [0] * size
        samples, real_rows = [], []
        for i in range(size):
            sample = Sample(key=str(i))
            real = torch.ones(1 + lengths[i], dtype=torch.bool)
            if images is not None:
                sample.image, sample.image_mask = images[i], torch.zeros(lengths[i], dtype=torch.bool)
            if text is not None:
                valid = torch.ones(text.shape[1], dtype=torch.bool)
                if padding_mask is not None:
                    valid = padding_mask[i].cpu() == 0
                if valid.sort(descending=True).values.ne(valid).any():
                    raise ValueError(f"text {i}: padding must follow the text tokens")
                sample.tokens = text[i].cpu()[valid]
                sample.text_mask = torch.zeros(len(sample.tokens), dtype=torch.bool)
                real = torch.cat((real, valid))
            samples.append(sample)
            real_rows.append(real)
        device = self.encoder_input.cls_token.device
        encoded_TD = self.forward_encoder(_untraced(pack)(samples, self.geometry).to(device))
        flat = torch.stack(real_rows).flatten().nonzero()[:, 0].to(device)
        out = encoded_TD.new_zeros(size * len(real_rows[0]), encoded_TD.shape[1]).index_copy(0, flat, encoded_TD)
        return out.unflatten(0, (size, -1))

    def _check_ids(self, text: Tensor, padding_mask: Tensor | None) -> None:
        """Raise ValueError if a token other than padding has no embedding, or if the mask does not fit the text."""
        if text.ndim != 2 or text.is_floating_point():
            raise ValueError(f"text must be integers [samples, tokens], but is {text.dtype} {list(text.shape)}")
        if padding_mask is not None and padding_mask.shape != text.shape:
            raise ValueError(
                f"padding_mask must have the shape of text, {list(text.shape)}, but has {list(padding_mask.shape)}"
            )
        ids = text if padding_mask is None else text[padding_mask.to(text.device) == 0]
        low, high = (int(ids.min()), int(ids.max())) if ids.numel() else (0, -1)
        if low < 0 or high >= self.config.vocab_size:
            raise ValueError(f"text has ids from {low} to {high}, but the model has {self.config.vocab_size:,} tokens")
