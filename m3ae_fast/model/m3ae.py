"""M3AE (arXiv 2205.14204): one ViT encoder over visible patches and visible text, a light decoder, two losses.

Shapes: T encoder rows, U decoder rows, M rows that carry loss (I patches, W text tokens), N visible patches,
D encoder width, E decoder width, L patches a picture, V vocabulary, S samples, B pictures.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from m3ae_kernels import MaskedPixelLoss, MaskedTokenLoss, PatchEmbed, scatter_tokens
from torch import Tensor, nn

from m3ae_fast.config import LossConfig, ModelConfig
from m3ae_fast.model.batch import LossCounts, PackedBatch
from m3ae_fast.model.packing import Geometry, Sample, pack
from m3ae_fast.model.positions import Positions
from m3ae_fast.model.pretrained import load_weights, read_pretrained, write_pretrained
from m3ae_fast.model.transformer import EPS, Transformer


class Losses(NamedTuple):
    """0-d float32 tensors; `loss` is what to differentiate, the others are detached.

    A tuple, since DeepSpeed finds what it differentiates in tuples, lists and dicts alone.
    """

    loss: Tensor
    image_loss: Tensor
    text_loss: Tensor
    text_accuracy: Tensor


class EncoderInput(nn.Module):
    """Patch embeddings, words and cls tokens -> encoder rows, with positions and types."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim = config.emb_dim
        self.cls_token = nn.Parameter(torch.empty(1, dim))
        self.image_type = nn.Parameter(torch.empty(1, dim)) if config.use_type_embedding else None
        self.text_type = nn.Parameter(torch.empty(1, dim)) if config.use_type_embedding and config.vocab_size else None
        self.text_embedding = nn.Parameter(torch.empty(config.vocab_size, dim)) if config.vocab_size else None
        self.positions = Positions(config, dim)

    def forward(self, patches_ND: Tensor, batch: PackedBatch) -> Tensor:
        table = torch.cat((self.cls_token, *self.positions(self.image_type, self.text_type)))
        words_VD = table[:0] if self.text_embedding is None else self.text_embedding
        return scatter_tokens(patches_ND, batch.encoder_src, words_VD, batch.token_ids, table, batch.encoder_table_ids)


class DecoderInput(nn.Module):
    """Encoder rows -> decoder rows: projection, un-shuffle, mask embeddings, positions and types."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim = config.dec_emb_dim
        self.proj = nn.Linear(config.emb_dim, dim)
        self.unshuffle = Unshuffle(config, dim)

    def forward(self, encoded_TD: Tensor, batch: PackedBatch) -> Tensor:
        return self.unshuffle(self.proj(encoded_TD), batch)


class Unshuffle(nn.Module):
    def __init__(self, config: ModelConfig, dim: int) -> None:
        super().__init__()
        self.image_mask = nn.Parameter(torch.empty(1, dim))
        self.text_mask = nn.Parameter(torch.empty(1, dim)) if config.vocab_size else None
        self.image_type = nn.Parameter(torch.empty(1, dim)) if config.use_type_embedding else None
        self.text_type = nn.Parameter(torch.empty(1, dim)) if config.use_type_embedding and config.vocab_size else None
        self.positions = Positions(config, dim)

    def forward(self, x_TE: Tensor, batch: PackedBatch) -> Tensor:
        masks = self.image_mask if self.text_mask is None else torch.cat((self.image_mask, self.text_mask))
        table = torch.cat(self.positions(self.image_type, self.text_type))
        return scatter_tokens(x_TE, batch.decoder_src, masks, batch.mask_ids, table, batch.decoder_table_ids)


class HeadMLP(nn.Module):
    """The hidden layers of an output head: LayerNorm, then (Linear, GELU, LayerNorm), residual from the second on."""

    def __init__(self, dim: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(dim, dim) for _ in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(dim, eps=EPS) for _ in range(depth + 1 if depth else 0))

    def forward(self, x: Tensor) -> Tensor:
        if not self.layers:
            return x
        x = self.norms[0](x)
        for i, (layer, norm) in enumerate(zip(self.layers, self.norms[1:])):
            y = norm(F.gelu(layer(x), approximate="tanh"))
            x = x + y if i else y
        return x


class M3AE(nn.Module):
    """The model and its loss. `forward(batch)` takes a PackedBatch and returns Losses."""

    def __init__(self, config: ModelConfig, loss: LossConfig | None = None) -> None:
        super().__init__()
        self.config, self.loss_config = config, loss or LossConfig()
        pixels = {
            "patch_size": config.patch_size,
            "channels": config.channels,
            "mean": config.image_mean,
            "std": config.image_std,
        }
        drops = {"drop": config.drop, "att_drop": config.att_drop, "drop_path": config.drop_path}
        mlp_ratio, head_depth, width = config.mlp_ratio, config.output_head_depth, config.dec_emb_dim

        self.patch_embed = PatchEmbed(config.emb_dim, **pixels)
        self.encoder_input = EncoderInput(config)
        self.encoder = Transformer(config.emb_dim, config.depth, config.num_heads, mlp_ratio, **drops)
        self.decoder_input = DecoderInput(config)
        self.decoder = Transformer(width, config.dec_depth, config.dec_num_heads, mlp_ratio, **drops)
        self.image_mlp = HeadMLP(width, head_depth)
        self.image_head: MaskedPixelLoss | MaskedTokenLoss
        if config.image_targets == "vqgan":
            self.image_head = MaskedTokenLoss(width, config.codebook_size)
        else:
            self.image_head = MaskedPixelLoss(width, **pixels, norm_pix=self.loss_config.norm_pix)
        self.text_mlp = HeadMLP(width, head_depth) if config.vocab_size else None
        self.text_head = MaskedTokenLoss(width, config.vocab_size) if config.vocab_size else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The official initialisation: Xavier-uniform matmuls, N(0, 1) words, N(0, 0.02) other embeddings."""
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
        c, loss = self.config, self.loss_config
        return Geometry(
            c.image_size, c.patch_size, c.channels, c.text_length, loss.image_all_tokens, loss.text_all_tokens
        )

    def encode(self, batch: PackedBatch) -> Tensor:
        """[T, D] encoder rows after the final LayerNorm."""
        patches_ND = self.patch_embed(batch.images, batch.patch_ids)
        x_TD = self.encoder(self.encoder_input(patches_ND, batch), batch.encoder)
        return self.encoder.norm(x_TD)

    def decode(self, encoded_TD: Tensor, batch: PackedBatch) -> tuple[Tensor, Tensor | None]:
        """Hidden rows of the two heads, [I, E] and [W, E]: only rows that carry loss are finished."""
        x_UE = self.decoder_input(encoded_TD, batch)
        x_ME = self.decoder(x_UE, batch.decoder, batch.loss_rows, batch.loss)
        hidden_IE = self.image_mlp(self.decoder.norm(x_ME, batch.image_rows))
        hidden_WE = self.text_mlp(self.decoder.norm(x_ME, batch.text_rows)) if self.text_mlp else None
        return hidden_IE, hidden_WE

    def forward(self, batch: PackedBatch, counts: LossCounts | None = None) -> Losses:
        """Losses of a packed batch. A modality that the batch lacks has loss 0 and zero gradients.

        Args:
            batch: on the model's device.
            counts: pictures and captions that the losses are means over: of a whole step, per rank, where the batch is
                a part of it. None: those of the batch.
        """
        images, captions = (count or 1.0 for count in counts or batch.counts)
        hidden_IE, hidden_WE = self.decode(self.encode(batch), batch)
        image_loss = self._image_loss(hidden_IE, batch) / images
        text_loss = text_accuracy = torch.zeros_like(image_loss)
        if self.text_head is not None:
            text_sum, correct_W = self.text_head(hidden_WE, batch.text_targets, batch.text_row_weight)
            text_loss = text_sum / captions
            text_accuracy = (correct_W * batch.text_row_share).sum() / captions
        loss = self.loss_config.image_weight * image_loss + self.loss_config.text_weight * text_loss
        return Losses(loss, image_loss.detach(), text_loss.detach(), text_accuracy)

    def _image_loss(self, hidden_IE: Tensor, batch: PackedBatch) -> Tensor:
        if isinstance(self.image_head, MaskedTokenLoss):
            return self.image_head(hidden_IE, batch.image_targets, batch.image_row_weight)[0]
        return self.image_head(hidden_IE, batch.images, batch.image_patch_ids, batch.image_row_weight)

    @torch.no_grad()
    def predict(self, batch: PackedBatch) -> tuple[Tensor, Tensor | None]:
        """Of the rows that carry loss: normalised pixels [I, P*P*C], or logits [I, codebook] of image ids, and logits
        [W, V]."""
        hidden_IE, hidden_WE = self.decode(self.encode(batch), batch)
        return self.image_head.predict(hidden_IE), self.text_head.predict(hidden_WE) if self.text_head else None

    def representation(
        self, images: Tensor | None = None, text: Tensor | None = None, padding_mask: Tensor | None = None
    ) -> Tensor:
        """Encoder output on unmasked input: the features for downstream work. Differentiable.

        Args:
            images: [S, C, H, W], uint8, or floating and already normalised; or None.
            text: int [S, n] token ids, n <= text_length; or None.
            padding_mask: [S, n], nonzero where `text` is padding; None: no padding.

        Returns:
            [S, 1 + L + n, D]: cls token, patches (where there are images), text (where there is text); padding is 0.

        Raises:
            ValueError: both are None, batch sizes differ, padding precedes words, or a size does not fit the model.
        """
        if images is None and text is None:
            raise ValueError("representation needs images, text or both")
        size = len(text if images is None else images)
        if images is not None and text is not None and len(text) != size:
            raise ValueError(f"{size} images and {len(text)} texts")
        lengths = [self.config.patches_per_image if images is not None else 0] * size
        samples, places = [], []
        for i in range(size):
            sample = Sample(key=str(i))
            place = torch.ones(1 + lengths[i], dtype=torch.bool)
            if images is not None:
                sample.image, sample.image_mask = images[i], torch.zeros(lengths[i], dtype=torch.bool)
            if text is not None:
                valid = torch.ones(text.shape[1], dtype=torch.bool)
                if padding_mask is not None:
                    valid = padding_mask[i].cpu() == 0
                if valid.sort(descending=True).values.ne(valid).any():
                    raise ValueError(f"text {i}: padding must follow the words")
                sample.tokens = text[i].cpu()[valid]
                sample.text_mask = torch.zeros(len(sample.tokens), dtype=torch.bool)
                place = torch.cat((place, valid))
            samples.append(sample)
            places.append(place)
        device = self.encoder_input.cls_token.device
        encoded_TD = self.encode(pack(samples, self.geometry).to(device))
        flat = torch.stack(places).flatten().nonzero()[:, 0].to(device)
        out = encoded_TD.new_zeros(size * len(places[0]), encoded_TD.shape[1]).index_copy(0, flat, encoded_TD)
        return out.unflatten(0, (size, -1))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors (the weights as they are) into `folder`."""
        write_pretrained(folder, self.config, self.state_dict())

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> M3AE:
        """Load what `save_pretrained` or `python -m m3ae_fast.export` wrote.

        Raises:
            UserError: a file is missing, damaged or does not fit the other.
        """
        config, state = read_pretrained(folder)
        model = cls(config)
        load_weights(model, state, str(folder))
        return model
