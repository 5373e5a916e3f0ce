"""The benchmarks compare like with like."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # pytest has no reason to look for benchmarks/ by itself

from benchmarks.reference import ReferenceM3AE
from benchmarks.workload import make_batch, make_config
from m3ae_fast.config import ModelConfig
from m3ae_fast.model.m3ae import M3AE

TINY = ModelConfig(
    size=None, emb_dim=24, depth=2, num_heads=2, dec_emb_dim=16, dec_depth=2, dec_num_heads=2,
    image_size=32, patch_size=8, text_length=12, vocab_size=50,
)  # fmt: skip


@pytest.mark.parametrize("expert", [False, True])
def test_references_do_the_engines_work(expert):
    """Same parameters, samples and masks: same loss and gradients."""
    config = make_config(TINY, samples=5)
    torch.manual_seed(0)
    model = M3AE(config.model, config.loss)
    reference = ReferenceM3AE(config.model, config.masking, config.loss, expert=expert)
    reference.load_state_dict(model.state_dict())
    packed, padded = make_batch(config, 5, words=(1, 12))
    loss, expected = model(packed).loss, reference(padded)
    torch.testing.assert_close(loss, expected, rtol=2e-5, atol=0)
    loss.backward()
    expected.backward()
    grads = {name: p.grad for name, p in reference.named_parameters()}
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, grads[name], rtol=1e-3, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
