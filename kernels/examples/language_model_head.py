"""Fuse the head of a Hugging Face language model with its loss, so that logits are not stored.

    pip install transformers
    python kernels/examples/language_model_head.py

`MaskedTokenLoss.from_linear(model.lm_head)` shares the head's parameters, so checkpoints, tied embeddings and
optimisers are not affected. The targets are those of a causal language model: the next token, or -100 if there is none.
This example uses random weights; `AutoModelForCausalLM.from_pretrained(...)` works in the same way if the logits are
the plain output of the head.
"""

import torch
from m3ae_kernels import MaskedTokenLoss
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM


def fused_loss(model: nn.Module, head: MaskedTokenLoss, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean loss over the next tokens, and the fraction of them that are predicted correctly. `tokens`,
    `labels`: int [B, L]."""
    hidden_BLD = model.model(input_ids=tokens).last_hidden_state
    next_BL = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    loss, correct = head(hidden_BLD, next_BL, return_correct=True)
    return loss, correct.sum() / (next_BL != -100).sum()


def main() -> tuple[float, float]:
    """Print and return the losses of the original model and of the fused model."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    head = MaskedTokenLoss.from_linear(model.lm_head)
    tokens = torch.randint(0, 4096, (4, 48))
    labels = tokens.masked_fill(torch.rand(4, 48) < 0.2, -100)
    plain = model(input_ids=tokens, labels=labels).loss
    fused, right = fused_loss(model, head, tokens, labels)
    theirs, ours = (torch.autograd.grad(loss, list(model.parameters())) for loss in (plain, fused))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    print(f"LlamaForCausalLM loss {plain.item():.6f}  fused {fused.item():.6f}  accuracy {right:.1%}, equal gradients")
    return plain.item(), fused.item()


if __name__ == "__main__":
    main()
