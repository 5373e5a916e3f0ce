"""The decoder with cross-attention, and losses on a fraction of the masked tokens."""

import json
from dataclasses import replace
from itertools import accumulate

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from m3ae_kernels.attention import Segments

from m3ae_fast.base.errors import UserError
from m3ae_fast.base.hardware import has_compiler
from m3ae_fast.batch.masking import draw_mask, draw_predicted
from m3ae_fast.batch.packing import Sample, pack
from m3ae_fast.config import Config, LossConfig, ModelConfig, parse
from m3ae_fast.model.cross_decoder import CrossDecoder
from m3ae_fast.model.flops import executed_flops
from m3ae_fast.model.m3ae import M3AE
from m3ae_fast.model.pretrained import load_weights
from m3ae_fast.model.transformer import drop_path_factors
from tests.helpers.trainer import zero

TINY = ModelConfig(
    size=None, emb_dim=32, depth=2, num_heads=2, dec_emb_dim=16, dec_depth=3, dec_num_heads=2, image_size=32,
    patch_size=8, text_length=12, vocab_size=50, dec_attention="cross",
)  # fmt: skip
SELF = TINY.model_copy(update={"dec_attention": "self"})
KINDS = ["p" * 20 + "iitte", "i", "ttt", "p", "e", ""]


def samples_of(kinds: str, seed: int = 0, fraction: float = 1.0, config: ModelConfig = TINY) -> list[Sample]:
    """Return a sample for each letter of `kinds`: p paired, i image only, t text only, e empty caption."""
    rng = torch.Generator().manual_seed(seed)
    found = []
    for number, kind in enumerate(kinds):
        sample = Sample(f"{number}", loss_weight=0.5 + number % 3, draw=number)
        if kind in "pi":
            patches = config.patches_per_image
            size = (3, config.image_size, config.image_size)
            sample.image = torch.randint(256, size, dtype=torch.uint8, generator=rng)
            sample.image_mask = draw_mask(patches, 0.75, rng)
        if kind in "pte":
            length = 0 if kind == "e" else int(torch.randint(4, 13, (), generator=rng))
            sample.tokens = torch.randint(50, (length,), generator=rng)
            sample.text_mask = draw_mask(12, 0.75, rng)[:length]
        if fraction < 1:
            masks = (sample.image_mask, sample.text_mask)
            sample.image_predicted, sample.text_predicted = (
                None if mask is None else draw_predicted(mask, fraction, rng) for mask in masks
            )
        found.append(sample)
    return found


def make_model(config: ModelConfig = TINY, loss: LossConfig | None = None) -> M3AE:
    torch.manual_seed(0)
    model = M3AE(config, loss).double()
    with torch.no_grad():
        for p in model.parameters():  # also biases, which begin as 0
            p.add_(0.05 * torch.randn_like(p))
    return model


def attend(q_MHd, k_NHd, v_NHd):
    scores = torch.einsum("mhd,nhd->hmn", q_MHd, k_NHd) / q_MHd.shape[-1] ** 0.5
    return torch.einsum("hmn,nhd->mhd", scores.softmax(-1), v_NHd)


def one_sample(model: M3AE, sample: Sample) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the losses of images and text of one sample, each the mean over its predicted tokens. They are computed by
    plain modules, one query at a time, without packed rows or kernels."""
    model, config = model.eval(), model.config
    alone = pack([replace(sample, image_predicted=None, text_predicted=None)], model.geometry)
    encoded_TD = model.forward_encoder(alone)
    memory_TE = F.linear(encoded_TD, model.decoder_input.proj.weight, model.decoder_input.proj.bias)
    into, decoder = model.decoder_input.unshuffle, model.decoder
    positions = [t[0] + t[1] for t in ((into.positions.image, into.image_type), (into.positions.text, into.text_type))]
    kv = F.linear(memory_TE, decoder.kv.weight, decoder.kv.bias).chunk(config.dec_depth, -1)
    losses = []
    for place_LE, mask, mask_E, which in (
        (positions[0], sample.image_mask, into.image_mask, sample.image_predicted),
        (positions[1], sample.text_mask, into.text_mask, sample.text_predicted),
    ):
        wanted = [] if mask is None else (mask if which is None else which).nonzero()[:, 0].tolist()
        terms = []
        for token in wanted:
            x_E = (mask_E[0] + place_LE[token])[None]
            for block, kv_TX in zip(decoder.blocks, kv):
                heads = (-1, config.dec_num_heads, config.dec_emb_dim // config.dec_num_heads)
                k, v = (part.reshape(heads) for part in kv_TX.chunk(2, -1))
                q = block.attn.q(block.norm1(x_E)).reshape(heads)
                x_E = x_E + block.attn.proj(attend(q, k, v).flatten(1))
                hidden = F.gelu(block.mlp.fc1(block.norm2(x_E)), approximate="tanh")
                x_E = x_E + block.mlp.fc2(hidden)
            x_E = F.layer_norm(x_E, x_E.shape[-1:], decoder.norm.weight, decoder.norm.bias, 1e-6)
            if mask_E is into.image_mask:
                P, side = config.patch_size, config.image_size // config.patch_size
                row, column = divmod(token, side)
                patch = sample.image[:, row * P : (row + 1) * P, column * P : (column + 1) * P].double() / 255
                mean, std = (torch.tensor(t).double()[:, None, None] for t in (config.image_mean, config.image_std))
                target = ((patch - mean) / std).permute(1, 2, 0).flatten()
                head = model.image_head
                terms.append((F.linear(x_E[0], head.weight, head.bias) - target).square().mean())
            else:
                head = model.text_head
                logits_1V = F.linear(x_E, head.weight, head.bias)
                terms.append(F.cross_entropy(logits_1V, sample.tokens[token : token + 1]))
        losses.append(torch.stack(terms).mean() if terms else torch.zeros((), dtype=torch.float64))
    return losses[0], losses[1]


@pytest.mark.parametrize("fraction", [1.0, 0.4])
@pytest.mark.parametrize("kinds", ["ppite", "i", "tt"])
def test_losses_and_gradients_equal_those_of_each_query_separately(kinds, fraction):
    model = make_model()
    samples = samples_of(kinds, 1, fraction)
    batch = pack(samples, model.geometry)
    image, text = (sum(s.loss_weight * one_sample(model, s)[i] for s in samples) for i in range(2))
    images, captions = sum(s.image is not None for s in samples), sum(s.tokens is not None for s in samples)
    expected = image / max(images, 1) + 0.5 * text / max(captions, 1)
    wanted = torch.autograd.grad(expected, list(model.parameters()), allow_unused=True)
    loss = model(batch).loss
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-9)  # pixels are normalised in float32
    for (name, p), got, right in zip(model.named_parameters(), found, wanted):
        right = torch.zeros_like(p) if right is None else right
        torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("gelu", ["tanh", "exact"])
def test_cross_attention_blocks_equal_plain_modules(gelu, training):
    """Each sample attends to its own rows, with stochastic depth. One sample has no queries. The epsilon of
    LayerNorm has an effect, because the inputs are small."""
    torch.manual_seed(0)
    keys, queries = [3, 2, 4], [2, 0, 3]
    decoder = CrossDecoder(16, 2, 2, 2.5, gelu=gelu, drop_path=0.5, drop_key=1).double().train(training)
    x_ME, memory_TE = 3e-3 * torch.randn(5, 16).double(), torch.randn(9, 16).double()
    draws = torch.tensor([3, 4, 6], dtype=torch.int32)
    segments = [
        Segments(torch.tensor([0, *accumulate(part)], dtype=torch.int32), max(part), sum(part))
        for part in (keys, queries)
    ]
    found = decoder(x_ME, memory_TE, *segments, draws)
    factors = drop_path_factors(draws, 4, 0.5, 1) if training else torch.ones(4, 3)
    factors = factors.double().repeat_interleave(torch.tensor(queries), 1)[..., None]
    for number, block in enumerate(decoder.blocks):
        kv_TX = F.linear(memory_TE, decoder.kv.weight, decoder.kv.bias)[:, 32 * number : 32 * number + 32]
        k, v = (part.reshape(9, 2, 8).split(keys) for part in kv_TX.chunk(2, -1))
        normed = F.layer_norm(x_ME, (16,), block.norm1.weight, block.norm1.bias, 1e-6)
        q = F.linear(normed, block.attn.q.weight, block.attn.q.bias).reshape(5, 2, 8).split(queries)
        out_ME = torch.cat([attend(*each) for each in zip(q, k, v)]).flatten(1)
        out_ME = F.linear(out_ME, block.attn.proj.weight, block.attn.proj.bias)
        x_ME = x_ME + factors[2 * number] * out_ME
        normed = F.layer_norm(x_ME, (16,), block.norm2.weight, block.norm2.bias, 1e-6)
        hidden = F.linear(normed, block.mlp.fc1.weight, block.mlp.fc1.bias)
        assert hidden.shape == (5, 40)
        hidden = F.gelu(hidden, approximate="none" if gelu == "exact" else "tanh")
        out_ME = F.linear(hidden, block.mlp.fc2.weight, block.mlp.fc2.bias)
        x_ME = x_ME + factors[2 * number + 1] * out_ME
    torch.testing.assert_close(found, x_ME)
    assert not training or len(factors.unique()) == 2


@pytest.mark.parametrize("attention", ["self", "cross"])
@pytest.mark.parametrize("fraction", [1.0, 0.3])
@pytest.mark.parametrize("kinds", KINDS)
def test_padding_to_repeated_shapes_does_not_change_results(kinds, fraction, attention):
    model = make_model(TINY.model_copy(update={"dec_attention": attention, "drop_path": 0.3}))
    results, flops = [], set()
    for repeat in (False, True):
        batch = pack(samples_of(kinds, 2, fraction), model.geometry, repeat_shapes=repeat)
        assert batch.loss.cu_seqlens[-1] == batch.loss.rows == len(batch.loss_rows)
        assert batch.loss.cu_seqlens.diff().max().item() <= batch.loss.max_seqlen if kinds else True
        model.zero_grad()
        losses = model(batch)
        losses.loss.backward()
        results.append((*losses, *[p.grad for p in model.parameters()]))
        flops.add(executed_flops(model.config, batch))
    for got, expected in zip(*results):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    assert len(flops) == 1  # padding is not counted


def test_padding_is_spread_evenly_over_samples():
    """If the padding were added to a single sample, this sample would become much longer. Some kernels pad all samples
    to the length of the longest one, so they would become slower."""
    samples, geometry = samples_of("ppite"), make_model().geometry
    tight, padded = (pack(samples, geometry, repeat_shapes=repeat).loss for repeat in (False, True))
    added = (padded.cu_seqlens.diff()[:5] - tight.cu_seqlens.diff()).tolist()
    assert sum(added) > 5 and max(added) - min(added) <= 1


def test_a_cross_decoder_computes_only_the_predicted_rows():
    geometry = make_model().geometry
    samples = samples_of("ppit", 3, 0.5)
    batch = pack(samples, geometry)
    predicted = [part for s in samples for part in (s.image_predicted, s.text_predicted) if part is not None]
    assert batch.decoder.rows == batch.loss.rows == sum(int(part.sum()) for part in predicted)
    assert (batch.decoder_src == -1).all() and batch.loss_rows.tolist() == list(range(batch.loss.rows))


def test_a_self_attention_decoder_has_no_rows_of_tokens_that_are_not_predicted():
    """The rows of the decoder are cls, the visible tokens and the predicted tokens."""
    samples = samples_of("ppite", 3, 0.5)
    batch = pack(samples, make_model(SELF).geometry)
    rows = zip(samples, batch.decoder_table_ids.split(batch.decoder.cu_seqlens.diff().tolist()), strict=True)
    for sample, found in rows:
        expected = [-1]
        for mask, predicted, first in (
            (sample.image_mask, sample.image_predicted, 0), (sample.text_mask, sample.text_predicted, 16)
        ):  # fmt: skip
            if mask is not None:
                assert mask.sum() > predicted.sum() or not len(mask)
                expected += [first + i for i in range(len(mask)) if predicted[i] or not mask[i]]
        assert found.tolist() == expected
    predicted = [part for s in samples for part in (s.image_predicted, s.text_predicted) if part is not None]
    assert len(batch.loss_rows) == sum(int(part.sum()) for part in predicted) == int((batch.mask_ids >= 0).sum())


@pytest.mark.parametrize("attention", ["self", "cross"])
def test_predicting_all_masked_tokens_equals_the_default(attention):
    model = make_model(TINY.model_copy(update={"dec_attention": attention}))
    plain, chosen = samples_of("ppit"), samples_of("ppit")
    for sample in chosen:
        sample.image_predicted, sample.text_predicted = sample.image_mask, sample.text_mask
    losses = [model(pack(samples, model.geometry)).loss for samples in (plain, chosen)]
    assert torch.equal(*losses)


@pytest.mark.parametrize("length", [0, 1, 7, 64])
@pytest.mark.parametrize("fraction", [0.01, 1 / 3, 0.5, 0.99, 1.0])
def test_a_fraction_of_the_masked_tokens_is_predicted(length, fraction):
    rng = torch.Generator().manual_seed(0)
    total = torch.zeros(length)
    for _ in range(300):
        mask = draw_mask(length, 0.75, rng)
        predicted = draw_predicted(mask, fraction, rng)
        masked = int(mask.sum())
        assert not (predicted & ~mask).any()
        assert int(predicted.sum()) == max(round(fraction * masked), min(masked, 1))
        total += predicted
    if length == 64:  # each token occurs equally often, within five standard errors
        p = max(round(fraction * 48), 1) / 64
        assert (total / 300 - p).abs().max() < 5 * (p * (1 - p) / 300) ** 0.5 + 1e-9


def test_predicted_tokens_must_be_masked():
    (sample,) = samples_of("p")
    sample.image_predicted = ~sample.image_mask
    with pytest.raises(ValueError, match=r"0: image_predicted, of .*, must have the shape .* and select only masked"):
        pack([sample], make_model().geometry)


def test_flops_of_the_cross_decoder_are_counted():
    """The FLOPs of the decoder's blocks equal those computed by hand from the shapes of their matrix products. The
    backward pass takes twice as many as the forward pass."""
    model, samples = make_model(), samples_of("ppit", 4, 0.5)
    batch = pack(samples, model.geometry)
    queries = (batch.loss.cu_seqlens.diff().double(), batch.encoder.cu_seqlens.diff().double())
    E, B = TINY.dec_emb_dim, TINY.dec_depth
    decoder = B * (2 * 2 * E * E * batch.encoder.rows + (2 * 2 + 2 * 8) * E * E * batch.loss.rows)
    decoder += B * 4 * E * float(queries[0] @ queries[1])
    same = executed_flops(TINY.model_copy(update={"dec_depth": 2 * B}), batch) - executed_flops(TINY, batch)
    assert same == 3 * decoder


def test_activation_checkpointing_and_compiled_blocks_do_not_change_results():
    config = TINY.model_copy(update={"drop_path": 0.4})
    results = []
    for ways in ((), ("checkpointing",), ("compiled",) if has_compiler() else ()):
        torch.manual_seed(0)
        model = M3AE(config)
        model.decoder.checkpointing = "checkpointing" in ways
        if "compiled" in ways:
            torch._dynamo.reset()
            model.decoder.compile_blocks()
        batch = pack(samples_of("ppit", 5), model.geometry)
        model(batch).loss.backward()
        results.append([p.grad for p in model.parameters()])
    for other in results[1:]:
        for got, expected in zip(other, results[0]):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_keys_and_values_of_each_block_are_initialised_as_separate_matrices():
    model = M3AE(TINY.model_copy(update={"dec_emb_dim": 64}))
    bound = (6 / (64 + 128)) ** 0.5  # Xavier-uniform of [128, 64]
    for weight in model.decoder.kv.weight.chunk(TINY.dec_depth):
        assert 0.95 * bound < weight.abs().max() <= bound


def test_losses_on_all_tokens_are_refused():
    with pytest.raises(ValueError, match="predicts only masked tokens"):
        M3AE(TINY, LossConfig(image_all_tokens=True))
    data = {"data": {"train": [{"shards": "a.tar"}]}, "train": {"global_batch": 8, "steps": 1}}
    data |= {"model": {"size": "small", "dec_attention": "cross"}, "loss": {"text_all_tokens": True}}
    with pytest.raises(UserError, match=r"model\.dec_attention cross predicts only masked tokens"):
        parse(Config, data, "config")


def test_encoder_weights_fit_both_kinds_of_decoder_and_decoder_weights_only_their_own_kind():
    torch.manual_seed(0)
    whole = M3AE(SELF)
    with pytest.raises(UserError, match="check that the model config fits"):
        load_weights(M3AE(TINY), whole.state_dict(), "the official M3AE")
    encoder = {n: t for n, t in whole.state_dict().items() if n.startswith(("patch_embed", "encoder"))}
    crossed = M3AE(TINY)
    load_weights(crossed, encoder, "an encoder")
    assert torch.equal(crossed.encoder.blocks[0].mlp.fc1.weight, whole.encoder.blocks[0].mlp.fc1.weight)


def test_predictions_and_exports_of_a_cross_decoder_work(tmp_path):
    model = M3AE(TINY)
    samples = samples_of("pp", 6)
    batch = pack(samples, model.geometry)
    pixels_IK, logits_WV = model.predict(batch)
    assert len(pixels_IK) == sum(int(s.image_mask.sum()) for s in samples)
    assert logits_WV is not None and len(logits_WV) == sum(int(s.text_mask.sum()) for s in samples)
    model.save_pretrained(tmp_path / "out")
    again = M3AE.from_pretrained(tmp_path / "out")
    assert again.config.dec_attention == "cross"
    torch.testing.assert_close(again(batch).loss, model(batch).loss, rtol=0, atol=0)


CROSS = ["--set", "model.dec_attention=cross", "--set", "model.drop_path=0.2"]
CROSS += ["--set", "masking.image_predicted=0.34", "--set", "masking.text_predicted=0.5"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [None, 0, 1, 2, 3])
def test_the_loss_curve_is_the_same_on_two_ranks_and_after_resuming(trainer, stage):
    """The predicted tokens depend only on the sample. Figures and evaluations predict all masked tokens. Activation
    checkpointing, which the resumed run uses, does not change the curve."""
    options = [*CROSS, "--set", "train.pictures=2", "--set", "train.save_every=3"]
    trainer("one", *zero(None), *options)
    trainer("two", *zero(stage), *options, "--set", "train.micro_batch=8", ranks=2)
    np.testing.assert_allclose(np.array(trainer.losses("two")), np.array(trainer.losses("one")), rtol=2e-5)
    middle = trainer.folder / "two/checkpoints/step-00000003"
    trainer("three", *zero(None), *options, "--set", "train.activation_checkpointing=true", "--resume", str(middle))
    np.testing.assert_allclose(np.array(trainer.losses("three")), np.array(trainer.losses("one"))[3:], rtol=2e-5)
    held_out = [json.loads(line) for line in (trainer.folder / "one/metrics.jsonl").read_text().splitlines()]
    assert any("val_image_loss" in line for line in held_out)
