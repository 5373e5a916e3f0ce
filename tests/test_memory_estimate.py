"""The estimated memory of a rank, compared with sums computed by hand."""

from types import SimpleNamespace

import pytest
import torch

from m3ae_fast.config import Config, parse
from m3ae_fast.engine import memory_estimate
from m3ae_fast.engine.memory_estimate import (
    activation_bytes,
    lacking_for_activations,
    memory_needed,
    typical_batch,
    zero_bytes,
)
from m3ae_fast.model.m3ae import M3AE
from tests.helpers.trainer import TINY

# 4 of 16 patches and 1 of 5 text tokens are visible: with the cls token, 6 encoder rows and 22 decoder rows
SIZES = {"emb_dim": 32, "dec_emb_dim": 48, "depth": 3, "dec_depth": 2}
BLOCKS = 3 * 6 * 32 + 2 * 22 * 48
KEPT = 8 + 2 * 4  # values that a block keeps for a row, divided by the width; the MLP is four times as wide


def config(stage=None, **train) -> Config:
    zero = None if stage is None else {"zero_optimization": {"stage": stage}}
    data = {"model": TINY["model"] | SIZES, "train": TINY["train"] | train, "deepspeed": zero}
    return parse(Config, TINY | data, "test")


@pytest.mark.parametrize(
    # each: (bytes per parameter, whether ranks partition them) of the weights, the gradients and the optimiser state
    ("stage", "bf16", "each"),
    [
        (0, True, ((4, False), (4, False), (8, False))),
        (1, True, ((2, False), (4, False), (12, True))),
        (2, True, ((2, False), (4, True), (12, True))),
        (3, True, ((2, True), (4, True), (12, True))),
        (0, False, ((4, False), (4, False), (8, False))),
        (1, False, ((4, False), (4, False), (8, True))),
        (2, False, ((4, False), (4, True), (8, True))),
        (3, False, ((4, True), (4, True), (8, True))),
    ],
)
def test_each_zero_stage_partitions_the_documented_state(stage, bf16, each):
    weights, *others = (1000 * size / (4 if shared else 1) for size, shared in each)
    if stage == 3:
        weights += 1000 * each[0][0]  # the weights remain gathered between the passes
    assert zero_bytes(1000, stage, 4, bf16) == (weights, *others)


def test_stage_3_keeps_at_most_half_a_billion_weights_gathered():
    """tests/test_network_traffic.py counts the weights that remain gathered."""
    for parameters, kept in ((10**8, 10**8), (10**9, 5 * 10**8)):
        assert zero_bytes(parameters, 3, 8, True)[0] == 2 * (parameters / 8 + kept)
        assert zero_bytes(parameters, 3, 1, True)[0] == 2 * parameters


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activation_memory_follows_from_the_rows_of_encoder_and_decoder(precision, checkpointing):
    found = config(precision=precision, activation_checkpointing=checkpointing)
    batch = typical_batch(found, M3AE(found.model))
    assert (batch.encoder.rows, batch.decoder.rows) == (6, 22)
    rows = 1 if checkpointing else KEPT
    assert activation_bytes(found, batch) == (2 if precision == "bf16" else 4) * rows * BLOCKS


@pytest.mark.parametrize(("checkpointing", "row", "query"), [(False, KEPT, KEPT - 2), (True, 1, 1)])
def test_a_decoder_with_cross_attention_stores_keys_and_values_of_the_encoder_rows(checkpointing, row, query):
    """The decoder has only the predicted rows: 6 of the 12 masked patches, and 2 of the 4 masked tokens."""
    found = config(activation_checkpointing=checkpointing)
    model = found.model.model_copy(update={"dec_attention": "cross"})
    masking = found.masking.model_copy(update={"image_predicted": 0.5, "text_predicted": 0.5})
    found = found.model_copy(update={"model": model, "masking": masking})
    batch = typical_batch(found, M3AE(model))
    assert (batch.encoder.rows, batch.decoder.rows) == (6, 8)
    assert activation_bytes(found, batch) == 4 * (row * 3 * 6 * 32 + query * 2 * 8 * 48 + 2 * 2 * 6 * 48)


@pytest.mark.parametrize("stage", [None, 3])
@pytest.mark.parametrize(("micro", "samples", "at_once"), [(4, 9, 4), (4, 3, 3), (None, 9, 9)])
def test_the_memory_estimate_of_a_rank_includes_its_state_partition_and_activations(stage, micro, samples, at_once):
    found = config(stage, micro_batch=micro)
    parameters = sum(p.numel() for p in M3AE(found.model).parameters())
    state = parameters * ((4 + 4 + 8) if stage is None else (4 + 4 + 8) / 5 + 4)
    assert memory_needed(found, 5, samples) == state + at_once * 4 * KEPT * BLOCKS


def test_the_memory_estimate_covers_native_images_and_image_only_models():
    native = config()
    native = native.model_copy(
        update={"model": native.model.model_copy(update={"resize": "native", "max_patches": 30})}
    )
    model = M3AE(native.model)
    assert typical_batch(native, model).grids == [(5, 5)]  # the largest square grid of at most 30 patches
    alone = native.model_copy(update={"model": config().model.model_copy(update={"vocab_size": 0})})
    assert typical_batch(alone, M3AE(alone.model)).decoder.rows == 1 + 16


def test_a_memory_shortfall_of_one_rank_is_reported_on_all(monkeypatch):
    """All three ranks report the first rank that lacks memory."""
    free = ["", "8 GB are needed, and 7 GB are free", "8 GB are needed, and 6 GB are free"]
    asked = []
    for own in free:
        monkeypatch.setattr(
            memory_estimate, "missing_memory", lambda needed, device, own=own: asked.append(needed) or own
        )
        ranks = SimpleNamespace(world=3, device=torch.device("cpu"), gather=lambda own: free)
        assert lacking_for_activations(config(), ranks, 4) == free[1]
    assert asked == [memory_needed(config(), 3, 4)] * 3
    ranks.gather = lambda own: [""] * 3
    assert lacking_for_activations(config(), ranks, 4) == ""


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_memory_estimate_decides_on_recomputation_only_for_compiled_blocks_without_checkpointing(
    compiled, checkpointing
):
    train = config(compile=compiled, activation_checkpointing=checkpointing).train
    assert memory_estimate.recomputes(train) == (compiled and not checkpointing)
