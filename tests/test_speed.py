"""Optimisations of the engine must not change its numbers, wait for the device or recompile."""

import shutil
from dataclasses import replace
from pathlib import Path

import m3ae_kernels
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from m3ae_kernels.attention import Segments, per_sample
from m3ae_kernels.cpu.linear import linear
from torch._dynamo.utils import counters

from m3ae_fast.base.hardware import has_compiler
from m3ae_fast.batch.masking import draw_mask
from m3ae_fast.batch.packed import INDEX_ROWS, PackedBatch
from m3ae_fast.batch.packing import Geometry, Sample, pack, rounded
from m3ae_fast.config import ModelConfig
from m3ae_fast.model import transformer
from m3ae_fast.model.m3ae import M3AE
from m3ae_fast.model.transformer import gelu
from m3ae_fast.training.throughput import StepCounts
from tests.helpers.attention import attend

TINY = ModelConfig(
    size=None, emb_dim=32, depth=2, num_heads=2, dec_emb_dim=16, dec_depth=2, dec_num_heads=2,
    image_size=32, patch_size=8, text_length=12, vocab_size=50,
)  # fmt: skip


GEOMETRY = Geometry(32, 8, 3, 12)


def _batch(kinds: str, seed: int, geometry: Geometry = GEOMETRY, **options) -> PackedBatch:
    """Return a batch with a sample for each letter of `kinds`: p paired, i image only, t text only."""
    rng = torch.Generator().manual_seed(seed)
    samples = []
    for kind in kinds:
        sample = Sample(kind)
        if kind in "pi":
            sample.image = torch.randint(256, (3, 32, 32), dtype=torch.uint8, generator=rng)
            sample.image_mask = draw_mask(16, 0.75, rng)
        if kind in "pt":
            length = int(torch.randint(4, 13, (), generator=rng))
            sample.tokens = torch.randint(50, (length,), generator=rng)
            sample.text_mask = draw_mask(12, 0.75, rng)[:length]
        samples.append(sample)
    return pack(samples, geometry, **options)


def _segments(lengths: list[int]) -> Segments:
    return Segments(torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32), max(lengths), sum(lengths))


# some samples of equal lengths, which share a matmul; a sample without queries; one sample; no queries at all
@pytest.mark.parametrize(
    ("queries", "keys"),
    [([5, 5, 3, 5, 1], [5, 5, 3, 5, 1]), ([2, 0, 4, 2, 2], [7, 3, 9, 7, 6]), ([1], [1]), ([0, 0], [2, 3])],
)
@pytest.mark.parametrize("chunk", [1, 1 << 20])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)]
)
def test_packed_attention(monkeypatch, queries, keys, chunk, dtype, tolerance):
    monkeypatch.setattr(per_sample, "CHUNK_SCORES", chunk)
    torch.manual_seed(0)
    wide = torch.randn(sum(keys), 3, 2, 8, dtype=dtype).requires_grad_()  # q, k and v are slices, as in the model
    q = wide[: sum(queries), 0]
    out = attend(q, wide[:, 1:], _segments(queries), _segments(keys), impl="torch")
    grad = torch.randn(out.shape, dtype=dtype)
    (got,) = torch.autograd.grad(out, wide, grad)

    exact = wide.detach().double().requires_grad_()
    parts = zip(exact[: sum(queries), 0].split(queries), exact[:, 1].split(keys), exact[:, 2].split(keys))
    expected = torch.cat(
        [((q.transpose(0, 1) @ k.permute(1, 2, 0)) * 8**-0.5).softmax(-1) @ v.transpose(0, 1) for q, k, v in parts], 1
    ).transpose(0, 1)
    (expected_grad,) = torch.autograd.grad(expected, exact, grad.double())
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(got.double(), expected_grad, rtol=tolerance, atol=2 * tolerance)


def test_large_scores_do_not_overflow():
    q = torch.full((4, 1, 8), 100.0)
    out = attend(q, torch.stack((q, torch.eye(4, 8)[:, None]), 1), _segments([4]), _segments([4]))
    torch.testing.assert_close(out[:, 0, :4], torch.full((4, 4), 0.25))


@pytest.mark.parametrize("rows", [0, 1, 7])
def test_linear(rows):
    """oneDNN's matmul on the CPU is compared with float64, forward and backward."""
    torch.manual_seed(0)
    inputs = [torch.randn(shape).requires_grad_() for shape in ((rows, 5), (9, 5), (9,))]
    grad = torch.randn(rows, 9)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    got, expected = linear(*inputs), F.linear(*exact)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    pairs = zip(torch.autograd.grad(got, inputs, grad), torch.autograd.grad(expected, exact, grad.double()))
    for ours, right in pairs:
        torch.testing.assert_close(ours.double(), right, rtol=1e-5, atol=1e-5)


KINDS = ["p" * 20 + "iitt", "i", "ttt", "p", ""]


@pytest.mark.slow
@pytest.mark.parametrize("all_tokens", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("kinds", KINDS)
def test_padding_to_repeated_shapes_does_not_change_results(kinds, all_tokens):
    torch.manual_seed(0)
    model = M3AE(TINY)
    geometry = replace(GEOMETRY, image_all_tokens=all_tokens[0], text_all_tokens=all_tokens[1])
    exact, padded = (_batch(kinds, 1, geometry, repeat_shapes=repeat) for repeat in (False, True))
    results = []
    for batch in (padded, exact):
        model.zero_grad()
        losses = model(batch)
        losses.loss.backward()
        results.append((*losses, *[p.grad for p in model.parameters()]))
    for got, expected in zip(*results):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    # throughput and utilisation count only the required work
    assert StepCounts.of([padded], TINY) == StepCounts.of([exact], TINY)


@pytest.mark.parametrize("kinds", KINDS)
def test_padding_forms_separate_segments_that_do_not_change_the_samples(kinds):
    exact, padded = (_batch(kinds, 2, repeat_shapes=repeat) for repeat in (False, True))
    S = len(kinds)
    losses = rounded(len(exact.image_rows)) + rounded(len(exact.text_rows))
    rows = {"encoder": rounded(exact.encoder.rows), "decoder": max(rounded(exact.decoder.rows), losses), "loss": losses}
    for name, count in rows.items():
        few, more = getattr(exact, name), getattr(padded, name)
        assert more.rows == count == more.cu_seqlens[-1]
        assert torch.equal(more.cu_seqlens[: S + 1], few.cu_seqlens) or name == "loss"
        if name != "loss":
            assert more.max_seqlen == few.max_seqlen
            segments, longest = len(more.cu_seqlens) - 1 - S, max(few.max_seqlen, 1)
            assert segments == -(-(count - few.rows) // longest), "there are no more segments than necessary"
    for name in ("image", "text"):
        weights = [getattr(b, f"{name}_row_weight") for b in (exact, padded)]
        assert len(weights[1]) == rounded(len(weights[0]))
        assert torch.equal(weights[1][weights[1] > 0], weights[0])
    for ids in (padded.loss_rows, torch.cat((padded.image_rows, padded.text_rows))):
        assert len(ids.unique()) == len(ids), "a gather reads each row at most once"


def test_nothing_attends_to_padding():
    """The contents of padding rows, even NaNs, do not reach other rows."""
    torch.manual_seed(0)
    model = M3AE(TINY)
    exact, padded = (_batch("ppit", 2, repeat_shapes=repeat) for repeat in (False, True))
    rows = exact.encoder.rows
    assert padded.encoder.rows > rows
    expected = model.forward_encoder(exact)
    model.encoder_input.register_forward_hook(lambda *args: args[-1].index_fill(0, torch.arange(rows, 64), torch.nan))
    torch.testing.assert_close(model.forward_encoder(padded)[:rows], expected)


@pytest.mark.parametrize("repeat", [False, True])
def test_a_step_does_not_sort(repeat):
    """The loader provides the orders in which rows of a table are summed, so that a step need not compute them."""
    model = M3AE(TINY.model_copy(update={"vocab_size": 5000}))
    batch = _batch("ppit", 0, repeat_shapes=repeat)
    with torch.profiler.profile() as profile:
        model(batch).loss.backward()
    ops = {event.key for event in profile.key_averages()}
    assert "scatter_tokensBackward" in ops
    assert not {"aten::sort", "aten::argsort"} & ops


def test_padded_batches_have_few_different_shapes():
    shapes = {
        tuple(len(getattr(batch, name)) for name in INDEX_ROWS)
        for batch in (_batch("p" * 48 + "iitt", seed, repeat_shapes=True) for seed in range(20))
    }
    assert len(shapes) <= 4
    sizes = [rounded(rows) for rows in range(40_000)]
    assert sizes == sorted(sizes) and sizes[0] == 0
    assert all(rows <= size < rows + max(64, rows / 127) for rows, size in enumerate(sizes))
    assert len(set(sizes[30_000:])) < 60


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason="torch.compile needs a C++ compiler")
@torch._functorch.config.patch(activation_memory_budget=1.0)  # restored afterwards
def test_compiled_blocks_are_correct_and_compile_once():
    """Batches of other sizes and kinds reuse the graphs of the first ones, and have the results of eager mode."""
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    plain = M3AE(TINY)
    compiled = M3AE(TINY)
    compiled.load_state_dict(plain.state_dict())
    compiled.encoder.compile_blocks()
    compiled.decoder.compile_blocks()
    for step, kinds in enumerate(("pppp", "pit", "tttpp", "i", "tp", "iiippp")):
        batch = _batch(kinds, step)
        losses = [model(batch).loss for model in (plain, compiled)]
        torch.testing.assert_close(losses[1], losses[0], rtol=2e-5, atol=0)
        for model, loss in zip((plain, compiled), losses):
            model.zero_grad()
            loss.backward()
        for (name, p), q in zip(plain.named_parameters(), compiled.parameters()):
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
        graphs = counters["stats"]["unique_graphs"]
        if step == 1:
            warm = graphs
    assert graphs == warm == 3  # encoder, decoder, and the decoder's last block


@torch._functorch.config.patch(activation_memory_budget=1.0)
@torch.compiler.config.patch(cache_key_tag="")
def test_compiled_graphs_are_cached_by_the_size_of_the_micro_batch():
    """Compiled code splits sums over rows in a way that depends on the number of rows in the first batch. The key of
    torch's cache does not contain this number, so it is added to the key as a tag."""
    tags = []
    for samples in (64, 512, 512):
        M3AE(TINY).encoder.compile_blocks(samples)
        tags.append(torch.compiler.config.cache_key_tag)
    assert tags[0] != tags[1] == tags[2]


def test_a_change_of_any_module_invalidates_the_compiled_graph(tmp_path, monkeypatch):
    """Modules of the model and of the ops are changed. If the tag of the graph did not change too, torch's cache would
    run an old backward pass after an update."""
    copies = []
    for name, module in (("model", transformer), ("kernels", m3ae_kernels)):
        folder = Path(module.__file__).parent
        for path in folder.rglob("*.py"):
            copies.append(tmp_path / name / path.relative_to(folder))
            copies[-1].parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copies[-1])
        monkeypatch.setattr(module, "__file__", str(tmp_path / name / Path(module.__file__).name))
    assert len({path.parent for path in copies}) > 4  # includes sub-folders
    tag, listed = transformer._source_tag.__wrapped__, Path.rglob
    tags = [tag()]
    # another file system may list files in another order
    monkeypatch.setattr(Path, "rglob", lambda *given: reversed(list(listed(*given))))
    tags.append(tag())
    for path in copies:
        with path.open("a") as file:
            file.write("#\n")
        tags.append(tag())
    assert tags[0] == tags[1] and len(set(tags)) == 1 + len(copies)


def test_compiled_gelu_has_a_single_graph_input():
    """A named constant such as math.pi would become a tensor that the backward pass of each block reads on the host."""
    seen = []

    def backend(graph, inputs):
        seen.append([node.name for node in graph.graph.nodes if node.op == "placeholder"])
        return graph

    torch._dynamo.reset()
    x = torch.randn(8, 8)
    found = torch.compile(lambda x: gelu(x, "tanh"), dynamic=True, backend=backend)(x)
    torch.testing.assert_close(found, F.gelu(x, approximate="tanh"), rtol=1e-5, atol=1e-6)
    assert len(seen) == 1 and not [name for name in seen[0] if "pi" in name or "math" in name]
    assert len([name for name in seen[0] if "x" in name]) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU whose host could wait")
def test_a_step_never_waits_for_the_gpu():
    device = torch.device("cuda")
    model = M3AE(TINY).to(device)
    batch = _batch("ppit", 0).to(device)
    for mode in ("default", "error"):  # kernels are compiled and loaded in the first round
        torch.cuda.set_sync_debug_mode(mode)
        try:
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(batch).loss
            loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
