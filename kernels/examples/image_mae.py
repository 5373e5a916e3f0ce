"""A plain image MAE (He et al., arXiv 2111.06377) that uses `PatchEmbed` and `MaskedPixelLoss`.

    python kernels/examples/image_mae.py [--steps 300]

Everything between the two ops is ordinary torch code on batches. The images stay uint8, and no tensors of patches,
targets or predictions are stored. The example trains on synthetic images, which takes seconds on a CPU. If there is a
GPU, it is used instead.

Shapes: B images, L patches per image, V visible patches per image, D width.
"""

import argparse

import torch
from m3ae_kernels import MaskedPixelLoss, PatchEmbed
from torch import Tensor, nn

SIDE, PATCH, MASK_RATIO = 64, 8, 0.75
GRID = SIDE // PATCH
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


class ImageMAE(nn.Module):
    """An MAE: encoder over the visible patches, decoder over all patches, pixel loss on the masked patches."""

    def __init__(self, dim: int = 96, depth: int = 3, heads: int = 3) -> None:
        super().__init__()
        self.embed = PatchEmbed(dim, patch_size=PATCH, mean=MEAN, std=STD)
        self.positions = nn.Parameter(0.5 * torch.randn(GRID**2, dim))
        self.mask_token = nn.Parameter(0.02 * torch.randn(dim))
        self.decoder_positions = nn.Parameter(0.5 * torch.randn(GRID**2, dim))
        self.encoder, self.decoder = _transformer(dim, depth, heads), _transformer(dim, 1, heads)
        self.loss = MaskedPixelLoss(dim, patch_size=PATCH, mean=MEAN, std=STD)

    def forward(self, images: Tensor) -> Tensor:
        """Return the scalar loss of images [B, 3, 64, 64] uint8."""
        batch, count = len(images), GRID**2
        visible = round(count * (1 - MASK_RATIO))
        order_BL = torch.rand(batch, count, device=images.device).argsort(1)
        ids_BL = order_BL + torch.arange(batch, device=images.device)[:, None] * count
        patches = self.embed(images, ids_BL[:, :visible].flatten())
        x_BVD = self.encoder(patches.view(batch, visible, -1) + self.positions[order_BL[:, :visible]])
        masked_BMD = self.mask_token.expand(batch, count - visible, -1)
        y_BLD = self.decoder(torch.cat((x_BVD, masked_BMD), 1) + self.decoder_positions[order_BL])
        return self.loss(y_BLD[:, visible:].flatten(0, 1), images, ids_BL[:, visible:].flatten())


def _transformer(dim: int, depth: int, heads: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(dim, heads, 4 * dim, 0.0, "gelu", batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, depth, nn.LayerNorm(dim), enable_nested_tensor=False)


def ramps(count: int, device: torch.device) -> Tensor:
    """Return images [count, 3, 64, 64] uint8 of smooth colour ramps. A quarter of the patches is enough to predict the
    others."""
    line = torch.linspace(-1, 1, SIDE, device=device)
    frequency = torch.randn(count, 3, 2, 1, 1, device=device)
    waves = torch.sin(frequency[:, :, 0] * line[:, None] + frequency[:, :, 1] * line)
    return ((waves + 1) * 127.5).to(torch.uint8)


def main(arguments: list[str] | None = None) -> list[float]:
    """Train the model, and print and return the losses."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=300, help="number of training steps (default: 300)")
    parser.add_argument("--batch", type=int, default=32, help="number of images per step (default: 32)")
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = ImageMAE().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.05)
    losses = []
    for step in range(args.steps):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = model(ramps(args.batch, device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 20 == 0 or step == args.steps - 1:
            print(f"step {step:4}  loss {losses[-1]:.4f}", flush=True)
    return losses


if __name__ == "__main__":
    main()
