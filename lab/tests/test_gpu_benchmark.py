"""`python -m benchmarks.gpu` without a GPU: its refusal, and its parts on a CPU with small sizes."""

import ast
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import m3ae_kernels
import pytest
import torch
from m3ae_kernels import reference, tuning
from m3ae_kernels.aot import Report

from benchmarks import results
from benchmarks.gpu import candidates
from benchmarks.gpu.__main__ import check_and_time
from benchmarks.gpu.check import check_all_small, check_timed
from benchmarks.gpu.timing import least_ms
from benchmarks.gpu.tune import tune
from benchmarks.gpu.tune import write as write_table
from benchmarks.measure import CpuDevice, measure
from benchmarks.ops import ODD, OPS, make
from tests.helpers.trainer import ROOT

CPU = torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_one_line_and_exit_code_2():
    result = subprocess.run([sys.executable, "-m", "benchmarks.gpu"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert "no CUDA device" in result.stderr and len(result.stderr.strip().splitlines()) == 1


def test_checks_pass_and_see_errors():
    checks = check_all_small(CPU)
    assert len(checks) == 3 * len(OPS)
    assert all(not c.problems and 0 <= c.worst <= 1 for c in checks), checks

    def wrong(*args, **kwargs):
        return m3ae_kernels.masked_pixel_loss(*args, **kwargs) * 1.01

    module = SimpleNamespace(**vars(m3ae_kernels) | {"masked_pixel_loss": wrong})
    found = {c.op for c in check_all_small(CPU, module=module) if c.problems}
    assert found == {"masked_pixel_loss", "masked_pixel_loss, norm_pix"}


@pytest.mark.parametrize("name", OPS)
def test_a_reference_in_chunks_is_the_reference(name):
    work = make(name, replace(ODD, samples=3), torch.float64, CPU)
    upstream = work.upstream(work.call(reference))
    whole, chunked = work.run(reference, upstream), work.run_in_chunks(reference, upstream, 4)
    assert whole.keys() == chunked.keys()
    for key in whole:
        got, expected = chunked[key].double(), whole[key].double()
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")


def test_what_is_timed_is_checked():
    """Also in parts that the odd sizes are too small for."""

    def wrong(images, patch_ids, **options):
        out = m3ae_kernels.patch_embed(images, patch_ids, **options)
        return torch.cat((out[:-2], 1.5 * out[-2:]))

    work = make("patch_embed", ODD, torch.bfloat16, CPU)
    assert not check_timed(work).problems
    assert check_timed(work, SimpleNamespace(patch_embed=wrong)).problems


def test_checks_and_times_are_written(tmp_path, capsys):
    checks = []
    check_and_time(CpuDevice(), checks, tmp_path, sizes=ODD, compiled=False, rounds=1, repeats=1)
    assert len(checks) == 4 * len(OPS) and not any(c.problems for c in checks)
    rows = results.read(tmp_path / "gpu-ops.json")
    assert {row["implementation"] for row in rows} >= {"m3ae_kernels", "eager", "matmuls alone"}
    others = 4 + 3 + hasattr(torch.nn.functional, "linear_cross_entropy")  # matmuls alone; SDPA
    assert len(rows) == 3 * (2 * len(OPS) + others)
    assert all(0 < row["p20 ms"] <= row["p50 ms"] <= row["p80 ms"] for row in rows)
    assert [row["verdict"] for row in results.read(tmp_path / "gpu-checks.json")] == ["ok"] * 4 * len(OPS)
    assert "masked_token_loss" in capsys.readouterr().out


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


def test_written_tables_are_the_package_tables(tmp_path):
    for path in tuning.FOLDER.glob("*.json"):
        assert write_table(path.stem, json.loads(path.read_text()), tmp_path).read_text() == path.read_text()


def test_candidates_are_those_of_the_kernels():
    """Committed, and about a dozen for each matmul kernel."""
    for kernel, widths in candidates.read("sm_90").items():
        for width, settings in widths.items():
            now = tuning.table("sm_90")[kernel][width]
            assert 3 <= len(settings) <= 12 and all(s.keys() == now.keys() for s in settings)
            assert candidates.settings_to_try(kernel, now, "sm_90", width) == settings
    near = candidates.settings_to_try("rows", {"BLOCK_M": 8, "BLOCK_D": 256, "num_warps": 4}, "sm_90", "16")
    assert len(near) == 18 and all(s.keys() == near[0].keys() for s in near)


def test_candidates_are_compiled_and_written(tmp_path, monkeypatch, capsys):
    few = candidates.possible("sm_90", "16")[:2]
    monkeypatch.setattr(candidates, "FOLDER", tmp_path)
    monkeypatch.setattr(candidates, "possible", lambda *_: few)
    monkeypatch.setattr(candidates, "ProcessPoolExecutor", ThreadPoolExecutor)
    sound = Report("k", "sm_90", "bf16", "", registers=128, shared_bytes=50_000)
    compiled = []
    monkeypatch.setattr(candidates, "compile_case", lambda case, *_: compiled.append(case) or sound)
    assert candidates.main(["--kernel", "pixel_error", "--width", "16", "--jobs", "1"]) == 0
    assert candidates.read("sm_90")["pixel_error"]["16"] == few
    assert {(case.kernel, case.constants["C"]) for case in compiled} == {("pixel_error", 3)}
    assert "2 are compiled" in (out := capsys.readouterr().out) and "2 of 2 are worth timing" in out


def test_candidates_that_are_unsound_or_slow_are_left_out():
    tried = candidates.possible("sm_90", "16")
    assert all(s["BLOCK_M"] * s["BLOCK_N"] <= 128 * 32 * s["num_warps"] for s in tried)
    reports = [Report("k", "sm_90", "bf16", "", registers=128, shared_bytes=50_000) for _ in tried]
    kept = candidates.best("sm_90", "16", list(zip(tried, reports)))
    tiles = {(s["BLOCK_M"], s["BLOCK_N"]) for s in tried}
    assert len(kept) == 2 * len(tiles)
    for report in reports:
        report.problems = ("spills",)
    assert candidates.best("sm_90", "16", list(zip(tried, reports))) == []


def test_tuning_keeps_the_fastest_and_goes_on_where_it_ended(tmp_path, monkeypatch):
    """On a clock that knows one best setting. Each kernel is timed in the op that keeps it busiest."""
    table = json.loads(json.dumps(tuning.table("interpreter")))
    best = {"BLOCK_M": 16, "BLOCK_D": 256}
    asked = []

    def clock(device, work, repeats=0):
        asked.append(work.name)
        rows = 1.0 if table["rows"]["32"] == best else 2.0
        if work.name == "gather_tokens":
            return {"rows": rows}
        return {"rows": 5 * rows, "segment_sum": 3.0} if work.name == "scatter_tokens, encoder" else {}

    def run() -> None:
        tune(CpuDevice(), ODD, torch.float32, tmp_path, lambda kernel, now, *_: [now, now | {"BLOCK_M": 16}])

    monkeypatch.setattr(tuning, "table", lambda arch: table)
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    monkeypatch.setattr("benchmarks.gpu.tune.kernel_ms", clock)
    table["rows"]["32"] = {"BLOCK_M": 8, "BLOCK_D": 256}
    run()
    written = json.loads((tmp_path / "interpreter.json").read_text())
    assert written["rows"]["32"] == best and written["rows"]["16"] == tuning.table("interpreter")["rows"]["16"]
    rows = results.read(tmp_path / "gpu-tuning.json")
    assert [(r["kernel"], r["op"], r["ms"], r["kept"]) for r in rows if r["kernel"] == "rows"] == [
        ("rows", "scatter_tokens, encoder", 10.0, ""),
        ("rows", "scatter_tokens, encoder", 5.0, "yes"),
    ]
    table["rows"]["32"] = {"BLOCK_M": 8, "BLOCK_D": 256}
    asked.clear()
    run()
    assert asked == list(OPS)  # nothing but the search for the busiest op
    assert table["rows"]["32"] == best and results.read(tmp_path / "gpu-tuning.json") == rows


def test_launches_are_timed_by_themselves():
    """On Triton's interpreter."""
    script = """if True:
        import torch
        from benchmarks.gpu.tune import kernel_ms
        from benchmarks.measure import CpuDevice
        from benchmarks.ops import ODD, make
        work = make("gather_tokens + LayerNorm", ODD, torch.float32, torch.device("cpu"))
        print(kernel_ms(CpuDevice(), work, repeats=1))"""
    env = os.environ | {"TRITON_INTERPRET": "1", "M3AE_KERNELS_IMPL": "triton"}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    times = ast.literal_eval(done.stdout.splitlines()[-1])
    assert times.keys() >= {"gather_norm", "gather_norm_backward"} and all(ms > 0 for ms in times.values())
