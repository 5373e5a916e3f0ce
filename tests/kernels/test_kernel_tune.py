"""`m3ae-kernels tune` on a machine without a GPU: the command is refused. Its search is tested with a simulated
clock."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import m3ae_kernels
import pytest
import torch
from m3ae_kernels import __main__ as program
from m3ae_kernels import reference, tuning
from m3ae_kernels.aot import Report
from m3ae_kernels.tuning import candidates, limited_process, search
from m3ae_kernels.tuning.check import DTYPES, check_small, check_timed
from m3ae_kernels.tuning.timing import CpuDevice
from m3ae_kernels.tuning.workloads import LARGE, ODD, OPS, make

from tests.helpers.trainer import ROOT

CPU = torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_reported_in_one_line_with_exit_code_2(capsys):
    assert program.main(["tune"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("m3ae-kernels tune: ") and "no GPU" in message and message.count("\n") == 1


def test_an_unknown_kernel_and_an_old_gpu_are_refused(capsys, monkeypatch):
    assert program.main(["tune", "nope"]) == 2
    assert "nope must be one of attention, attention_backward" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    assert program.main(["tune"]) == 2
    assert "do not support this GPU" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", OPS)
def test_checks_pass_for_correct_ops(name):
    checks = [check_small(name, dtype, CPU) for dtype in DTYPES]
    assert all(not c.problems and 0 <= c.worst <= 1 for c in checks), checks


def test_checks_fail_for_incorrect_ops():
    def wrong(*args, **kwargs):
        return m3ae_kernels.masked_pixel_loss(*args, **kwargs) * 1.01

    module = SimpleNamespace(**vars(m3ae_kernels) | {"masked_pixel_loss": wrong})
    assert check_small("masked_pixel_loss", torch.float32, CPU, module=module).problems
    assert not check_small("patch_embed", torch.float32, CPU, module=module).problems


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
    """The sizes that are timed also reach code that smaller odd sizes do not reach."""

    def wrong(images, patch_ids, **options):
        out = m3ae_kernels.patch_embed(images, patch_ids, **options)
        return torch.cat((out[:-2], 1.5 * out[-2:]))

    work = make("patch_embed", ODD, torch.bfloat16, CPU)
    assert not check_timed(work).problems
    assert check_timed(work, SimpleNamespace(patch_embed=wrong)).problems


def test_written_tables_are_the_package_tables(tmp_path):
    for path in tuning.FOLDER.glob("*.json"):
        assert search.write(path.stem, json.loads(path.read_text()), tmp_path).read_text() == path.read_text()


def test_the_workloads_are_those_of_the_shipped_config():
    """The image size of the config is 256 px, so the encoder has about 70 rows a sample and the decoder 277."""
    encoder, decoder = (
        make(f"packed_attention, {part}", replace(LARGE, samples=2048, encoder=64, decoder=32), torch.float16, CPU)
        for part in ("encoder", "decoder")
    )
    rows = [work.tensors["cu_seqlens"][-1].item() / 2048 for work in (encoder, decoder)]
    assert rows == pytest.approx([70, 277], abs=0.5)
    assert encoder.samples == "D=64, up to 128 keys" and decoder.samples == "D=32, more than 128 keys"


def test_matmul_candidates_are_compiled_ahead_of_time(monkeypatch):
    few = candidates.possible("sm_90", "16")[:2]
    monkeypatch.setattr(candidates, "possible", lambda *_: few)
    monkeypatch.setattr(candidates, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))
    sound = Report("k", "sm_90", "bf16", "", registers=128, shared_bytes=50_000)
    compiled = []
    monkeypatch.setattr(candidates, "compile_case", lambda case, *_: compiled.append(case) or sound)
    candidates.compiled.cache_clear()
    try:
        for _ in range(2):
            assert candidates.settings_to_try("pixel_error", few[0], "sm_90", "16") == few
    finally:
        candidates.compiled.cache_clear()
    assert [(case.kernel, case.constants["C"]) for case in compiled] == [("pixel_error", 3)] * 2


def test_settings_of_small_kernels_are_close_to_the_present_ones():
    near = candidates.settings_to_try("rows", {"BLOCK_M": 8, "BLOCK_D": 256, "num_warps": 4}, "sm_90", "16")
    assert len(near) == 18 and all(s.keys() == near[0].keys() for s in near)


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


@pytest.mark.parametrize("kernel", ["attention", "attention_backward"])
def test_attention_is_tuned_with_its_own_numbers_of_warps_and_stages(kernel):
    now = tuning.settings("sm_90", kernel, "16")
    near = candidates.settings_to_try(kernel, now, "sm_90", "16")
    assert now in near and {s["num_warps"] for s in near} == {2, 4, 8} and {s["num_stages"] for s in near} == {1, 2, 3}
    # see kernels/TRIED.md: two stages make loads asynchronous
    assert now | {"TILE_M": 2048, "TILE_N": 2048, "num_stages": 2} in near
    assert len({json.dumps(s) for s in near}) == len(near) <= 9 + 2 * 12


START, BEST = {"BLOCK_M": 8, "BLOCK_D": 256}, {"BLOCK_M": 16, "BLOCK_D": 256}


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    """Simulate tuning with a clock for which one setting is best; `asked` contains the ops that were timed. Each kernel
    is timed in the op in which it takes the most time."""
    table = json.loads(json.dumps(tuning.table("interpreter")))
    table["rows"]["32"] = START
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
        if work.op == "packed_attention":
            # the fastest tile of the encoder is 3, and the fastest tile of the decoder is 4
            here = tuning.settings("interpreter", "attention_backward", "32", work.samples).get("num_warps", 2)
            return {"attention": 1.0, "attention_backward": 2.0 + abs(here - (3 if "encoder" in work.name else 4))}
        return {"rows": 5 * rows, "segment_sum": 3.0} if work.name == "scatter_tokens, encoder" else {}

    monkeypatch.setattr(tuning, "table", lambda arch: table)
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    monkeypatch.setattr(search, "kernel_ms", clock)
    monkeypatch.setattr(search, "check_timed", lambda work: SimpleNamespace(problems=[]))

    def some(kernel, now, *_):
        if kernel == "rows":
            return [now | {"BLOCK_M": m} for m in (4, 16)]
        return [now | {"num_warps": w} for w in (3, 4)] if kernel == "attention_backward" else [now]

    trials = tmp_path / "trials.json"

    def run(device=None, only=(), sizes=ODD):
        asked.clear()
        return search.tune(device or CpuDevice(), sizes, torch.float32, trials, only, some)

    return SimpleNamespace(run=run, table=table, asked=asked, folder=tmp_path, trials=trials)


def trials_of(tuned, kernel="rows") -> list[tuple]:
    return [(r["ms"], r["kept"], r["verdict"]) for r in search.read(tuned.trials) if r.get("kernel") == kernel]


def test_tuning_keeps_the_fastest_setting_and_can_be_resumed(tuned):
    assert tuned.run(only=["rows"]) == 0
    written = json.loads((tuned.folder / "interpreter.json").read_text())
    assert written["rows"]["32"] == BEST and written["rows"]["16"] == tuned.table["rows"]["16"]
    expected = [(10.0, False, "ok"), (None, False, "out of resources"), (5.0, True, "ok")]
    assert trials_of(tuned) == expected
    assert {row["op"] for row in search.read(tuned.trials)} == {"scatter_tokens, encoder"}
    tuned.table["rows"]["32"] = START
    assert tuned.run(only=["rows"]) == 0
    assert tuned.asked == list(OPS)  # each op once, to find the one in which the kernel takes the most time
    assert tuned.table["rows"]["32"] == BEST and trials_of(tuned) == expected


def test_attention_has_an_entry_for_each_head_dimension_and_length_and_its_backward_pass_is_tuned_first(tuned):
    sizes = replace(ODD, samples=2, grid=12, visible=20, encoder=64, decoder=32)
    assert tuned.run(sizes=sizes) == 0
    order = [kernel for kernel, _ in search.busiest(CpuDevice(), sizes, torch.float32, [], tuned.trials)]
    assert order[:4] == ["attention_backward"] * 2 + ["attention"] * 2
    entries = json.loads((tuned.folder / "interpreter.json").read_text())["attention_backward"]
    assert entries["32, D=64, up to 128 keys"]["num_warps"] == 3
    assert entries["32, D=32, more than 128 keys"]["num_warps"] == 4
    assert entries["32"] == tuned.table["attention_backward"]["32"] and "num_warps" not in entries["32"]


def test_tuning_one_kernel_does_not_change_the_others(tuned):
    assert tuned.run(only=["segment_sum"]) == 0
    assert trials_of(tuned) == [] and trials_of(tuned, "segment_sum") == [(3.0, True, "ok")]


def test_a_setting_that_breaks_the_device_is_not_tried_again(tuned, monkeypatch):
    broken = CpuDevice()
    monkeypatch.setattr(broken, "works", lambda: tuned.table["rows"]["32"]["BLOCK_M"] != 4)
    monkeypatch.setattr(search, "OPS", ("scatter_tokens, encoder",))
    with pytest.raises(search.DeviceBroken):
        tuned.run(broken)
    assert trials_of(tuned) == [(10.0, True, "ok"), (None, False, "out of resources")]
    tuned.trials.write_text(tuned.trials.read_text().replace("out of resources", "under way"))  # as after a crash
    tuned.table["rows"]["32"] = START
    assert tuned.run() == 0
    assert trials_of(tuned) == [(10.0, False, "ok"), (None, False, "under way"), (5.0, True, "ok")]


def test_a_kernel_is_tuned_in_another_op_if_an_op_ends_its_process_before_the_search(tuned, monkeypatch, capsys):
    """The op ends the first process, or makes it hang until it is killed."""
    clock = search.kernel_ms

    def ends(device, work, repeats=0):
        if work.name == "scatter_tokens, encoder":
            raise KeyboardInterrupt
        return clock(device, work, repeats)

    with monkeypatch.context() as patch:
        patch.setattr(search, "kernel_ms", ends)
        with pytest.raises(KeyboardInterrupt):
            tuned.run(only=["rows"])
    assert [row["op"] for row in search.read(tuned.trials)] == ["scatter_tokens, encoder"]
    assert tuned.run(only=["rows"]) == 0
    assert "scatter_tokens, encoder is left out: in an earlier process, it crashed" in capsys.readouterr().out
    assert trials_of(tuned) == [(2.0, False, "ok"), (None, False, "out of resources"), (1.0, True, "ok")]


def test_an_unchecked_setting_is_not_kept_if_its_check_ends_the_process(tuned, monkeypatch):
    def ends(work):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(search, "check_timed", ends)
        with pytest.raises(KeyboardInterrupt):
            tuned.run(only=["rows"])
    tuned.table["rows"]["32"] = START
    assert tuned.run(only=["rows"]) == 0
    assert trials_of(tuned) == [(10.0, True, "ok"), (None, False, "out of resources"), (5.0, False, "under way")]
    assert tuned.table["rows"]["32"] == START


def test_the_fastest_setting_is_not_kept_if_it_is_wrong(tuned, monkeypatch):
    wrong = lambda work: SimpleNamespace(problems=["out: error"] if tuned.table["rows"]["32"] == BEST else [])  # noqa: E731
    monkeypatch.setattr(search, "check_timed", wrong)
    assert tuned.run(only=["rows"]) == 0
    assert trials_of(tuned) == [(10.0, True, "ok"), (None, False, "out of resources"), (5.0, False, "out: error")]


@pytest.mark.parametrize(
    ("end", "message"),
    [
        ("os.abort()", "was ended by SIGABRT"),
        (f"sys.exit({program.BROKEN})", "ended with exit code 4"),
        ("ctypes.PyDLL(None).sleep(60)", "did not end within 2 s and was killed"),  # does not release Python's lock
    ],
)
def test_a_setting_that_ends_its_process_or_hangs_is_skipped(tmp_path, capsys, end, message):
    """The first two processes end at a setting, and the third finishes."""
    trials = tmp_path / "trials.json"
    search.save(trials, [])
    code = f"""import ctypes, json, os, sys; path = {str(trials)!r}; rows = json.load(open(path)) + [{{}}]
json.dump(rows, open(path, "w")); len(rows) < 3 and {end}"""
    assert program.in_processes([sys.executable, "-c", code], trials, 2) == 1
    assert len(search.read(trials)) == 3
    assert capsys.readouterr().out.count(message) == 2


def test_tuning_ends_if_a_process_exits_without_a_trial(tmp_path):
    trials = tmp_path / "trials.json"
    search.save(trials, [])
    assert program.in_processes([sys.executable, "-c", "raise SystemExit(4)"], trials, 60) == 1


def test_a_killed_process_takes_its_children_with_it(tmp_path):
    code = """import subprocess, sys, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open(sys.argv[1], "w").write(str(child.pid)); time.sleep(60)"""
    file = tmp_path / "pid"
    assert limited_process.run([sys.executable, "-c", code, str(file)], 2) is None
    deadline = time.monotonic() + 10
    while os.path.exists(path := f"/proc/{file.read_text()}/stat") and time.monotonic() < deadline:
        if " Z " in Path(path).read_text():
            return
        time.sleep(0.05)
    assert not os.path.exists(path)


def test_a_process_that_makes_progress_is_not_killed(tmp_path):
    code = "import sys, time\nfor _ in range(30): open(sys.argv[1], 'w').write('x'); time.sleep(0.1)"
    file = tmp_path / "progress"
    assert limited_process.run([sys.executable, "-c", code, str(file)], 1.5, file) == 0
    assert limited_process.end_of(-signal.SIGKILL, 1) == "was ended by SIGKILL" and limited_process.end_of(0, 1) == ""


@pytest.mark.slow
def test_kernel_launches_are_timed_and_tuned_on_the_interpreter(tmp_path):
    """The kernels run on Triton's interpreter, and the search writes a table."""
    script = f"""if True:
        import json, shutil, sys, torch
        from pathlib import Path
        from m3ae_kernels import tuning
        from m3ae_kernels.tuning import search
        from m3ae_kernels.tuning.timing import CpuDevice
        from m3ae_kernels.tuning.workloads import ODD, make
        folder = Path({str(tmp_path)!r})
        work = make("gather_tokens + LayerNorm", ODD, torch.float32, torch.device("cpu"))
        times = search.kernel_ms(CpuDevice(), work, repeats=1)
        assert times.keys() >= {{"gather_norm", "gather_norm_backward"}} and all(ms > 0 for ms in times.values())
        tuning.FOLDER, search.OPS, search.REPEATS = folder, ("gather_tokens + LayerNorm",), 1
        near = lambda kernel, now, arch, width: [now | {{"TILE": 2 * now["TILE"]}}] if now["TILE"] < 300 else []
        only = ["gather_norm"]
        assert search.tune(CpuDevice(), ODD, torch.float32, folder / "trials.json", only, near) == 0
        assert all(row["verdict"] == "ok" and row["ms"] > 0 for row in search.read(folder / "trials.json"))"""
    env = os.environ | {"TRITON_INTERPRET": "1", "M3AE_KERNELS_IMPL": "triton"}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "interpreter.json").read_text()).keys() == tuning.table("interpreter").keys()
