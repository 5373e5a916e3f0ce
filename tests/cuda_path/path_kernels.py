"""The properties of the GPU that kernels query before they are launched, and the official numbers on the CUDA path."""

import runpy
import sys

import pytest
import torch
from m3ae_kernels import dispatch, tuning
from m3ae_kernels.attention import Kernel
from m3ae_kernels.attention import cuda as attention_cuda
from m3ae_kernels.attention.choice import kernel_for
from m3ae_kernels.attention.padded import PADDED
from m3ae_kernels.dispatch import choose_impl
from m3ae_kernels.triton_impl import matmul
from m3ae_kernels.triton_impl.attention import TRITON
from m3ae_kernels.triton_impl.common import precision
from m3ae_kernels.triton_impl.matmul import add_product
from torch._subclasses.fake_tensor import FakeTensorMode

from m3ae_fast.cli.verify import main as verify
from tests.cuda_path.fake_cuda import CUDA, FakeCuda
from tests.helpers.trainer import ROOT


@pytest.fixture(autouse=True)
def fresh_tables():
    caches = tuning.arch_of, dispatch._best_on_gpu
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def test_triton_kernels_are_chosen_on_a_gpu(cuda, monkeypatch):
    monkeypatch.delenv("M3AE_KERNELS_IMPL")
    assert choose_impl("auto", CUDA) == "triton" and choose_impl("torch", CUDA) == "torch"
    assert choose_impl("auto", torch.device("cpu")) == "torch"
    with pytest.raises(ValueError, match="impl is 'cuda'"):
        choose_impl("cuda", CUDA)
    assert kernel_for("triton", CUDA, torch.bfloat16, 1, 16, 5) is TRITON
    assert kernel_for("torch", CUDA, torch.bfloat16, 1, 16, 5) is PADDED


@pytest.mark.parametrize(
    ("capability", "arch"),
    [((8, 0), "sm_80"), ((9, 0), "sm_90"), ((10, 3), "sm_100"), ((8, 6), "sm_89"), ((12, 1), "sm_120")],
)
def test_block_sizes_are_those_of_the_gpu(capability, arch):
    with FakeCuda(capability=capability):
        assert tuning.arch_of(CUDA) == arch
        assert tuning.config("rows", CUDA, torch.bfloat16)["num_warps"] > 0
    assert tuning.arch_of(torch.device("cpu")) == "interpreter"


def test_torch_is_chosen_on_a_gpu_that_the_kernels_do_not_support(monkeypatch):
    monkeypatch.delenv("M3AE_KERNELS_IMPL")
    with FakeCuda(capability=(7, 5)), pytest.warns(UserWarning, match="on NVIDIA.*, the ops run on torch"):
        assert choose_impl("auto", CUDA) == "torch"


def test_block_sizes_of_amd_gpus_are_chosen(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert tuning.arch_of(CUDA) == "gfx942"


class OnGPU(torch.Tensor):
    """A stand-in for a tensor that claims to be on a GPU."""

    is_cuda = True


def test_gradients_of_weights_are_summed_in_float32(monkeypatch):
    asked = []
    with FakeTensorMode(), monkeypatch.context() as patch:
        patch.setattr(torch, "addmm", lambda *_, **options: asked.append(options))
        patch.setattr(torch.version, "cuda", "13.0")
        a = torch.empty(4, 6, device="cuda", dtype=torch.bfloat16)
        total = torch.empty(4, 4, device="cuda")
        for first in (True, False):
            add_product(total, a, a.t(), first)
    assert [(o["out_dtype"], o["beta"], o["out"] is total) for o in asked] == [
        (torch.float32, 0, True),
        (torch.float32, 1, True),
    ]
    assert matmul.WIDE_SUMS
    a = torch.randn(4, 6)
    with monkeypatch.context() as patch:  # as with a version of torch that does not support such sums
        patch.setattr(matmul, "WIDE_SUMS", False)
        patch.setattr(torch.version, "cuda", "13.0")
        there, total = a.bfloat16().as_subclass(OnGPU), torch.zeros(4, 4)
        for first in (True, False):
            add_product(total, there, there.t(), first)
        torch.testing.assert_close(total, 2 * a @ a.t(), rtol=0.05, atol=0.1)
    short, bf16 = a.bfloat16(), torch.zeros(4, 4)
    add_product(bf16, short, short.t(), True)
    add_product(bf16, short, short.t(), False)
    torch.testing.assert_close(bf16, 2 * a @ a.t(), rtol=0.05, atol=0.1)
    total = torch.full((4, 4), torch.nan)
    add_product(total, a, a.t(), True)
    add_product(total, a, a.t(), False)
    torch.testing.assert_close(total, 2 * a @ a.t())


def test_triton_attention_takes_part_in_the_benchmark_at_start_up(cuda, monkeypatch, caplog):
    """By default, Triton's attention is benchmarked together with other implementations, which are not installed here.
    The test uses float16, because the interpreter multiplies bfloat16 incorrectly."""
    monkeypatch.setattr(attention_cuda, "_chosen", {})
    for name, less in (("SAMPLES", 2), ("ROUNDS", 1)):
        monkeypatch.setattr(attention_cuda, name, less)
    for head_dim, length in ((64, 5), (16, 140)):  # one tile of keys, and two tiles
        assert attention_cuda.choose_by_benchmark(CUDA, torch.float16, 1, head_dim, length).name == "triton"
    wrong = Kernel("triton", lambda *parts: (PADDED.forward(*parts)[0] * 1.05, PADDED.forward(*parts)[1]), None)
    monkeypatch.setattr("m3ae_kernels.triton_impl.attention.TRITON", wrong)
    assert attention_cuda.choose_by_benchmark(CUDA, torch.float16, 1, 16, 6) is PADDED
    assert "attention: triton is excluded" in caplog.text


def test_triton_attention_is_not_available_on_an_old_gpu(monkeypatch):
    with FakeCuda(capability=(7, 5)), pytest.raises(attention_cuda.NotAvailable):
        attention_cuda.MAKERS["triton"](CUDA)


def test_attention_kernels_are_timed_by_the_clock_without_a_gpu():
    on_cpu = attention_cuda.example(torch.device("cpu"), torch.float32, 1, 16, 5)
    assert attention_cuda._seconds(PADDED, *on_cpu) > 0


def test_float32_matmuls_follow_the_precision_setting_of_torch():
    assert precision(torch.bfloat16) == "ieee"
    assert precision(torch.float32) == "tf32x3"
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        assert precision(torch.float32) == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_the_help_of_a_tool_lists_the_device_option(cuda, capsys):
    with pytest.raises(SystemExit):
        verify(["--help"])
    assert "--device" in capsys.readouterr().out


def test_official_numbers_on_the_cuda_path(cuda, monkeypatch, capsys):
    """The results of the Triton kernels are tested in tests/kernels/test_kernel_interpreter.py."""
    golden = min((ROOT / "tests/golden").glob("*.npz"), key=lambda path: path.stat().st_size)
    monkeypatch.setattr(sys, "argv", ["verify", str(golden), "--device", "cuda"])
    with pytest.raises(SystemExit) as done:
        runpy.run_module("m3ae_fast.cli.verify", run_name="__main__")
    assert done.value.code == 0
    assert "agree with the official implementation" in capsys.readouterr().out
