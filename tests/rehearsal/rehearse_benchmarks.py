"""`python -m benchmarks.gpu`, its measuring and its report, as on a GPU."""

from dataclasses import replace

import m3ae_kernels
import pytest
import torch

from benchmarks import results
from benchmarks.alone import peak_above
from benchmarks.gpu import __main__ as program
from benchmarks.gpu.check import check_small
from benchmarks.measure import CudaDevice
from benchmarks.ops import ODD
from tests.rehearsal.fake_cuda import CUDA

TINY = replace(ODD, samples=1, vocab=40, encoder=16, decoder=16)


@pytest.fixture
def device(cuda, monkeypatch):
    """A GPU whose cache is small, which nothing is waited for."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*(min(n, 8) for n in size), **options))
    made = CudaDevice()
    monkeypatch.setattr(torch, "empty", empty)
    return made


def test_checks_and_times(tmp_path, device, monkeypatch):
    monkeypatch.setattr(program, "CudaDevice", lambda: device)
    options = {"sizes": TINY, "small": TINY, "compiled": False, "rounds": 1, "repeats": 1}
    assert program.main(["--results", str(tmp_path)], **options) == 0
    checks = results.read(tmp_path / "gpu-checks.json")
    assert len(checks) == 8 + 24 and {row["verdict"] for row in checks} == {"ok"}
    rows = results.read(tmp_path / "gpu-ops.json")
    assert {row["p50 ms"] for row in rows} == {1.0} and all(row["of roofline"] > 0 for row in rows)
    assert results.device_name() == "NVIDIA H100 80GB HBM3"


def test_a_wrong_op_is_found(cuda):
    class Wrong:
        def gather_tokens(*inputs, **options):
            return 1.5 * m3ae_kernels.gather_tokens(*inputs, **options)

    check = check_small("gather_tokens", torch.float32, CUDA, TINY, Wrong)
    assert [problem.partition(":")[0] for problem in check.problems] == ["out", "x"]


def test_an_op_that_waits_for_the_gpu_is_found(cuda, monkeypatch):
    class Waiting:
        def gather_tokens(*inputs, **options):
            if torch.cuda.get_sync_debug_mode():
                raise RuntimeError("called a synchronizing CUDA operation")
            return m3ae_kernels.gather_tokens(*inputs, **options)

    check = check_small("gather_tokens", torch.float32, CUDA, TINY, Waiting)
    assert check.problems == ["waits for the device: called a synchronizing CUDA operation"]
    assert cuda.events[-1] == "sync_debug_mode 0"


def test_peak_memory_is_the_allocators(cuda):
    assert peak_above(lambda: None, CUDA) == 123_000_000
    assert peak_above(lambda: None, torch.device("cpu")) >= 0


def test_no_gpu_is_told(capsys):
    assert "H100" not in results.device_name()
    assert program.main(["--quick"]) == 2
    assert "no CUDA device" in capsys.readouterr().err
