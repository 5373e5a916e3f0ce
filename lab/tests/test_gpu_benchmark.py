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
from benchmarks.gpu import candidates, suite
from benchmarks.gpu import tune as tuner
from benchmarks.gpu.check import Check, check_all_small, check_timed
from benchmarks.gpu.timing import least_ms
from benchmarks.gpu.tune import tune
from benchmarks.gpu.tune import write as write_table
from benchmarks.measure import CpuDevice, measure
from benchmarks.ops import ODD, OPS, make
from tests.helpers.trainer import ROOT

CPU = torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_reported_in_one_line_with_exit_code_2():
    result = subprocess.run([sys.executable, "-m", "benchmarks.gpu"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert "no CUDA device" in result.stderr and len(result.stderr.strip().splitlines()) == 1


def test_checks_pass_for_correct_ops_and_fail_for_incorrect_ones():
    checks = check_all_small(CPU)
    assert len(checks) == 3 * len(OPS)
    assert all(not c.problems and 0 <= c.worst <= 1 for c in checks), checks

    def wrong(*args, **kwargs):
        return m3ae_kernels.masked_pixel_loss(*args, **kwargs) * 1.01

    module = SimpleNamespace(**vars(m3ae_kernels) | {"masked_pixel_loss": wrong})
    found = {c.op for c in check_all_small(CPU, module=module) if c.problems}
    assert found == {"masked_pixel_loss", "masked_pixel_loss, norm_pix"}


@pytest.mark.parametrize("name", OPS)
def test_a_reference_computed_in_chunks_equals_the_reference(name):
    work = make(name, replace(ODD, samples=3), torch.float64, CPU)
    upstream = work.upstream(work.call(reference))
    whole, chunked = work.run(reference, upstream), work.run_in_chunks(reference, upstream, 4)
    assert whole.keys() == chunked.keys()
    for key in whole:
        got, expected = chunked[key].double(), whole[key].double()
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")


def test_the_results_of_timed_code_are_checked():
    """The check also covers code for which the odd sizes are too small."""

    def wrong(images, patch_ids, **options):
        out = m3ae_kernels.patch_embed(images, patch_ids, **options)
        return torch.cat((out[:-2], 1.5 * out[-2:]))

    work = make("patch_embed", ODD, torch.bfloat16, CPU)
    assert not check_timed(work).problems
    assert check_timed(work, SimpleNamespace(patch_embed=wrong)).problems


def test_results_of_checks_and_timings_are_written(tmp_path, capsys):
    checks = []
    suite.check_and_time(CpuDevice(), suite.items(), checks, tmp_path, sizes=ODD, compiled=False, rounds=1, repeats=1)
    assert len(checks) == 4 * len(OPS) and not any(c.problems for c in checks)
    rows = results.read(tmp_path / "gpu-ops.json")
    assert {row["implementation"] for row in rows} >= {"m3ae_kernels", "eager", "matmuls alone"}
    others = 4 + 3 + hasattr(torch.nn.functional, "linear_cross_entropy")  # matmuls alone; SDPA
    assert len(rows) == 3 * (2 * len(OPS) + others)
    assert all(0 < row["p20 ms"] <= row["p50 ms"] <= row["p80 ms"] for row in rows)
    assert [row["verdict"] for row in results.read(tmp_path / "gpu-checks.json")] == ["ok"] * 4 * len(OPS)
    assert "masked_token_loss" in capsys.readouterr().out


@pytest.fixture
def failing(monkeypatch):
    """Use two ops, one of which raises an error."""

    def check(name, dtype, *_):
        if name == "b":
            raise ValueError("no such\nkernel")
        return Check(name, suite.SMALL, "float32", 0.5, [])

    monkeypatch.setattr(suite, "check_small", check)
    return [suite.Item(suite.SMALL, name, torch.float32) for name in "abc"]


def verdicts(folder) -> dict:
    return {row["op"]: row["verdict"] for row in results.read(folder / "gpu-checks.json")}


def test_an_op_that_raises_an_error_loses_only_its_own_results(tmp_path, failing, capsys):
    checks = []
    suite.check_and_time(CpuDevice(), failing, checks, tmp_path)
    assert verdicts(tmp_path) == {"a": "ok", "b": "raises ValueError: no such", "c": "ok"}
    assert len(checks) == 3 and "Traceback" in capsys.readouterr().err


def test_an_op_that_breaks_the_device_ends_its_process_and_the_next_process_continues(tmp_path, failing, monkeypatch):
    device = CpuDevice()
    monkeypatch.setattr(device, "works", lambda: False)
    with pytest.raises(suite.DeviceBroken):
        suite.check_and_time(device, failing, [], tmp_path)
    assert verdicts(tmp_path) == {"a": "ok", "b": "raises ValueError: no such"}
    suite.check_and_time(device, failing, [], tmp_path, first=int((tmp_path / suite.AT).read_text()) + 1)
    assert verdicts(tmp_path) == {"a": "ok", "b": "raises ValueError: no such", "c": "ok"}


@pytest.mark.parametrize("end", ["finished", "failed"])
def test_a_process_that_dies_loses_only_one_item(tmp_path, end):
    """One process dies at the second item. The next process exits at the fourth item, after it has recorded the failure
    itself."""
    ends = {0: (1, "import os; os.abort()"), 2: (3, f"raise SystemExit({suite.BROKEN})"), 4: (5, "")}
    if end == "failed":
        ends[0] = (4, "raise SystemExit(1)")
    asked = []

    def command(first):
        asked.append(first)
        at, code = ends[first]
        return [sys.executable, "-c", f"open({str(tmp_path / suite.AT)!r}, 'w').write('{at}'); {code}"]

    work = [suite.Item(suite.SMALL, name, torch.float32) for name in "abcdef"]
    assert suite.in_processes(command, work, tmp_path, 60, "tiny") == 1
    assert asked == ([0] if end == "failed" else [0, 2, 4])
    if end == "finished":
        assert verdicts(tmp_path) == {"b": "the process ended with SIGABRT"}


def test_tuning_ends_if_a_process_exits_without_a_trial(tmp_path):
    """Tuning stops if a process ends before it has tried a setting."""
    results.save(tuner.TUNING, "t", [], tmp_path)
    row = f"""import json; path = {str(tmp_path / "gpu-tuning.json")!r}; data = json.load(open(path))
n = len(data["rows"]); data["rows"] += [{{}}] * (n < 2); json.dump(data, open(path, "w")); raise SystemExit(4)"""
    assert tuner.in_processes([sys.executable, "-c", row], tmp_path, 60) == 1
    assert len(results.read(tmp_path / "gpu-tuning.json")) == 2


def test_roofline_fractions_are_computed():
    assert least_ms((989e12, 1), "NVIDIA H100 80GB HBM3") == pytest.approx(1e3)
    assert least_ms((1, 4.8e12), "NVIDIA H200") == pytest.approx(1e3)
    assert least_ms((1, 1), "a card nobody knows") is None


def test_measurements_alternate_between_functions():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    timings = measure(CpuDevice(), functions, rounds=2, repeats=2)
    assert "".join(calls) == "aaabbb" + "aabb" * 2 + "ab"  # warm-up, alternating rounds, peak memory
    assert all(t.p20 <= t.p50 <= t.p80 for t in timings.values())


def test_written_tables_are_the_package_tables(tmp_path):
    for path in tuning.FOLDER.glob("*.json"):
        assert write_table(path.stem, json.loads(path.read_text()), tmp_path).read_text() == path.read_text()


def test_tuning_candidates_are_those_of_the_kernels():
    """The committed files contain about a dozen candidates for each matmul kernel."""
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


def test_unsound_and_slow_candidates_are_excluded():
    possible = candidates.possible("sm_90", "16")
    assert all(s["BLOCK_M"] * s["BLOCK_N"] <= 128 * 32 * s["num_warps"] for s in possible)
    reports = [Report("k", "sm_90", "bf16", "", registers=128, shared_bytes=50_000) for _ in possible]
    kept = candidates.best("sm_90", "16", list(zip(possible, reports)))
    tiles = {(s["BLOCK_M"], s["BLOCK_N"]) for s in possible}
    assert len(kept) == 2 * len(tiles)
    for report in reports:
        report.problems = ("spills",)
    assert candidates.best("sm_90", "16", list(zip(possible, reports))) == []


BEST = {"BLOCK_M": 16, "BLOCK_D": 256}


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    """Simulate tuning with a clock for which one setting is best; `asked` contains the ops that were timed. Each kernel
    is timed in the op in which it takes the most time."""
    table = json.loads(json.dumps(tuning.table("interpreter")))
    table["rows"]["32"] = {"BLOCK_M": 8, "BLOCK_D": 256}
    asked = []

    def clock(device, work, repeats=0):
        asked.append(work.name)
        if table["rows"]["32"]["BLOCK_M"] == 4:
            raise RuntimeError("out of resources")
        rows = 1.0 if table["rows"]["32"] == BEST else 2.0
        if work.name == "gather_tokens":
            return {"rows": rows}
        if work.name == "patch_embed":
            raise RuntimeError("an op that raises")
        return {"rows": 5 * rows, "segment_sum": 3.0} if work.name == "scatter_tokens, encoder" else {}

    monkeypatch.setattr(tuning, "table", lambda arch: table)
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    monkeypatch.setattr(tuner, "kernel_ms", clock)
    monkeypatch.setattr(tuner, "check_timed", lambda work: SimpleNamespace(problems=[]))

    def run(device=None, **options):
        asked.clear()
        some = lambda kernel, now, *_: [now | {"BLOCK_M": m} for m in (4, 16)] if kernel == "rows" else [now]  # noqa: E731
        return tune(device or CpuDevice(), ODD, torch.float32, tmp_path, some, **options)

    return SimpleNamespace(run=run, table=table, asked=asked, folder=tmp_path)


def trials_of(folder, kernel="rows") -> list[tuple]:
    rows = results.read(folder / "gpu-tuning.json")
    return [(r["ms"], r["kept"], r["verdict"]) for r in rows if r["kernel"] == kernel]


def test_tuning_keeps_the_fastest_setting_and_can_be_resumed(tuned):
    assert tuned.run() == 0
    written = json.loads((tuned.folder / "interpreter.json").read_text())
    assert written["rows"]["32"] == BEST and written["rows"]["16"] == tuning.table("interpreter")["rows"]["16"]
    expected = [(10.0, "", "ok"), (None, "", "out of resources"), (5.0, "yes", "ok")]
    assert trials_of(tuned.folder) == expected and {
        r["op"] for r in results.read(tuned.folder / "gpu-tuning.json")
    } == {"scatter_tokens, encoder"}
    tuned.table["rows"]["32"] = {"BLOCK_M": 8, "BLOCK_D": 256}
    assert tuned.run() == 0
    assert tuned.asked == list(OPS)  # only the search for the op in which a kernel takes the most time
    assert tuned.table["rows"]["32"] == BEST and trials_of(tuned.folder) == expected


def test_tuning_one_kernel_does_not_change_the_others(tuned):
    assert tuned.run(only=["segment_sum"]) == 0
    assert trials_of(tuned.folder) == [] and trials_of(tuned.folder, "segment_sum") == [(3.0, "yes", "ok")]


def test_a_setting_that_breaks_the_device_is_not_tried_again(tuned, monkeypatch):
    broken = CpuDevice()
    monkeypatch.setattr(broken, "works", lambda: tuned.table["rows"]["32"]["BLOCK_M"] != 4)
    monkeypatch.setattr(tuner, "OPS", ("scatter_tokens, encoder",))
    with pytest.raises(suite.DeviceBroken):
        tuned.run(broken)
    assert trials_of(tuned.folder) == [(10.0, "yes", "ok"), (None, "", "out of resources")]
    path = tuned.folder / "gpu-tuning.json"
    path.write_text(path.read_text().replace("out of resources", "under way"))  # as if the process had died
    tuned.table["rows"]["32"] = {"BLOCK_M": 8, "BLOCK_D": 256}
    assert tuned.run() == 0
    assert trials_of(tuned.folder) == [(10.0, "", "ok"), (None, "", "under way"), (5.0, "yes", "ok")]


def test_the_fastest_setting_is_not_kept_if_it_is_wrong(tuned, monkeypatch):
    wrong = lambda work: SimpleNamespace(problems=["out: error"] if tuned.table["rows"]["32"] == BEST else [])  # noqa: E731
    monkeypatch.setattr(tuner, "check_timed", wrong)
    assert tuned.run() == 0
    assert trials_of(tuned.folder) == [(10.0, "yes", "ok"), (None, "", "out of resources"), (5.0, "", "out: error")]


def test_chosen_settings_are_written_to_the_tables(tuned):
    assert tuned.run() == 0
    (tuned.folder / "out/stage").mkdir(parents=True)
    (tuned.folder / "gpu-tuning.json").rename(tuned.folder / "out/stage/gpu-tuning.json")
    (tuned.folder / "interpreter.json").unlink()
    tuned.table["rows"]["32"] = {"BLOCK_M": 8, "BLOCK_D": 256}
    for _ in range(2):
        tuner.apply(tuned.folder / "out")
        assert json.loads((tuned.folder / "interpreter.json").read_text())["rows"]["32"] == BEST


@pytest.mark.parametrize("kernel", ["attention", "attention_backward"])
def test_attention_is_tuned_with_its_own_numbers_of_warps_and_stages(kernel):
    now = tuning.table("sm_90")[kernel]["16"]
    near = candidates.settings_to_try(kernel, now, "sm_90", "16")
    assert now in near and {s["num_warps"] for s in near} == {2, 4, 8} and {s["num_stages"] for s in near} == {1, 2, 3}
    assert now | {"TILE_M": 2048, "TILE_N": 2048, "num_stages": 2} in near  # see kernels/TRIED.md
    assert len({json.dumps(s) for s in near}) == len(near) <= 9 + 2 * 12


def test_kernel_launches_are_timed_separately():
    """The kernels run on Triton's interpreter."""
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
