"""`python -m benchmarks.gpu` without a GPU: its refusal, and its parts on a CPU with small sizes."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import m3ae_kernels
import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from m3ae_kernels import tuning  # noqa: E402

import benchmarks  # noqa: E402
from benchmarks.gpu.__main__ import benchmark  # noqa: E402
from benchmarks.gpu.check import check_all  # noqa: E402
from benchmarks.gpu.measure import CpuDevice, measure  # noqa: E402
from benchmarks.gpu.report import environment, least_ms, write  # noqa: E402
from benchmarks.gpu.tune import RUNS, candidates, tune  # noqa: E402
from benchmarks.gpu.tune import write as write_table  # noqa: E402
from benchmarks.gpu.workloads import ODD, workloads  # noqa: E402

CPU = torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_one_line_and_exit_code_2():
    result = subprocess.run([sys.executable, "-m", "benchmarks.gpu"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert "no CUDA device" in result.stderr and len(result.stderr.strip().splitlines()) == 1


def test_checks_pass_and_see_errors():
    checks = check_all(CPU)
    assert len(checks) == 24
    assert all(not c.problems and 0 <= c.worst <= 1 for c in checks), checks

    def wrong(*args, **kwargs):
        return m3ae_kernels.masked_pixel_loss(*args, **kwargs) * 1.01

    names = ("patch_embed", "gather_tokens", "scatter_tokens", "masked_token_loss")
    module = SimpleNamespace(masked_pixel_loss=wrong, **{name: getattr(m3ae_kernels, name) for name in names})
    found = {c.op for c in check_all(CPU, module=module) if c.problems}
    assert found == {"masked_pixel_loss", "masked_pixel_loss, norm_pix"}


def test_benchmark_and_report(tmp_path, monkeypatch, capsys):
    rows = benchmark(CpuDevice(), ODD, torch.float32, compiled=False, rounds=1, repeats=1)
    assert len(rows) == 8 * 3 * 2
    assert {r.variant for r in rows} >= {"m3ae_kernels", "eager"}
    assert all(0 < r.p20_ms <= r.p50_ms <= r.p80_ms for r in rows)
    assert "masked_token_loss" in capsys.readouterr().out
    monkeypatch.setattr(benchmarks, "RESULTS", tmp_path)
    json_path, markdown_path = write(None, environment("NVIDIA Some/Card"), check_all(CPU), rows, "small")
    assert json_path == tmp_path / "nvidia-some-card/kernels.json"
    assert len(json.loads(json_path.read_text())["rows"]) == len(rows)
    table = markdown_path.read_text()
    assert "24 of 24 checks" in table and table.count("| masked_token_loss |") == 6


def test_roofline():
    assert least_ms((989e12, 1), "NVIDIA H100 80GB HBM3") == pytest.approx(1e3)
    assert least_ms((1, 4.8e12), "NVIDIA H200") == pytest.approx(1e3)
    assert least_ms((1, 1), "a card nobody knows") is None


def test_measure_takes_turns():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    timings = measure(CpuDevice(), functions, rounds=2, repeats=2)
    assert "".join(calls) == "aaabbb" + "aabb" * 2 + "ab"  # warm-up, turns, peak
    assert all(t.p20 <= t.p50 <= t.p80 for t in timings.values())


def test_workloads_cover_what_is_tuned():
    assert {work.name for work in workloads(ODD, torch.float32, CPU)} >= set(RUNS.values())
    assert RUNS.keys() == tuning.table("sm_90").keys()


def test_written_tables_are_the_package_tables(tmp_path):
    for path in tuning.FOLDER.glob("*.json"):
        written = write_table(path.stem, json.loads(path.read_text()), tmp_path)
        assert written.read_text() == path.read_text()
    for widths in tuning.table("sm_90").values():
        assert all(c.keys() == widths["16"].keys() for c in candidates(widths["16"]))


def test_tuning_keeps_the_fastest(monkeypatch):
    """On a clock that knows one best setting, tuning finds it."""
    table = json.loads(json.dumps(tuning.table("interpreter")))
    best = {"BLOCK_M": 16, "BLOCK_D": 256}
    written = {}
    monkeypatch.setattr(tuning, "table", lambda arch: table)
    monkeypatch.setattr("benchmarks.gpu.tune.write", lambda arch, table: written.update({arch: table}))
    monkeypatch.setattr("benchmarks.gpu.tune._time", lambda device, work: 1.0 if table["rows"]["32"] == best else 2.0)
    tune(CpuDevice(), ODD, torch.float32, log=lambda line: None)
    assert written["interpreter"]["rows"]["32"] == best
    assert written["interpreter"]["rows"]["16"] != best
