"""A masked language model that uses `MaskedTokenLoss`, with a head that is tied to the embedding.

    python kernels/examples/masked_language_model.py [--steps 300]

As usual, targets are -100 for tokens that are not masked. Logits are kept in memory for only a few tokens at a time.
The model learns to complete synthetic sentences, which takes seconds on a CPU. If there is a GPU, it is used instead.

Shapes: B sentences, L words each, D width, V vocabulary.
"""

import argparse

import torch
from m3ae_kernels import MaskedTokenLoss
from torch import Tensor, nn

LENGTH, VOCAB, MASK = 24, 1000, 0  # word 0 is the mask
MASK_RATIO, IGNORED = 0.25, -100


class MaskedLanguageModel(nn.Module):
    """A masked language model: embedding, encoder, and the loss on the masked words."""

    def __init__(self, dim: int = 96, depth: int = 2, heads: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, dim)
        nn.init.normal_(self.embedding.weight, std=dim**-0.5)
        self.positions = nn.Parameter(0.02 * torch.randn(LENGTH, dim))
        layer = nn.TransformerEncoderLayer(dim, heads, 4 * dim, 0.0, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, nn.LayerNorm(dim), enable_nested_tensor=False)
        self.head = MaskedTokenLoss(dim, VOCAB)
        self.head.weight = self.embedding.weight

    def forward(self, words: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean loss over the masked words, and the fraction of them that are predicted correctly. `words`:
        int [B, L]."""
        masked_BL = torch.rand(words.shape, device=words.device) < MASK_RATIO
        x_BLD = self.encoder(self.embedding(words.masked_fill(masked_BL, MASK)) + self.positions)
        targets = words.masked_fill(~masked_BL, IGNORED).flatten()
        loss, correct = self.head(x_BLD.flatten(0, 1), targets, return_correct=True)
        return loss, correct.sum() / masked_BL.sum()


def sentences(count: int, device: torch.device) -> Tensor:
    """Return sentences [count, L] in which three words are repeated, so that a masked word can be inferred from the
    others."""
    return torch.randint(1, VOCAB, (count, 3), device=device).repeat(1, LENGTH // 3)


def main(arguments: list[str] | None = None) -> list[float]:
    """Train the model, and print and return the losses."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=300, help="number of training steps (default: 300)")
    parser.add_argument("--batch", type=int, default=64, help="number of sentences per step (default: 64)")
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = MaskedLanguageModel().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.01)
    losses = []
    for step in range(args.steps):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss, accuracy = model(sentences(args.batch, device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 20 == 0 or step == args.steps - 1:
            print(f"step {step:4}  loss {losses[-1]:.4f}  accuracy {accuracy:.1%}", flush=True)
    return losses


if __name__ == "__main__":
    main()
