"""The model on packed batches: properties that golden files do not show."""

import dataclasses
import pickle
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from m3ae_kernels import bias_gelu, registry
from m3ae_kernels.attention import op
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode

from m3ae_fast.batch.masking import draw_mask
from m3ae_fast.batch.packed import LossCounts
from m3ae_fast.batch.packing import Sample, Segments, pack
from m3ae_fast.config import LossConfig, ModelConfig
from m3ae_fast.model import transformer
from m3ae_fast.model.flops import executed_flops
from m3ae_fast.model.m3ae import M3AE
from m3ae_fast.model.pooling import mean_of_tokens, only_cls
from m3ae_fast.model.transformer import Block, Transformer, drop_path, drop_path_factors
from tests.helpers.attention import attend

TINY = ModelConfig(
    size=None,
    emb_dim=24,
    depth=2,
    num_heads=3,
    dec_emb_dim=16,
    dec_depth=2,
    dec_num_heads=2,
    image_size=16,
    patch_size=4,
    text_length=9,
    vocab_size=31,
)
PATCHES = TINY.patches_per_image


def make_sample(seed: int, image: bool = True, words: int | None = 5, ratio: float = 0.75) -> Sample:
    generator = torch.Generator().manual_seed(seed)
    sample = Sample(str(seed))
    if image:
        sample.image = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8, generator=generator)
        sample.image_mask = draw_mask(PATCHES, ratio, generator)
    if words is not None:
        sample.tokens = torch.randint(0, 31, (words,), generator=generator)
        sample.text_mask = draw_mask(9, ratio, generator)[:words]
    return sample


def make_model(config: ModelConfig = TINY, **loss) -> M3AE:
    torch.manual_seed(0)
    return M3AE(config, LossConfig(**loss))


MIXED = [
    make_sample(0),
    make_sample(1, words=None),
    make_sample(2, image=False, words=9),
    make_sample(3, words=0),
    make_sample(4, words=9),
    make_sample(5, image=False, words=0),
]


def test_the_loss_of_a_mixed_batch_is_the_mean_over_its_samples():
    """Packing does not affect the losses: the losses of a batch of images, captions and pairs are the means of the
    losses of single samples.
    """
    model = make_model()
    together = model(pack(MIXED, model.geometry))
    alone = [model(pack([sample], model.geometry)) for sample in MIXED]
    image = sum(part.image_loss for part in alone) / sum(s.image is not None for s in MIXED)
    text = sum(part.text_loss for part in alone) / sum(s.tokens is not None for s in MIXED)
    torch.testing.assert_close(together.image_loss, image)
    torch.testing.assert_close(together.text_loss, text)
    torch.testing.assert_close(together.loss.detach(), image + 0.5 * text)


def test_loss_weights_scale_losses_but_not_accuracies_and_counts():
    model = make_model()
    plain = model(pack(MIXED, model.geometry))
    weights = [0.5, 2.0, 0.1, 1.0, 0.0, 3.0]
    weighted = [dataclasses.replace(sample, loss_weight=weight) for sample, weight in zip(MIXED, weights)]
    together = model(pack(weighted, model.geometry))
    alone = [model(pack([sample], model.geometry)) for sample in MIXED]
    for name, has in (
        ("image_loss", [s.image is not None for s in MIXED]),
        ("text_loss", [s.tokens is not None for s in MIXED]),
    ):
        expected = sum(w * getattr(part, name) for w, part in zip(weights, alone)) / sum(has)
        torch.testing.assert_close(getattr(together, name), expected)
    assert together.text_accuracy == plain.text_accuracy
    doubled = model(pack([dataclasses.replace(sample, loss_weight=2.0) for sample in MIXED], model.geometry))
    torch.testing.assert_close(doubled.loss, 2 * plain.loss)


@pytest.mark.parametrize("per", ["sample", "batch"])
@pytest.mark.parametrize("all_tokens", [False, True])
def test_the_text_accuracy_is_computed_on_the_predicted_tokens(per, all_tokens):
    """With per="sample", the accuracy is a mean over captions, and an empty caption counts as 0. Otherwise, it is a
    mean over words. The images of the batch have no effect on it."""
    model, samples = make_model(text_all_tokens=all_tokens, per=per), []
    for sample in MIXED:  # captions of two words, which the model predicts with high probability
        samples.append(replace(sample, tokens=None if sample.tokens is None else sample.tokens % 2))
    with torch.no_grad():
        model.text_head.bias[:2] = 1e3
    batch, rights = pack(samples, model.geometry), []
    guesses = iter(model.predict(batch)[1].argmax(-1))
    for sample in samples:
        if sample.tokens is not None:
            counted = torch.ones_like(sample.text_mask) if all_tokens else sample.text_mask
            rights.append([bool(next(guesses) == word) for word in sample.tokens[counted]])
    words, fractions = [one for own in rights for one in own], [sum(own) / max(len(own), 1) for own in rights]
    expected = sum(words) / len(words) if per == "batch" else sum(fractions) / len(fractions)
    assert 0 < expected < 1
    assert model(batch).text_accuracy.item() == pytest.approx(expected)
    assert model(batch, batch.counts._replace(image=1e6)).text_accuracy.item() == pytest.approx(expected)


def test_losses_are_sums_divided_by_the_given_counts():
    """The counts are those of a rank in a whole step and may be less than one. If the step has no samples, the loss is
    0."""
    model = make_model(image_weight=0.3, text_weight=0.7)
    batch = pack(MIXED, model.geometry)
    own = model(batch)
    for images, captions in ((0.25, 3.0), (8.0, 0.125), (0.0, 0.0)):
        found = model(batch, LossCounts(images, captions))
        torch.testing.assert_close(found.image_loss, own.image_loss * batch.counts.image / (images or 1))
        torch.testing.assert_close(found.text_loss, own.text_loss * batch.counts.text / (captions or 1))
        torch.testing.assert_close(found.text_accuracy, own.text_accuracy * batch.counts.text / (captions or 1))
        torch.testing.assert_close(found.loss.detach(), 0.3 * found.image_loss + 0.7 * found.text_loss)
        assert [loss.requires_grad for loss in found] == [True, False, False, False]


def test_encoder_and_decoder_use_different_drop_keys_and_predictions_have_no_gradient():
    model = make_model(TINY.model_copy(update={"drop_path": 0.5}))
    assert model.encoder.drop_key != model.decoder.drop_key
    assert not any(found.requires_grad for found in model.predict(pack(MIXED, model.geometry)))


def test_results_do_not_depend_on_the_order_of_samples():
    model = make_model()
    one, other = (model(pack(samples, model.geometry)).loss for samples in (MIXED, MIXED[::-1]))
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("samples", [MIXED, MIXED[:1], []])
def test_batch_is_unchanged_by_pickling(samples):
    batch = pack(samples, make_model().geometry)
    batch = dataclasses.replace(batch, skipped=("one",))
    for field in dataclasses.fields(batch):
        sent, received = (getattr(b, field.name) for b in (batch, pickle.loads(pickle.dumps(batch))))
        if isinstance(sent, Segments):
            assert (received.max_seqlen, received.rows) == (sent.max_seqlen, sent.rows)
            sent, received = sent.cu_seqlens, received.cu_seqlens
        if isinstance(sent, torch.Tensor):
            torch.testing.assert_close(received, sent, rtol=0, atol=0)  # compares dtypes too
        else:
            assert received == sent


def test_empty_batch_has_zero_loss_and_gradients():
    model = make_model()
    losses = model(pack([], model.geometry))
    losses.loss.backward()
    assert losses.loss == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_masks_have_the_configured_ratios(ratio):
    """Without masked tokens, there is no loss. If all tokens are masked, only the cls token is encoded."""
    model = make_model()
    batch = pack([make_sample(i, ratio=ratio) for i in range(3)], model.geometry)
    losses = model(batch)
    losses.loss.backward()
    assert losses.loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert (losses.loss == 0) == (ratio == 0)
    if ratio == 1:
        assert batch.encoder.rows == 3


def test_a_last_block_computed_only_for_loss_rows_equals_the_full_block():
    model = make_model()
    for name, p in model.named_parameters():
        if name.endswith("bias"):  # biases are initialised with 0
            torch.nn.init.normal_(p)
    batch = pack(MIXED, model.geometry)
    _, x = model.decoder_input(model.forward_encoder(batch), batch)
    chosen = model.decoder(x, batch.decoder, batch.draws, batch.loss_rows, batch.loss)
    torch.testing.assert_close(chosen, model.decoder(x, batch.decoder, batch.draws)[batch.loss_rows])


def test_predictions_do_not_depend_on_which_other_tokens_are_predicted():
    """The predictions for masked tokens do not depend on whether predictions for the other tokens are computed too."""
    model = make_model()
    everywhere = dataclasses.replace(model.geometry, image_all_tokens=True, text_all_tokens=True)
    few, all_ = pack(MIXED, model.geometry), pack(MIXED, everywhere)
    pixels, words = model.predict(few)
    all_pixels, all_words = model.predict(all_)
    image_mask = torch.cat([s.image_mask for s in MIXED if s.image is not None])
    text_mask = torch.cat([s.text_mask for s in MIXED if s.tokens is not None])
    torch.testing.assert_close(pixels, all_pixels[image_mask])
    torch.testing.assert_close(words, all_words[text_mask])


def test_image_only_model_has_no_text_weights():
    model = make_model(TINY.model_copy(update={"vocab_size": 0}))
    assert not [name for name, _ in model.named_parameters() if "text" in name]
    losses = model(pack([make_sample(0, words=None)], model.geometry))
    losses.loss.backward()
    assert losses.text_loss == 0 and losses.image_loss > 0


def test_norm_pix_loss_of_a_uniform_image_is_the_squared_prediction():
    grey = {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.3, 0.3, 0.3)}
    model = make_model(TINY.model_copy(update=grey), norm_pix=True)
    sample = make_sample(0, words=None)
    sample.image = torch.full_like(sample.image, 77)
    batch = pack([sample], model.geometry)
    pixels, _ = model.predict(batch)
    torch.testing.assert_close(model(batch).image_loss, pixels.square().mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_drop_path_is_applied_only_in_training(half):
    model = make_model(TINY.model_copy(update={"drop_path": 0.3})).eval()
    batch = pack(MIXED, model.geometry)
    assert model(batch).loss == model(batch).loss
    getattr(model, half).train()
    torch.manual_seed(1)
    first = model(batch).loss
    first.backward()
    second = model(batch).loss
    torch.manual_seed(1)
    again = model(batch).loss
    assert first != second and first == again


@pytest.mark.parametrize("gelu", ["tanh", "exact"])
def test_a_block_equals_plain_modules(gelu):
    """Stochastic depth drops branches of whole samples."""
    torch.manual_seed(0)
    block = Block(16, 2, 4, gelu)
    lengths = torch.tensor([5, 1, 4, 6])
    keys = Segments(torch.tensor([0, 5, 6, 10, 16], dtype=torch.int32), 6, 16)
    x = torch.randn(16, 16)

    factors = torch.tensor([[1.5, 0.0, 1.5, 0.0], [0.0, 0.0, 1.5, 1.5]])

    def dropped(branch, factors_S):
        return branch * factors_S.repeat_interleave(lengths)[:, None]

    got = block(x, keys, factors_2S=factors)
    qkv = block.attn.qkv(block.norm1(x))
    attended = attend(None, qkv.view(16, 3, 2, 8), keys, keys).flatten(1)
    x = x + dropped(block.attn.proj(attended), factors[0])
    hidden = F.gelu(block.mlp.fc1(block.norm2(x)), approximate="none" if gelu == "exact" else "tanh")
    fc2 = block.mlp.fc2
    out = F.linear(hidden, fc2.weight, fc2.bias)
    torch.testing.assert_close(got, x + dropped(out, factors[1]))


@pytest.mark.parametrize("keep", [True, False])
@torch._functorch.config.patch(activation_memory_budget=1.0)  # restored afterwards
@torch.compiler.config.patch(cache_key_tag="")
def test_the_mlp_uses_the_op_for_bias_and_gelu_on_a_gpu_unless_gelu_is_recomputed(monkeypatch, keep):
    torch.manual_seed(0)
    stack = Transformer(8, 1, 2)
    stack.compile_blocks(keep_activations=keep)
    mlp, x = stack.blocks[0].mlp, torch.randn(5, 8, requires_grad=True)
    torch.nn.init.normal_(mlp.fc1.bias)
    learned = (x, *mlp.parameters())
    expected = torch.autograd.grad(mlp(x).square().sum(), learned)
    calls = []
    # `mlp` would compute the whole MLP with a kernel of the CPU
    monkeypatch.setattr(transformer, "mlp", lambda *_: None)
    monkeypatch.setattr(transformer, "choose_impl", lambda *_: "triton")
    monkeypatch.setattr(transformer, "bias_gelu", lambda *inputs: calls.append(inputs) or bias_gelu(*inputs))
    for got, want in zip(torch.autograd.grad(mlp(x).square().sum(), learned), expected):
        torch.testing.assert_close(got, want)
    assert len(calls) == keep


@pytest.mark.slow
@pytest.mark.parametrize("pruned", [False, True])
@torch._functorch.config.patch(activation_memory_budget=1.0)
@torch.compiler.config.patch(cache_key_tag="")
def test_blocks_that_keep_all_activations_are_compiled_as_two_graphs(pruned):
    torch.manual_seed(0)
    stack, x = Transformer(8, 1, 2), torch.randn(12, 8, requires_grad=True)
    keys, draws = Segments(torch.tensor([0, 5, 12], dtype=torch.int32), 7, 12), torch.zeros(2, dtype=torch.int32)
    rows = (torch.tensor([1, 6, 9]), Segments(torch.tensor([0, 1, 3], dtype=torch.int32), 2, 3)) if pruned else ()
    learned = (x, *stack.blocks.parameters())

    def results() -> list[torch.Tensor]:
        out = stack(x, keys, draws, *rows)
        return [out, *torch.autograd.grad(out.square().sum(), learned)]

    expected = results()
    torch._dynamo.reset()
    counters.clear()
    stack.compile_blocks(keep_activations=True)
    for got, want in zip(results(), expected):
        torch.testing.assert_close(got, want)
    assert counters["stats"]["unique_graphs"] == 2


def test_drop_path_drops_whole_samples_except_padding():
    segments = Segments(torch.tensor([0, 3, 4, 9, 11], dtype=torch.int32), 5, 11)
    x = torch.randn(11, 2)
    out = drop_path(x, segments, torch.tensor([2.0, 0.0, 3.0]))
    expected = x * torch.tensor([2.0] * 3 + [0.0] + [3.0] * 5 + [1.0] * 2)[:, None]
    assert torch.equal(out, expected) and drop_path(x, segments, None) is x


def test_drop_path_of_a_sample_depends_only_on_its_random_draw():
    draws = torch.arange(4000, dtype=torch.int32)
    factors = drop_path_factors(draws, 6, 0.25, 0)
    assert factors.unique().tolist() == [0.0, pytest.approx(1 / 0.75)]
    order = torch.randperm(4000)
    torch.manual_seed(5)
    assert torch.equal(drop_path_factors(draws[order[:17]], 6, 0.25, 0), factors[:, order[:17]])
    dropped = torch.cat((factors, drop_path_factors(draws, 6, 0.25, 1))) == 0
    assert ((dropped.double().mean(1) - 0.25).abs() < 0.03).all()
    # the branches of both transformers are drawn independently
    both = (dropped[:, None] & dropped[None]).double().mean(2)
    both.fill_diagonal_(0.25**2)
    assert ((both - 0.25**2).abs() < 0.02).all()
    assert ((dropped[:, 1:] & dropped[:, :-1]).double().mean(1) - 0.25**2).abs().max() < 0.02


def test_drop_path_is_drawn_with_the_murmur_hash_of_sample_branch_and_transformer():
    """The random draws are compared with a second implementation, so that a run that is resumed after an update of this
    package has the same draws."""

    def mixed(x):
        x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
        x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
        return x ^ x >> 16

    draws, golden = [0, 1, 77, 2**31 - 1], 0x9E3779B9
    found = drop_path_factors(torch.tensor(draws, dtype=torch.int32), 5, 0.4, 3)
    for branch, row in enumerate(found.tolist(), 1):
        for draw, factor in zip(draws, row):
            number = mixed(mixed(draw ^ 3 * golden % 2**32) ^ branch * golden % 2**32)
            assert factor == pytest.approx(0.0 if number / 2**32 < 0.4 else 1 / 0.6)


def test_segments_with_only_cls_tokens_have_one_row_per_sample():
    for lengths in ([5, 1, 3], [1], []):
        starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        found = only_cls(Segments(starts, max(lengths, default=0), sum(lengths)))
        assert found.cu_seqlens.tolist() == [*range(len(lengths) + 1)]
        assert (found.max_seqlen, found.rows) == (min(len(lengths), 1), len(lengths))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_features_are_means_of_all_rows_except_cls(dtype):
    """Means are computed in at least float32. The features of samples without another row are 0."""
    lengths = [1, 2, 7, 1, 3, 2, 40]
    parts = [torch.randn(length, 5, dtype=torch.float64).to(dtype) for length in lengths]
    starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    rows, segments = torch.cat(parts).requires_grad_(), Segments(starts, max(lengths), sum(lengths))
    found = mean_of_tokens(rows, segments)
    expected = [part[1:].double().mean(0) if len(part) > 1 else torch.zeros(5).double() for part in parts]
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(found.double(), torch.stack(expected), rtol=1e-5, atol=1e-6)
    assert dtype != torch.float64 or torch.autograd.gradcheck(lambda x: mean_of_tokens(x, segments), rows)


@pytest.mark.parametrize("training", [True, False])
@torch.no_grad()
def test_drop_path_is_drawn_independently_for_each_block(training):
    """Successive factors belong to the attention and the MLP of each block in turn. In evaluation, nothing is
    dropped."""
    torch.manual_seed(0)
    transformer = Transformer(12, 3, 2, drop_path=0.5, drop_key=5).train(training)
    lengths, draws = torch.tensor([3, 4, 2, 5]), torch.arange(4, dtype=torch.int32) + 7
    segments = Segments(torch.tensor([0, 3, 7, 9, 14], dtype=torch.int32), 5, 14)
    factors = drop_path_factors(draws, 6, 0.5, 5).repeat_interleave(lengths, 1)[..., None]
    x_TD = torch.randn(14, 12)
    found = list(transformer.layers(x_TD, segments, draws))
    assert len(found) == 3 and torch.equal(found[2], transformer(x_TD, segments, draws))
    for number, block in enumerate(transformer.blocks):
        attention, mlp = factors[2 * number : 2 * number + 2] if training else (1.0, 1.0)
        x_TD = x_TD + attention * block.attn(block.norm1(x_TD), segments, None, segments)
        x_TD = x_TD + mlp * block.mlp(block.norm2(x_TD))
        torch.testing.assert_close(found[number], x_TD)


def test_samples_without_a_random_draw_use_torchs_generator_for_drop_path():
    unknown = torch.full((500,), -1, dtype=torch.int32)
    torch.manual_seed(1)
    first, second = (drop_path_factors(unknown, 2, 0.5, 0) for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(first, drop_path_factors(unknown, 2, 0.5, 0)) and not torch.equal(first, second)
    assert abs(first.mean() - 1) < 0.15


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_with_stochastic_depth_do_not_depend_on_the_split_into_batches(checkpointing):
    """The gradients of a sample do not depend on the other samples of the batch, with and without padding."""
    model = make_model(TINY.model_copy(update={"drop_path": 0.4})).train()
    model.encoder.checkpointing = model.decoder.checkpointing = checkpointing
    samples = [replace(sample, draw=1000 + i) for i, sample in enumerate(MIXED)]
    whole = pack(samples, model.geometry, repeat_shapes=True)
    model(whole, whole.counts).loss.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for sample in reversed(samples):
        model(pack([sample], model.geometry), whole.counts).loss.backward()
    for p, grad in zip(model.parameters(), expected):
        torch.testing.assert_close(p.grad, grad, rtol=1e-3, atol=1e-5)
    model.eval()
    calm = model(whole).loss
    model.train()
    assert calm != model(whole).loss


@pytest.mark.parametrize("changed", [{}, {"gelu": "exact"}], ids=["plain", "exact GELU"])
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_gradients_are_computed_in_the_same_order_for_every_batch(bf16, changed):
    """ZeRO stages 1 and 2 reduce gradients in the order in which each rank computes them. If a batch led to another
    order on one rank, its gradients would be added to the gradients of other weights."""
    model, order = make_model(TINY.model_copy(update=changed)), []
    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))
    batches = {
        "mixed": MIXED,
        "empty": [],
        "images": [make_sample(1, words=None)],
        "captions": [make_sample(2, image=False)],
        "captions without a word": [make_sample(3, words=0)],
    }
    found = {}
    for kind, samples in batches.items():
        order.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            losses = model(pack(samples, model.geometry))
        losses.loss.backward()
        found[kind] = list(order)
    assert len(found["mixed"]) == len(list(model.parameters()))
    assert {kind for kind, names in found.items() if names != found["mixed"]} == set()


def test_weights_are_initialised_as_in_the_official_code():
    """Weights of matmuls are Xavier-uniform, word embeddings N(0, 1), and other embeddings N(0, 0.02)."""
    model = make_model(TINY.model_copy(update={"emb_dim": 96, "dec_emb_dim": 64, "vocab_size": 300}))
    embeddings = []
    for name, p in model.named_parameters():
        if name.endswith("text_embedding"):
            assert abs(p.std() - 1) < 0.05 and abs((p.abs() < 1).float().mean() - 0.683) < 0.02
        elif name.endswith("weight") and p.ndim == 2:
            bound = (6 / sum(p.shape)) ** 0.5
            assert 0.97 * bound < p.abs().max() <= bound, name
            assert abs(p.std() / bound - 3**-0.5) < 0.02, name
        elif name.endswith("weight") or name.endswith("bias"):
            assert (p == name.endswith("weight")).all(), name
        else:
            embeddings.append(p.flatten())
    assert len(embeddings) == 7 and abs(torch.cat(embeddings).std() / 0.02 - 1) < 0.15


@pytest.mark.parametrize(("head_depth", "mlp_ratio"), [(0, 4), (2, 4), (0, 2.5)])
def test_flops_equal_those_counted_by_torch(monkeypatch, head_depth, mlp_ratio):
    """The FLOPs of matmuls are counted, forward and backward, for captions, images and pairs. The FLOPs of attention
    are computed from the lengths."""

    def attention(rows, kv, cu_queries, cu_keys, flops):
        pairs = (cu_queries.diff() * cu_keys.diff()).sum().item()
        return flops * pairs * kv.shape[-2] * kv.shape[-1]

    def forward(q, kv, cu_queries, cu_keys, *_, **__):
        return attention(q, kv, cu_queries, cu_keys, 4)

    def backward(grad, q, kv, out, lse, cu_queries, cu_keys, *_, **__):
        return attention(q, kv, cu_queries, cu_keys, 8)

    forward._get_raw = backward._get_raw = True
    ops = torch.ops.m3ae
    formulas = {ops.packed_attention: forward, ops.packed_attention_backward: backward}
    # the ops of m3ae_kernels are called as functions, so that the counter sees the torch ops inside them
    monkeypatch.setattr(registry, "traced", lambda *_: False)
    # attention remains one op, because its backward pass recomputes the scores, which must not be counted
    for name in ("attention_op", "attention_backward_op"):
        monkeypatch.setattr(op, name, getattr(op, name).registered)
    config = TINY.model_copy(update={"output_head_depth": head_depth, "mlp_ratio": mlp_ratio})
    model = make_model(config).double()
    batch = pack(MIXED, model.geometry)
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        model(batch).loss.backward()
    assert executed_flops(config, batch) == counter.get_total_flops()


@pytest.mark.parametrize("dropped", [{}, {"drop_path": 0.5}])
def test_activation_checkpointing_does_not_change_gradients(dropped):
    """The recomputation drops the same values as the forward pass."""
    model = make_model(TINY.model_copy(update=dropped)).train()
    batch = pack(MIXED, model.geometry)
    assert not (model.encoder.checkpointing or model.decoder.checkpointing)
    grads = []
    for checkpointing in (False, False, True):
        model.zero_grad()
        model.encoder.checkpointing = model.decoder.checkpointing = checkpointing
        torch.manual_seed(1 if grads else 0)
        model(batch).loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    other, expected, found = grads
    torch.testing.assert_close(found, expected)
    assert torch.equal(other, expected) != bool(dropped)  # some values were dropped


def test_representations_of_float_and_8_bit_images_agree():
    model = make_model()
    images = torch.stack([make_sample(i).image for i in range(3)])
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (TINY.image_mean, TINY.image_std))
    floats = (images / 255 - mean) / std
    torch.testing.assert_close(model.representation(images), model.representation(floats), rtol=1e-4, atol=1e-5)
    text = torch.randint(0, 31, (3, 5))
    assert model.representation(images, text).shape == (3, 1 + PATCHES + 5, 24)
    assert model.representation(text=text).shape == (3, 6, 24)
    padding = torch.tensor([[0, 0, 0, 1, 1]] * 3)
    padded = model.representation(images, text, padding)
    assert not padded[:, -2:].any()
    torch.testing.assert_close(padded[:, :-2], model.representation(images, text[:, :3]))
    for nonzero in (padding.bool(), -padding, 0.5 * padding, 7 * padding.to(torch.uint8)):
        assert torch.equal(model.representation(images, text, nonzero), padded)


def test_representation_refuses_invalid_inputs():
    model = make_model()
    with pytest.raises(ValueError, match="images, text or both"):
        model.representation()
    with pytest.raises(ValueError, match="must follow"):
        model.representation(text=torch.zeros(1, 3, dtype=torch.long), padding_mask=torch.tensor([[1, 0, 0]]))
    with pytest.raises(ValueError, match="shape"):
        model.representation(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="at least one image or text, but the batch is empty"):
        model.representation(torch.zeros(0, 3, 12, 12, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"must be integers \[samples, tokens\], but is torch.float32 \[1, 3\]"):
        model.representation(text=torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"padding_mask must have the shape of text, \[1, 3\], but has \[1, 2\]"):
        model.representation(text=torch.zeros(1, 3, dtype=torch.long), padding_mask=torch.zeros(1, 2))
    for wrong in (-1, TINY.vocab_size):
        with pytest.raises(ValueError, match=rf"ids from {min(wrong, 2)} to {max(wrong, 2)}, but the model"):
            model.representation(text=torch.tensor([[2, wrong]]))
    ignored = torch.tensor([[2, -1]]), torch.tensor([[0, 1]])
    assert not model.representation(None, *ignored)[:, -1].any()


@pytest.mark.slow
@pytest.mark.parametrize("resize", ["square", "native"])
def test_patch_features_have_the_shape_of_the_patch_grid(resize):
    model = make_model(TINY.model_copy(update={"resize": resize})).eval()
    height, width = (16, 8) if resize == "native" else (16, 16)
    images = torch.randint(256, (3, 3, height, width), dtype=torch.uint8)
    found = model.patch_features(images, batch_size=2, precision="fp32")
    assert found.shape == (3, height // 4, width // 4, TINY.emb_dim)
    torch.testing.assert_close(found.flatten(1, 2), model.representation(images)[:, 1:].detach())
    arrays = [image.permute(1, 2, 0).numpy() for image in images]
    torch.testing.assert_close(model.patch_features(arrays, precision="fp32"), found)
    earlier = model.patch_features(images, layer=1, precision="fp32")
    assert earlier.shape == found.shape and not torch.allclose(earlier, found)
    assert len(model.patch_features([])) == 0 and len(model.patch_features(images[0])) == 1
    with pytest.raises(ValueError, match="layer 9: the encoder has layers 1 to 2"):
        model.patch_features(images, layer=9)
    if resize == "native":
        with pytest.raises(ValueError, match="the images have patch maps of different sizes, 2 x 4 and 4 x 2"):
            model.patch_features([images[0], images[1].mT])


def test_a_function_that_uses_the_representation_compiles():
    model, images = make_model(), torch.stack([make_sample(i).image for i in range(2)])

    def mean(images):
        return model.representation(images).mean(1)

    compiled = torch.compile(mean, backend="eager")
    torch.testing.assert_close(compiled(images), mean(images))


def test_pack_refuses_invalid_samples():
    model = make_model()
    with pytest.raises(ValueError, match="neither"):
        pack([Sample("x")], model.geometry)
    long = make_sample(0, words=9)
    long.tokens, long.text_mask = torch.zeros(10, dtype=torch.long), torch.zeros(10, dtype=torch.bool)
    with pytest.raises(ValueError, match="tokens"):
        pack([long], model.geometry)
    sample = make_sample(0, words=5)
    for length in (0, PATCHES - 1, PATCHES + 1):
        wrong = torch.zeros(length, dtype=torch.bool)
        with pytest.raises(ValueError, match=rf"0: image_mask has shape \({length},\)"):
            pack([replace(sample, image_mask=wrong)], model.geometry)
        with pytest.raises(ValueError, match=rf"0: image_ids has shape \({length},\)"):
            pack([replace(sample, image_ids=wrong.long())], model.geometry)
    for wrong in (
        {"text_mask": torch.zeros(4) > 0},
        {"text_mask": torch.zeros(6) > 0},
        {"tokens": torch.zeros(5, 1).long()},
    ):
        with pytest.raises(ValueError, match=r"0: tokens has shape .*, but both must have the same shape"):
            pack([replace(sample, **wrong)], model.geometry)
    for others in ([], [make_sample(0)], [make_sample(0, image=False)]):
        with pytest.raises(ValueError, match="2: same_image is set, but the image is not that of the sample before"):
            pack([*others, replace(make_sample(2), same_image=True)], model.geometry)
    longest = make_sample(1, words=9)
    assert pack([longest], model.geometry).captions == 1


@pytest.mark.parametrize("attention", ["self", "cross"])
@pytest.mark.parametrize(
    ("targets", "resize"), [("pixels", "square"), ("pixels", "native"), ("hog", "square"), ("vqgan", "square")]
)
def test_samples_that_share_an_image_have_the_losses_of_separate_images(targets, attention, resize):
    """In one of two equal batches, an image of several samples is stored only once."""
    model = make_model(TINY.model_copy(update={"image_targets": targets, "dec_attention": attention, "resize": resize}))
    apart = [make_sample(0, words=None), *(make_sample(i) for i in range(3)), make_sample(4, image=False)]
    for sample in apart[:4]:
        sample.image = apart[0].image if sample is apart[1] else sample.image
        sample.image = apart[2].image if sample is apart[3] else sample.image
        if targets == "vqgan":
            sample.image_ids = sample.image[0, ::4, ::4].flatten().long()
    together = [replace(sample, same_image=i in (1, 3)) for i, sample in enumerate(apart)]
    for repeat in (False, True):
        found = []
        for samples in (apart, together):
            batch = pack(samples, model.geometry, repeat_shapes=repeat)
            model.zero_grad()
            losses = model(batch)
            losses.loss.backward()
            found.append((*losses, *(p.grad for p in model.parameters())))
        assert len(batch.images) == (2 if resize == "square" else 2 * PATCHES) and len(batch.grids) == 4
        for got, expected in zip(*found):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)


def test_draw_mask_draws_the_exact_number_of_masked_tokens():
    generator = torch.Generator().manual_seed(0)
    for length, ratio, visible in (
        (256, 0.75, 64),
        (64, 0.75, 16),
        (9, 0.75, 2),
        (16, 0, 16),
        (16, 1, 0),
        (10, 0.9, 0),
    ):
        assert (~draw_mask(length, ratio, generator)).sum() == visible  # int(10 * (1 - 0.9)) is 0 in floats
    masks = torch.stack([draw_mask(16, 0.75, generator) for _ in range(2000)]).float()
    assert (masks.mean(0) - 0.75).abs().max() < 0.05


@pytest.mark.parametrize("size", ["small", "base", "large", "huge"])
def test_models_of_all_preset_sizes_can_be_built(size):
    with torch.device("meta"):
        model = M3AE(ModelConfig(size=size))
    count = sum(p.numel() for p in model.parameters())
    assert {"small": 74.8, "base": 150.8, "large": 376.2, "huge": 711.7}[size] == pytest.approx(count / 1e6, abs=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("by", ["autocast", "parameters"])
def test_every_gradient_in_bf16_is_near_that_in_float32(by):
    """Plain torch computes in bf16 by autocast, and DeepSpeed with parameters in bf16."""
    model = make_model(TINY.model_copy(update={"output_head_depth": 1, "use_type_embedding": True}))
    batch = pack([make_sample(seed, words=9) for seed in range(200)], model.geometry)

    def gradients(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        model.zero_grad()
        model.to(dtype if by == "parameters" else torch.float32)
        with torch.autocast("cpu", dtype, enabled=by == "autocast" and dtype == torch.bfloat16):
            model(batch).loss.backward()
        return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}

    exact, low = gradients(torch.float32), gradients(torch.bfloat16)
    assert exact.keys() == low.keys()
    for name, grad in low.items():
        wanted = exact[name]
        if name.endswith("qkv.bias"):  # without the bias of the keys, whose gradient is only rounding errors
            grad, wanted = (torch.cat(g.chunk(3)[::2]) for g in (grad, wanted))
        assert (grad - wanted).norm() < 0.03 * wanted.norm(), name
