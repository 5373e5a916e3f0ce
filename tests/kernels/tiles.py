"""Ops with the block sizes that are shipped for an H100: tiles are incomplete, and memory that has not been written
contains NaN. Other tests reach code that usually runs only for far larger inputs, or compare the kernels with the
official model. test_kernel_interpreter.py runs this file, because only Triton's interpreter can run these tests."""

import itertools

import m3ae_kernels
import numpy as np
import pytest
import torch
import triton.language as tl
from m3ae_kernels import reference, tuning
from m3ae_kernels.triton_impl import attention, matmul, norm, patch_embed, rows
from triton.runtime.interpreter import TensorHandle, interpreter_builder

from m3ae_fast.cli.verify import main as verify
from tests.helpers.trainer import ROOT
from tests.kernels.kernel_cases import make, packed_attention, run
from tests.kernels.test_kernel_ops import FLOOR, double, error, poisoned  # noqa: F401

ARCH = "sm_90"
CPU, SIDES = torch.device("cpu"), ("BLOCK_M", "BLOCK_N")
RAGGED = (
    "attend-some",
    "attend-queries",
    "embed-p14",
    "embed-last",
    "embed-bands",
    "norm-some",
    "gelu-some",
    "scatter-mask",
    "pixel-norm",
    "pixel-bands",
    "pixel-mean-last",
    "hog-p48",
    "hog-bands",
    "hog-mean-last",
    "token-z",
    "token-rows",
)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", RAGGED)
def test_ops_with_the_shipped_tiles_equal_the_reference(case, dtype, monkeypatch, poisoned):  # noqa: F811
    monkeypatch.setattr(tuning, "arch_of", lambda device: ARCH)
    inputs = make(case, dtype)
    true, torch_like = run(reference, case, double(inputs)), run(reference, case, inputs)
    for name, got in run(m3ae_kernels, case, inputs).items():
        allowed = 2 * error(torch_like[name], true[name]) + FLOOR[got.dtype]
        assert error(got, true[name]) <= allowed, name


@pytest.mark.parametrize("other", [False, True], ids=["whole", "queries of some rows"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_attention_is_correct_at_the_edges_of_its_tiles(dtype, other, poisoned):  # noqa: F811
    """The lengths of the samples are 0.5, 1, 1.5 and 2 tiles, one row less or more than 1 tile, and one row more than
    1.5 tiles. There are such lengths for the tiles of keys and for the tiles of queries."""
    rows = {side: attention.as_rows(tuning.config("attention_backward", CPU, dtype), 16)[side] for side in SIDES}
    edges = sorted({n for b in rows.values() for n in (b // 2, b - 1, b, b + 1, b + b // 2, b + b // 2 + 1, 2 * b)})
    inputs = packed_attention(dtype, edges, 1, 16, queries=[*edges[1:], edges[0]] if other else None)
    true, torch_like = run(reference, "attend-some", double(inputs)), run(reference, "attend-some", inputs)
    for name, got in run(m3ae_kernels, "attend-some", inputs).items():
        assert error(got, true[name]) <= 2 * error(torch_like[name], true[name]) + FLOOR[got.dtype], name


def test_the_kernels_equal_the_official_model(capsys):
    assert verify([str(ROOT / "tests/golden/paired.npz")]) == 0
    assert "agree with the official implementation" in capsys.readouterr().out


def test_a_loss_scale_does_not_change_attention_gradients():
    """The products of gradients and values, and their mean, exceed the range of float16."""
    inputs, scale = make("attend-queries", torch.float16), 2.0**14
    inputs.tensors["qkv"].data[:, 1] = 4 + inputs.tensors["qkv"].data[:, 1] / 64
    upstream = torch.randn(inputs.tensors["q"].shape, dtype=torch.float64).clamp(-3, 3)
    plain, scaled = (run(m3ae_kernels, "attend-queries", inputs, upstream * factor) for factor in (1.0, scale))
    for name in inputs.learned:
        assert error(scaled[name] / scale, plain[name].double()) < 2e-3, name


@pytest.mark.parametrize("case", ["embed-p14", "norm-some", "gelu-some"])
def test_a_backward_program_instance_sums_its_blocks(case, monkeypatch):
    """There are more blocks of rows than program instances."""
    monkeypatch.setattr(patch_embed, "TARGET_PROGRAMS", 1)
    monkeypatch.setattr(norm, "MAX_PARTIALS", 2)
    inputs = make(case, torch.float32)
    true = run(reference, case, double(inputs))
    for name, got in run(m3ae_kernels, case, inputs).items():
        assert error(got, true[name]) < 1e-6, name


def test_the_gradient_of_a_float32_weight_has_float32_precision():
    """Products of float16 values are exact in float32, so the only rounding errors are those of the float32 sums."""
    inputs = make("embed-float", torch.float16).to(torch.float32, ["weight", "bias"])
    upstream = torch.randn(13, 48).half().double()
    true = run(reference, "embed-float", double(inputs), upstream)
    assert error(run(m3ae_kernels, "embed-float", inputs, upstream)["weight"], true["weight"]) < 1e-6


def test_rows_are_distributed_in_whole_blocks_and_chunks_fit_into_their_buffers():
    """Rows are distributed over few program instances in whole blocks, and over chunks that fit into their buffers."""
    for count, block in itertools.product((0, 1, 63, 64, 65, 511, 512, 513, 10**6), (1, 8, 64)):
        share, programs = norm.rows_by_program(count, block)
        assert share % block == 0 and programs <= norm.MAX_PARTIALS
        assert count <= programs * share and (programs == 0 or (programs - 1) * share < count)
        for most in (1, 7, 100, 2000):
            chunk = matmul.even_chunks(count, most, block)
            assert 1 <= chunk <= matmul.workspace_rows(count, most) <= most
            assert chunk >= count or chunk % min(block, most) == 0


class FirstTile:
    """A kernel of which only the first program instance runs."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return self.kernel[tuple(1 for _ in grid)]


def test_rows_beyond_2_to_the_31_elements_are_read_and_written(monkeypatch):
    """The tensor has three rows that are so wide that the third begins beyond 2^31 elements. Memory that is never
    touched is not allocated."""
    for name in ("take_rows_kernel", "scatter_tokens_kernel"):
        monkeypatch.setattr(rows, name, FirstTile(getattr(rows, name)))
    width, seen = 2**30, 32
    x = torch.empty(3, width, dtype=torch.float16)
    x[:, :seen] = torch.arange(3 * seen).view(3, seen)
    order, none = torch.tensor([1, 0, 2], dtype=torch.int32), torch.full((3,), -1, dtype=torch.int32)
    assert torch.equal(m3ae_kernels.gather_tokens(x, order)[:, :seen], x[order.long(), :seen])
    for arguments in ((order,), (none, x, order), (none, None, None, x, order)):
        out = m3ae_kernels.scatter_tokens(x, *arguments)
        assert torch.equal(out[:, :seen], x[order.long(), :seen])


class LastTile:
    """A kernel of which only the last program instance runs."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            with pytest.MonkeyPatch.context() as patch:
                last = [TensorHandle(np.array([count - 1], np.int32), tl.int32) for count in grid]
                patch.setattr(interpreter_builder, "create_get_program_id", last.__getitem__)
                self.kernel[tuple(1 for _ in grid)](*arguments, **options)

        return launch


def test_the_last_rows_of_large_tensors_are_read_and_written(monkeypatch):
    """There are so many rows that the last ones begin beyond 2^31 elements. Memory that is never touched is not
    allocated."""
    width = 2**16
    count = 2**31 // width + 3
    torch.manual_seed(0)
    for name in ("gather_norm_kernel", "gather_norm_backward_kernel"):
        monkeypatch.setattr(norm, name, LastTile(getattr(norm, name)))
    monkeypatch.setattr(patch_embed, "patch_embed_kernel", LastTile(patch_embed.patch_embed_kernel))
    x, weight, bias = torch.randn(1, width).half(), torch.randn(width).half(), torch.randn(width).half()
    expected = torch.nn.functional.layer_norm(x.double(), (width,), weight.double(), bias.double(), 1e-6)
    zeros = torch.zeros(count, dtype=torch.int32)
    out = m3ae_kernels.gather_tokens(x, zeros, norm_weight=weight, norm_bias=bias)
    assert error(out[-1:], expected) < 1e-3
    many = torch.empty(count, width, dtype=torch.float16)
    many[-1], last = x, torch.tensor([count - 1], dtype=torch.int32)
    upstream, mean, rstd = torch.randn(1, width).half(), x.float().mean(1), x.float().var(1, correction=0).rsqrt()
    found = norm.gather_norm_backward(upstream, many, last, weight, mean, rstd, [True, False, False])[0]
    leaf = x.double().requires_grad_()
    torch.nn.functional.layer_norm(leaf, (width,), weight.double()).backward(upstream.double())
    assert error(found[-1:], leaf.grad) < 1e-3
    image, embedding = torch.randn(1, 1, 2, 2).half(), torch.randn(width, 4).half()
    out = m3ae_kernels.patch_embed(image, zeros, embedding, patch_size=2)
    assert error(out[-1:, -16:], image.double().view(1, 4) @ embedding[-16:].double().t()) < 1e-3


def test_the_tiles_differ_from_those_of_the_interpreter():
    for kernel, widths in tuning.table(ARCH).items():
        own = tuning.table(tuning.INTERPRETER)[kernel]
        assert widths != own, kernel
