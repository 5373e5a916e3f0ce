"""`python -m benchmarks.gpu` with its measurements and its report, as on a GPU."""

import contextlib
import json
import os
import sys
from dataclasses import replace

import m3ae_kernels
import pytest
import torch
from m3ae_kernels import tuning
from m3ae_kernels.attention import Kernel
from m3ae_kernels.attention.padded import PADDED

from benchmarks import results
from benchmarks.alone import peak_above
from benchmarks.gpu import __main__ as program
from benchmarks.gpu import attention, candidates, ceilings, curve, step, tune
from benchmarks.gpu.check import check_small
from benchmarks.gpu.processes import Processes
from benchmarks.measure import CudaDevice
from benchmarks.ops import ODD, OPS
from tests.helpers.trainer import TINY as TRAINER_TINY
from tests.rehearsal.fake_cuda import CUDA

TINY = replace(ODD, samples=1, vocab=40, encoder=16, decoder=16)


@pytest.fixture
def device(cuda, monkeypatch):
    """Simulate a GPU with a small cache, on which no call waits."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*(min(n, 8) for n in size), **options))
    made = CudaDevice()
    monkeypatch.setattr(torch, "empty", empty)
    return made


def test_gpu_checks_and_timings_are_written(tmp_path, device, monkeypatch):
    monkeypatch.setattr(program, "CudaDevice", lambda: device)
    options = {"sizes": TINY, "small": TINY, "compiled": False, "rounds": 1, "repeats": 1}
    assert program.main(["--from", "0", "--results", str(tmp_path)], **options) == 0
    checks = results.read(tmp_path / "gpu-checks.json")
    assert len(checks) == 4 * len(OPS) and {row["verdict"] for row in checks} == {"ok"}
    rows = results.read(tmp_path / "gpu-ops.json")
    assert {row["p50 ms"] for row in rows} == {1.0} and all(row["of roofline"] > 0 for row in rows)
    assert results.device_name() == "NVIDIA H100 80GB HBM3"


def test_each_stage_of_the_plan_writes_its_table(tmp_path, device, monkeypatch):
    monkeypatch.setenv(results.ELSEWHERE, str(tmp_path))
    for module in (ceilings, attention):
        monkeypatch.setattr(module, "CudaDevice", lambda: device)
    monkeypatch.setattr(ceilings, "measure_all", lambda _: [{"what": "copy", "p50 ms": 1.0}])
    monkeypatch.setattr(attention, "SHAPES", {"encoder": (1, 16, 5)})
    monkeypatch.setattr(attention, "SAMPLES", 2)
    fails = Kernel("fails", lambda *_: 1 / 0, None)
    wrong = Kernel("wrong", lambda *parts: tuple(1.5 * part for part in PADDED.forward(*parts)), PADDED.backward)
    makers = {"broken": lambda _: 1 / 0, "fails": lambda _: fails, "wrong": lambda _: wrong}
    monkeypatch.setattr(attention.cuda, "MAKERS", makers)
    monkeypatch.setattr(curve, "measure", lambda folder: folder != tmp_path)
    assert [module.main() for module in (ceilings, attention, curve)] == [0, 0, 0]
    assert {path.name for path in tmp_path.iterdir()} == {"gpu-ceilings.json", "gpu-attention.json"}
    rows = results.read(tmp_path / "gpu-attention.json")
    assert [row["kernel"] for row in rows] == ["padded", "fails", "wrong"]
    assert [row["ms"] is None for row in rows] == [False, True, False]
    assert rows[1]["verdict"] == "division by zero" and rows[2]["verdict"].startswith("off by ")


def test_stages_without_a_gpu_are_refused(capsys):
    assert [module.main() for module in (ceilings, attention, curve)] == [2, 2, 2]
    assert capsys.readouterr().err.count("no CUDA device") == 3


def test_the_plan_starts_without_allocating_gpu_memory(tmp_path, cuda, monkeypatch):
    asked = []
    monkeypatch.setattr(program.plan, "run", lambda *args, again: asked.append((*args, *again)) or 0)
    assert program.main(["--all", "--results", str(tmp_path), "--again", "ops"]) == 0
    assert asked == [(tmp_path, 570, "ops")]


def test_each_part_of_the_benchmark_runs_in_its_own_process(tmp_path, cuda, monkeypatch):
    """Without a GPU, the processes report this, and the program exits with their code."""
    started = []

    class Done(Processes):
        def start(self, command, *arguments, **options):
            started.append(command[3:])
            return super().start([sys.executable, "-c", "raise SystemExit(2)"], *arguments, **options)

    for module in (program.suite, tune):
        monkeypatch.setattr(module, "Processes", Done)
    folder = ["--results", str(tmp_path), "--budget", "50"]
    assert program.main(["--odd", *folder]) == program.main(["--tune", "attention", *folder]) == 2
    assert [command[:-1] for command in started] == [
        ["--odd", *folder, "--from", "0", "--budget"], ["--tune", "attention", *folder, "--from", "0", "--budget"]
    ]  # fmt: skip


def test_the_projects_own_kernels_are_checked_and_tuned(tmp_path, device, monkeypatch):
    """The attention kernels are included, regardless of the kernel that a benchmark would choose."""
    monkeypatch.delenv("M3AE_KERNELS_IMPL")
    monkeypatch.setattr(program, "CudaDevice", lambda: device)
    asked = []
    for module, name in ((program.suite, "check_and_time"), (tune, "tune")):
        monkeypatch.setattr(module, name, lambda *_, **__: asked.append(os.environ["M3AE_KERNELS_IMPL"]) or 0)
    for what in ("--odd", "--tune"):
        assert program.main([what, "--dtype", "bfloat16", "--from", "0", "--results", str(tmp_path)]) == 0
        monkeypatch.delenv("M3AE_KERNELS_IMPL")
    assert asked == ["triton", "triton"]


def test_an_op_that_breaks_the_gpu_ends_only_its_process(tmp_path, device, monkeypatch, capsys):
    def lost(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    assert device.works()
    monkeypatch.setattr(program, "CudaDevice", lambda: device)
    monkeypatch.setattr(program.suite, "check_small", lost)
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    assert program.main(["--odd", "--from", "3", "--results", str(tmp_path)]) == program.suite.BROKEN
    assert not device.works()
    assert "this process can no longer use the GPU: CUDA error" in capsys.readouterr().out
    (row,) = results.read(tmp_path / "gpu-checks.json")
    assert (row["op"], row["error / allowed"]) == (list(OPS)[3], None) and "illegal memory access" in row["verdict"]


def test_block_sizes_are_tuned_on_the_interpreter(tmp_path, device, monkeypatch):
    """Two ops are tuned on Triton's interpreter, with one setting each."""
    monkeypatch.setenv("M3AE_KERNELS_IMPL", "triton")
    monkeypatch.setattr(program, "CudaDevice", lambda: device)
    monkeypatch.setattr(tune, "OPS", ("gather_tokens", "gather_tokens + LayerNorm"))
    monkeypatch.setattr(tune, "REPEATS", 1)
    table = json.loads((tuning.FOLDER / "sm_90.json").read_text())
    (tmp_path / "sm_90.json").write_text(json.dumps(table))
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    monkeypatch.setattr(tuning, "arch_of", lambda device: "sm_90")
    monkeypatch.setattr(candidates, "settings_to_try", lambda kernel, now, arch, width: [now | {"num_warps": 2}])
    assert program.main(["--tune", "--from", "0", "--results", str(tmp_path)], sizes=TINY) == 0
    rows = results.read(tmp_path / "gpu-tuning.json")
    assert {(row["kernel"], row["bits"]) for row in rows} >= {("gather_norm", "16"), ("gather_norm_backward", "32")}
    assert all(row["ms"] >= 1 and row["verdict"] == "ok" for row in rows)  # a millisecond per launch on this clock
    assert json.loads((tmp_path / "sm_90.json").read_text()).keys() == table.keys()


def test_training_steps_are_timed(tmp_path, cuda, monkeypatch):
    """lab/tests/test_benchmarks.py tests the part that starts processes."""
    monkeypatch.setattr(step, "shipped", lambda: [step.Case("tiny", TRAINER_TINY, batch=4, samples=2)])
    monkeypatch.setattr(step, "make_shards", lambda *_, **__: None)
    monkeypatch.setattr(step, "time_trainer", lambda *_, **__: {"samples/s": 10.0})
    rows = [{"part": "idle", "ms per step": 1.0, "fraction": 0.5}]
    monkeypatch.setattr(step, "PROFILE", {"gpu-profile": ("title", lambda path: rows)})

    class Process(contextlib.nullcontext):
        def __init__(self, name, *_, **__):
            super().__init__(self)

        def step(self):
            return 0.5

        def held_bytes(self):
            raise RuntimeError("no memory left")

    monkeypatch.setattr(step, "Alone", Process)
    assert program.main(["--step", "--results", str(tmp_path)]) == 1  # the expert has failed
    assert [row["samples/s"] for row in results.read(tmp_path / "gpu-step.json")] == [10.0, 10.0, None]
    assert len(results.read(tmp_path / "gpu-profile.json")) == 2


def test_the_time_budget_of_a_benchmark_may_end_at_any_point(tmp_path, device, monkeypatch, capsys):
    monkeypatch.setattr(program, "CudaDevice", lambda: device)
    options = {"sizes": TINY, "small": TINY, "compiled": False, "rounds": 10**9}
    assert program.main(["--from", "0", "--results", str(tmp_path), "--budget", "2"], **options) == 0
    assert "--budget: 2 s are over" in capsys.readouterr().out
    assert len(results.read(tmp_path / "gpu-checks.json")) == 1


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


def test_peak_memory_is_read_from_the_allocator(cuda):
    assert peak_above(lambda: None, CUDA) == 123_000_000
    assert peak_above(lambda: None, torch.device("cpu")) >= 0


def test_a_missing_gpu_is_reported(capsys):
    assert "H100" not in results.device_name()
    assert program.main(["--quick"]) == 2
    with pytest.raises(SystemExit):
        program.main(["--again", "ops"])
    assert "no CUDA device" in capsys.readouterr().err
