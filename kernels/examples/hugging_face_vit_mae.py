"""A ViT-MAE of Hugging Face's transformers, its patch embedding and loss replaced, with equal losses.

    pip install transformers
    python kernels/examples/hugging_face_vit_mae.py

`FusedViTMAE` takes uint8 images: what the image processor would normalise, patchify, predict and compare in memory is
done inside two ops. Weights are random here; `ViTMAEForPreTraining.from_pretrained(...)` works as well.
Shapes: B images, L patches per image, D width.
"""

import torch
from m3ae_kernels import MaskedPixelLoss, PatchEmbed, gather_tokens
from torch import Tensor, nn
from transformers import ViTMAEConfig, ViTMAEForPreTraining

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # what its image processor takes: ImageNet's


class AllPatches(PatchEmbed):
    """Every patch of the images, in the layout of a convolution's output: [B, D, L]."""

    def forward(self, images: Tensor) -> Tensor:
        count = images[:, 0].numel() // self.patch_size**2
        embedded = super().forward(images, torch.arange(count, device=images.device))
        return embedded.unflatten(0, (len(images), -1)).transpose(1, 2)


class FusedViTMAE(nn.Module):
    """The model's encoder and decoder, as they are, between two fused ops."""

    def __init__(self, model: ViTMAEForPreTraining, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.vit, self.decoder = model.vit, model.decoder
        options = {"patch_size": model.config.patch_size, "mean": mean, "std": std}
        patches = self.vit.embeddings.patch_embeddings
        patches.projection = AllPatches.from_conv(patches.projection, mean=mean, std=std)
        self.loss = MaskedPixelLoss.from_linear(
            self.decoder.decoder_pred, **options, norm_pix=model.config.norm_pix_loss, reduction="mean"
        )
        self.decoder.decoder_pred = nn.Identity()

    def forward(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Map images [B, 3, H, W] uint8 -> the mean loss over masked patches."""
        encoded = self.vit(images, noise=noise)
        hidden_BLD = self.decoder(encoded.last_hidden_state, encoded.ids_restore).logits
        rows = encoded.mask.flatten().nonzero()[:, 0]  # masked patches: rows of the batch, and their own targets
        return self.loss(gather_tokens(hidden_BLD.flatten(0, 1), rows), images, rows)


def main() -> tuple[float, float]:
    """Print and return the losses of the model and of its fused form."""
    torch.manual_seed(0)
    config = ViTMAEConfig(
        image_size=64, patch_size=8, hidden_size=96, num_hidden_layers=2, num_attention_heads=3, intermediate_size=384,
        decoder_hidden_size=48, decoder_num_hidden_layers=1, decoder_num_attention_heads=3,
        decoder_intermediate_size=192, norm_pix_loss=True,
    )  # fmt: skip
    model = ViTMAEForPreTraining(config).eval()
    images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    noise = torch.rand(4, 64)  # fixes the masks
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    plain = model((images / 255 - mean) / std, noise=noise).loss
    fused = FusedViTMAE(model, MEAN, STD)(images, noise)
    fused.backward()
    print(f"ViTMAEForPreTraining {plain.item():.6f}  fused {fused.item():.6f}")
    return plain.item(), fused.item()


if __name__ == "__main__":
    main()
