"""A custom classifier with a pre-trained encoder, trained by a plain torch loop.

    python examples/classifier.py MODEL DIR        MODEL: an export, or a name on the Hub; DIR/CLASS/NAME.jpg

Shapes: B images, L patches, D encoder width, K classes.
"""

import argparse
import time
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, random_split
from torchvision.datasets import ImageFolder

from m3ae_fast.batch.inputs import prepare_image
from m3ae_fast.model import M3AE


class ImageClassifier(nn.Module):
    """A linear layer on the mean of the encoder's patch tokens."""

    def __init__(self, m3ae: M3AE, classes: int) -> None:
        super().__init__()
        self.m3ae = m3ae
        self.head = nn.Sequential(nn.LayerNorm(m3ae.config.emb_dim), nn.Linear(m3ae.config.emb_dim, classes))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Return the logits [B, K] of uint8 images [B, C, image_size, image_size], which the encoder normalises."""
        tokens = self.m3ae.representation(images_BCHW)  # [B, 1 + L, D], the cls token first
        return self.head(tokens[:, 1:].mean(1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="an export folder, or a name on the Hugging Face Hub")
    parser.add_argument("images", help="folder with a sub-folder of images for each class")
    parser.add_argument("--epochs", type=int, default=10, help="passes over the training images (default: 10)")
    parser.add_argument("--minutes", type=float, default=5, help="time limit of the training in minutes (default: 5)")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate of the head (default: 0.001)")
    parser.add_argument("--batch", type=int, default=32, help="number of images per step (default: 32)")
    args = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    m3ae = M3AE.from_pretrained(args.model)
    # images are read as for training: EXIF orientation applied, transparent parts white, central square
    dataset = ImageFolder(args.images, loader=partial(prepare_image, config=m3ae.config))
    train, val = random_split(dataset, [0.8, 0.2])
    model = ImageClassifier(m3ae, len(dataset.classes)).to(device)

    # the learning rate of the encoder is a tenth of that of the new head; the decoder is not used
    encoder = [p for part in (m3ae.patch_embed, m3ae.encoder_input, m3ae.encoder) for p in part.parameters()]
    groups = [{"params": model.head.parameters()}, {"params": encoder, "lr": args.lr / 10}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, weight_decay=0.05)
    batches = DataLoader(train, args.batch, shuffle=True, drop_last=True)
    started, shown = time.monotonic(), 0.0
    for epoch in range(args.epochs):
        model.train()
        for number, (images, labels) in enumerate(batches, 1):
            loss = F.cross_entropy(model(images.to(device)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            minutes = (time.monotonic() - started) / 60
            if minutes > shown + 0.1 or minutes > args.minutes:
                shown = minutes
                where = f"epoch {epoch + 1}, step {number} of {len(batches)}"
                print(f"{where}, {minutes:.1f} min: loss is {loss:.3f}", flush=True)
            if minutes > args.minutes:
                break
        model.eval()
        with torch.no_grad():
            right = [(model(x.to(device)).argmax(1).cpu() == y).sum() for x, y in DataLoader(val, args.batch)]
        print(f"epoch {epoch + 1}  loss {loss:.3f}  held-out accuracy {sum(right) / len(val):.1%}", flush=True)
        if minutes > args.minutes:
            print(f"stopped after --minutes {args.minutes:g}")
            break


if __name__ == "__main__":
    main()
