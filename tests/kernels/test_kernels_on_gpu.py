"""Every op in every dtype, and every attention kernel that is installed, compared with torch on a GPU."""

import m3ae_kernels
import pytest
import torch
from m3ae_kernels.attention import cuda
from m3ae_kernels.attention.kernel import Kernel
from m3ae_kernels.attention.padded import PADDED
from m3ae_kernels.tuning.check import DTYPES, check_small, check_timed
from m3ae_kernels.tuning.workloads import LARGE, ODD, OPS, Sizes, make

GPU, CPU = torch.device("cuda"), torch.device("cpu")
SHAPES = ((16, 64, 70), (16, 32, 277))  # heads, head dimension and rows of a sample in M3AE-Large's encoder and decoder


def assert_correct(name: str, device: torch.device, sizes: Sizes | None = None, module=m3ae_kernels) -> None:
    """Without `sizes`, compare an op in every dtype with float64, at small odd sizes. With `sizes`, compare it in bf16
    with float32, at these sizes. The op must not wait for the GPU, and two runs must be bitwise identical."""
    if sizes is None:
        checks = [check_small(name, dtype, device, module=module) for dtype in DTYPES]
    else:
        checks = [check_timed(make(name, sizes, torch.bfloat16, device), module)]
    assert not any(check.problems for check in checks), checks


def assert_attention_correct(name: str, make: cuda.Maker, device: torch.device, shapes=SHAPES) -> None:
    """Compare an attention kernel with padded matrix products, with all queries and with half of them."""
    try:
        make(device)
    except (ImportError, cuda.NotAvailable) as error:
        pytest.skip(f"{name} is not available: {error}")
    for dtype in cuda.HALVES:
        for shape in shapes:
            inputs = cuda.example(device, dtype, *shape)
            assert name in cuda.fastest({name: make}, device, inputs, inputs), (dtype, shape)  # the log names the error


@pytest.mark.gpu(seconds=300)
@pytest.mark.parametrize("name", OPS)
def test_an_op_equals_torch_at_odd_sizes_in_every_dtype(name, monkeypatch):
    monkeypatch.setenv("M3AE_KERNELS_IMPL", "triton")
    assert_correct(name, GPU)


@pytest.mark.gpu(seconds=300)
@pytest.mark.parametrize("name", OPS)
def test_an_op_equals_torch_at_the_sizes_of_the_large_config(name, monkeypatch):
    monkeypatch.setenv("M3AE_KERNELS_IMPL", "triton")
    assert_correct(name, GPU, LARGE)


@pytest.mark.gpu(seconds=300)
@pytest.mark.parametrize("name", cuda.MAKERS)
def test_an_attention_kernel_equals_padded_attention(name):
    assert_attention_correct(name, cuda.MAKERS[name], GPU)


def test_the_checks_find_a_wrong_op():
    class Wrong:
        def gather_tokens(*inputs, **options):
            return 1.5 * m3ae_kernels.gather_tokens(*inputs, **options)

    for sizes in (None, ODD):
        assert_correct("gather_tokens", CPU, sizes)
        with pytest.raises(AssertionError, match="error"):
            assert_correct("gather_tokens", CPU, sizes, Wrong)


def test_the_checks_find_a_wrong_attention_kernel_and_skip_one_that_is_not_installed():
    def missing(device):
        raise cuda.NotAvailable("no such GPU")

    wrong = Kernel("wrong", lambda *parts: tuple(1.5 * part for part in PADDED.forward(*parts)), PADDED.backward)
    few = ((1, 16, 5),)
    assert_attention_correct("padded", lambda device: PADDED, CPU, few)
    with pytest.raises(AssertionError):
        assert_attention_correct("wrong", lambda device: wrong, CPU, few)
    with pytest.raises(pytest.skip.Exception, match="no such GPU"):
        assert_attention_correct("missing", missing, CPU, few)
