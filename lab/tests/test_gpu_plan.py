"""`python -m benchmarks.gpu --all` without a GPU: stand-in stages that crash, hang or print nothing; the stages that
run on a machine without further libraries; and the parts of the plan's stages that can run on a CPU."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from dataclasses import replace

import psutil
import pytest
import torch
from m3ae_kernels import tuning
from m3ae_kernels.attention import Kernel
from m3ae_kernels.attention.padded import PADDED

from benchmarks import results
from benchmarks.gpu import __main__ as program
from benchmarks.gpu import archive, attention, ceilings, curve, plan, step, wheels
from benchmarks.gpu.__main__ import parser
from benchmarks.gpu.plan import LATER, PLAN, Stage
from benchmarks.gpu.processes import Processes
from benchmarks.measure import CpuDevice
from tests.helpers.ranks import environment
from tests.helpers.trainer import ROOT


def python(*codes: str) -> dict[str, tuple[str, str]]:
    """Return the commands of a stage. A single command uses the folder of the stage; several commands use its
    sub-folders "0", "1", ..."""
    return {str(i) if len(codes) > 1 else "": ("-c", code) for i, code in enumerate(codes)}


def outcomes(folder) -> dict[str, str]:
    return {path.parent.name: json.loads(path.read_text())["outcome"] for path in folder.glob("*/record.json")}


STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
)
# starts a child that, like a trainer, has its own session and ignores SIGTERM, and prints the child's process id
ORPHAN = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {STUBBORN!r}], stdout=subprocess.PIPE, start_new_session=True)
child.stdout.readline()
print(child.pid, flush=True)
"""


@pytest.fixture
def short_patience(monkeypatch):
    monkeypatch.setattr(plan, "Processes", lambda: Processes(patience=0.2))


def runs(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_a_failing_stage_does_not_affect_other_stages(tmp_path, short_patience):
    """Five stages are bad: one crashes, one hangs, one prints nothing, one requires a program that does not exist, and
    one requires a file that is not a program. All other stages are run, and their output is kept."""
    (tmp_path / "no-program").touch(mode=0o755)
    stages = [
        Stage("first", 60, python("print('one')", "print('two')")),
        Stage("crashes", 60, python("print('so far', flush=True); import os; os.abort()")),
        Stage("hangs", 1, python(STUBBORN)),
        Stage("silent", 60, python("pass")),
        Stage("absent", 60, python("print(1)"), tool="no-such-program"),
        Stage("broken", 60, python("print(1)"), tool=str(tmp_path / "no-program")),
        Stage("last", 60, python("import os; open(os.environ['BENCHMARK_RESULTS'] + '/kept', 'w'); print('end')")),
    ]
    assert plan.run(tmp_path, 200, stages) == 1
    assert outcomes(tmp_path) == {
        "first": "done", "crashes": "failed", "hangs": "out of time", "silent": "silent", "absent": "absent",
        "broken": "failed", "last": "done",
    }  # fmt: skip
    assert (tmp_path / "first/1/log.txt").read_text() == "two\n"
    assert (tmp_path / "crashes/log.txt").read_text() == "so far\n"
    assert "Exec format error" in (tmp_path / "broken/log.txt").read_text()
    assert (tmp_path / "last/kept").exists()


def test_processes_started_by_a_stage_end_with_it(tmp_path, short_patience):
    """An orphaned process that ignores SIGTERM and has its own session is ended too."""
    assert plan.run(tmp_path, 60, [Stage("leaves one", 60, python(ORPHAN))]) == 0
    pid, late = int((tmp_path / "leaves one/log.txt").read_text()), time.monotonic() + 30
    while runs(pid) and time.monotonic() < late:  # a killed process takes a moment to end
        time.sleep(0.01)
    assert not runs(pid)


def test_a_process_that_hangs_and_its_children_are_ended(tmp_path):
    log = tmp_path / "log"
    with Processes(patience=0.2) as processes:
        processes.start([sys.executable, "-c", ORPHAN + STUBBORN], log)
        while not log.read_text().endswith("up\n"):
            time.sleep(0.01)
        pids = processes.running()
        assert len(pids) == 2 and int(log.read_text().split()[0]) in pids
    assert not any(map(runs, pids))


def test_a_process_that_cannot_be_ended_is_recorded(tmp_path, monkeypatch):
    """For example, a process in a hanging driver call cannot be ended."""

    class Stuck(Processes):
        def end(self):
            super().end()
            self.left = [77]

    monkeypatch.setattr(plan, "Processes", lambda: Stuck(patience=0))
    assert plan.run(tmp_path, 60, [Stage("one", 60, python("print(1)"))]) == 0
    assert json.loads((tmp_path / "one/record.json").read_text())["left running"] == [77]


def test_a_process_has_time_to_end_by_itself(tmp_path):
    """The process can clean up after SIGTERM, and its parent also ends properly."""
    log, before = tmp_path / "log", signal.getsignal(signal.SIGTERM)
    # Several short calls of sleep: a signal that arrives just before a call does not shorten it.
    program = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (os.write(1, b"cleaned"), sys.exit()))
os.write(1, b"up ")
while True:
    time.sleep(0.1)
"""
    with pytest.raises(SystemExit) as end, Processes() as processes:
        process = processes.start([sys.executable, "-c", program], log)
        while "up" not in log.read_text():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(99)
    assert end.value.code == 143 and process.returncode == 0
    assert log.read_text().split() == ["up", "cleaned"] and signal.getsignal(signal.SIGTERM) is before


def test_a_plan_resumes_where_the_last_call_ended(tmp_path, capsys):
    count = "import os; open(os.environ['BENCHMARK_RESULTS'] + '/../count', 'a').write('x'); print(1)"
    stages = [
        Stage("one", 1, python(count)),
        Stage("two", 50, python(count)),
        Stage("three", 50, python(count)),
    ]
    assert plan.run(tmp_path, 30, [replace(stages[0], seconds=40), replace(stages[1], seconds=30)]) == LATER
    assert "two needs up to 30 s" in capsys.readouterr().out
    assert outcomes(tmp_path) == {"one": "done"}
    (tmp_path / "two").mkdir()  # from a call that was interrupted
    (tmp_path / "two/log.txt").write_text("old")
    assert plan.run(tmp_path, 200, stages) == 0
    assert (tmp_path / "count").read_text() == "xxx"
    assert (tmp_path / "two/log.txt").read_text() == "1\n"
    assert plan.run(tmp_path, 0.01, stages) == 0 and (tmp_path / "count").read_text() == "xxx"


def test_a_stage_that_lacked_a_module_runs_again_once_it_is_installed(tmp_path, capsys, monkeypatch):
    code = "import os; open(os.environ['BENCHMARK_RESULTS'] + '/../count', 'a').write('x'); import brought_later"
    stages = [Stage("trainer", 50, python(code))]
    assert plan.run(tmp_path / "out", 60, stages) == 1
    assert "failed" in (output := capsys.readouterr().out)
    assert output.endswith("; missing module: brought_later; run python -m benchmarks.gpu.wheels\n")
    assert plan.run(tmp_path / "out", 60, stages) == 1 and (tmp_path / "out/count").read_text() == "x"
    (tmp_path / "brought_later.py").write_text("print('here')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for _ in range(2):
        assert plan.run(tmp_path / "out", 60, stages) == 0 and (tmp_path / "out/count").read_text() == "xx"


def test_caches_are_reused_between_calls(tmp_path):
    show = "import os; print(os.environ['TORCHINDUCTOR_CACHE_DIR'], os.environ['TRITON_CACHE_DIR'])"
    plan.run(tmp_path, 60, [Stage("a", 30, python(show)), Stage("b", 30, python(show), {"TRITON_CACHE_DIR": "x"})])
    a, b = ((tmp_path / name / "log.txt").read_text().split() for name in "ab")
    assert a == [str(tmp_path / "caches" / name) for name in ("inductor", "triton")] and b == [a[0], "x"]


def test_later_stages_use_the_faster_engine(tmp_path):
    show = Stage("which", 30, {"": ("-c", "import sys; print(sys.argv[1])", plan.BETTER)})
    for speeds, expected in (({}, "torch"), ({"large-deepspeed": 9.0, "large-torch": 8.0}, "deepspeed")):
        for name, speed in speeds.items():
            results.save("gpu-step", "t", [{"samples/s": speed}], tmp_path / name)
        assert plan.better_engine(tmp_path) == expected
    plan.run(tmp_path, 60, [show])
    assert (tmp_path / "which/log.txt").read_text() == "deepspeed\n"


def test_programs_named_in_the_plan_exist():
    """Each stage fits into a call of ten minutes, and the programs accept the options of the commands."""
    for stage in PLAN:
        assert stage.seconds <= 500
        for command in stage.commands.values():
            if "benchmarks.gpu" in command:
                options = command[command.index("benchmarks.gpu") + 1 :]
                args = parser().parse_args(["torch" if part == plan.BETTER else part for part in options])
                assert args.budget is None or args.budget < stage.seconds
            else:
                module = command[1]
                assert (ROOT / f"{module.replace('.', '/')}.py").exists() or (ROOT / module.replace(".", "/")).is_dir()
    assert len(plan.GOLDEN) == 5


def test_the_page_lists_the_time_at_which_each_stage_ends():
    page = (ROOT / "benchmarks/gpu/PLAN.md").read_text(encoding="utf-8")
    minutes = itertools.accumulate(stage.seconds / 60 for stage in PLAN)
    listed = [(by, name) for by, name in re.findall(r"^\| ([\d.]+) \| `([\w-]+)` \|", page, re.MULTILINE)]
    assert listed == [(f"{minute:.3g}", stage.name) for minute, stage in zip(minutes, PLAN)]
    assert ("45", "curve") in listed


def test_an_error_of_the_sanitizer_fails_its_stage():
    """The sanitizer runs without the caching allocator, which would hide an out-of-bounds access."""
    for name in ("memcheck", "racecheck"):
        (stage,) = (stage for stage in PLAN if stage.name == name)
        options = list(stage.commands[""])
        assert options[options.index("--error-exitcode") + 1] != "0" and options[options.index("--tool") + 1] == name
        assert stage.env["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"


def test_commands_of_a_stage_write_to_separate_folders(tmp_path):
    writes = "import os; open(os.environ['BENCHMARK_RESULTS'] + '/gpu-checks.json', 'x').write('{0}'); print({0})"
    stage = Stage("checks", 60, python(*map(writes.format, range(3))))
    assert plan.run(tmp_path, 60, [stage]) == 0
    assert [(tmp_path / f"checks/{i}/gpu-checks.json").read_text() for i in range(3)] == ["0", "1", "2"]


def test_a_repeated_stage_keeps_its_earlier_results(tmp_path):
    count = "import os; n = len(os.listdir(os.environ['BENCHMARK_RESULTS'] + '/..')); print(n)"
    stages = [Stage("one", 30, python(count)), Stage("two", 30, python(count))]
    assert plan.run(tmp_path, 90, stages) == 0
    for _ in range(2):
        assert plan.run(tmp_path, 90, stages, again=["one"]) == 0
    logs = {place.parent.name: place.read_text() for place in tmp_path.glob("*/log.txt")}
    assert logs.keys() == {"one", "one.1", "one.2", "two"}
    assert outcomes(tmp_path).keys() == logs.keys()
    with pytest.raises(SystemExit):
        program.main(["--all", "--again", "no-stage"])
    with pytest.raises(SystemExit):
        program.main(["--again", "ops"])


def test_records_are_packed_into_one_archive_from_which_another_machine_resumes(tmp_path, capsys):
    write = "import os; d = os.environ['BENCHMARK_RESULTS']; c = os.environ['TRITON_CACHE_DIR']; os.makedirs(c)"
    write += "; [open(f, 'wb').write(bytes(99)) for f in (d + '/gpu-x.json', d + '/trace.json.gz', c + '/k.json')]"
    stages = [Stage("one", 30, python(f"{write}; print('done')")), Stage("two", 30, python("1 / 0"))]
    here, there = tmp_path / "here", tmp_path / "there"
    assert plan.run(here, 60, stages[:1]) == 0
    with tarfile.open(here / archive.ARCHIVE) as packed:
        assert packed.getnames() == ["one/gpu-x.json", "one/log.txt", "one/record.json"]
    there.mkdir()
    shutil.copy(here / archive.ARCHIVE, there)
    assert plan.run(there, 60, stages) == 1
    assert f"one: restored from {there}" in capsys.readouterr().out
    assert outcomes(there) == {"one": "done", "two": "failed"} and (there / "one/log.txt").read_text() == "done\n"
    shutil.rmtree(there / "two")  # the next call resumes, and does not replace existing files with those of the archive
    (there / "one/log.txt").write_text("own")
    assert plan.run(there, 60, stages) == 1 and outcomes(there) == {"one": "done", "two": "failed"}
    assert (there / "one/log.txt").read_text() == "own"


def test_stages_use_the_block_sizes_chosen_by_earlier_stages(tmp_path, monkeypatch):
    """Later stages also use the block sizes of a tuning that ran out of time, even if it ran on another machine."""
    name = tuning.INTERPRETER
    table = json.loads(json.dumps(tuning.table(name)))
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    monkeypatch.setattr(tuning, "table", lambda arch: table)
    settings = json.dumps({"BLOCK_M": 32, "BLOCK_D": 16})
    row = {"kernel": "rows", "bits": "32", "arch": name, "settings": settings, "kept": "yes"}
    results.save("gpu-tuning", "t", [row, row | {"settings": "{}", "kept": ""}], tmp_path / "out/tuning")
    assert plan.run(tmp_path / "out", 60, [Stage("next", 60, python("print(1)"))]) == 0
    assert json.loads((tmp_path / f"{name}.json").read_text())["rows"]["32"] == json.loads(settings)


def test_unpacking_an_archive_writes_only_to_its_folder(tmp_path):
    with tarfile.open(tmp_path / archive.ARCHIVE, "w:gz") as packed:
        packed.addfile(tarfile.TarInfo("../outside/log.txt"))
    with pytest.raises(ValueError, match=r"outside/log\.txt, which no stage writes"):
        archive.unpack(tmp_path)


def test_only_the_end_of_a_long_log_is_packed(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "LARGEST", 9)
    (tmp_path / "a").mkdir()
    for name, text in ((archive.RECORD, "{}"), ("log.txt", "long before the end")):
        (tmp_path / "a" / name).write_text(text)
    archive.pack(tmp_path)
    shutil.rmtree(tmp_path / "a")
    assert archive.unpack(tmp_path) == ["a"] and (tmp_path / "a/log.txt").read_text() == "e the end"


BARE = """
import importlib.metadata as metadata, importlib.machinery, re, sys

def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()

todo, keep = ["torch", "triton", "numpy"], {"setuptools"}
while todo:
    name = normal(todo.pop())
    if name not in keep:
        keep.add(name)
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        todo += [re.match(r"[\\w.-]+", line).group() for line in needs if "extra ==" not in line]
own = {"m3ae_fast", "m3ae_kernels", "benchmarks", "tests"}
blocked = {
    module for module, owners in metadata.packages_distributions().items()
    if module not in own and not any(normal(owner) in keep for owner in owners)
}
assert {"pydantic", "rich", "deepspeed", "torchvision", "PIL"} <= blocked

class Bare(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in blocked else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Bare
import torch
from benchmarks import results
from benchmarks.gpu import __main__, attention, candidates, ceilings, curve, plan, suite, trace, tune, wheels
from benchmarks.measure import CpuDevice
from benchmarks.ops import ODD

checks = []
suite.check_and_time(
    CpuDevice(), suite.items(dtypes=[torch.bfloat16]), checks, __import__("pathlib").Path(sys.argv[1]), sizes=ODD,
    compiled=False, rounds=1, repeats=1,
)
assert checks and not any(check.problems for check in checks)
loaded = {name.partition(".")[0] for name in sys.modules} & blocked
assert not loaded, loaded
print("bare")
"""


def test_the_plan_requires_only_torch_triton_and_numpy(tmp_path):
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    command = [sys.executable, "-c", BARE, str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, env=environment() | paths, capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.endswith("bare\n"), result.stdout[-2000:] + result.stderr[-3000:]


def test_libraries_that_the_trainer_requires_but_a_container_image_lacks_are_listed(capsys):
    assert wheels.main([]) == 0
    listed = [re.split(r"\W", line)[0] for line in capsys.readouterr().out.split()]
    assert listed == ["pydantic", "webdataset", "deepspeed"]
    assert wheels.main(["--also", "rich"]) == 0 and "rich" in capsys.readouterr().out.split()


def test_wheels_are_downloaded_for_the_other_python_version(monkeypatch, tmp_path):
    """The dependencies of the wheels are downloaded too, in the required versions, unless they are installed."""
    needs = {
        "pydantic": ["pydantic-core==2.50.5", "typing-extensions>=4", "email-validator; extra == 'email'"],
        "pydantic-core": ["annotated-types", "tzdata; platform_system == 'Windows'"],
        "webdataset": ["numpy", "braceexpand"],
        "deepspeed": ["hjson", "pydantic>=2", "torch", "ninja"],
    }
    called = []

    def pip(command):
        called.append(command)
        name = re.split(r"[^\w-]", command[-1])[0]
        with zipfile.ZipFile(tmp_path / f"{name}.whl", "w") as wheel:
            lines = [f"Requires-Dist: {need}" for need in needs.get(name, [])]
            wheel.writestr(f"{name}.dist-info/METADATA", "\n".join(["Name: x", *lines, "", "Requires-Dist: no"]))
        return 0

    monkeypatch.setattr(subprocess, "call", pip)
    assert wheels.main(["--python", "3.12", "--download", str(tmp_path)]) == 0
    fetched = {re.split(r"[^\w-]", command[-1])[0]: command for command in called}
    assert len(called) == len(fetched) and fetched.keys() == {
        "pydantic", "pydantic-core", "annotated-types", "webdataset", "braceexpand", "deepspeed", "hjson"
    }  # fmt: skip
    assert fetched["pydantic-core"][-1] == "pydantic-core==2.50.5" and fetched["deepspeed"][3] == "wheel"
    options = dict(itertools.pairwise(fetched["pydantic-core"]))
    assert options["--python-version"] == "3.12" and options["--only-binary"] == ":all:"
    assert {"cp312", "abi3", "none", str(tmp_path)} <= set(fetched["pydantic-core"])
    assert all("--no-deps" in command for command in called)
    monkeypatch.setattr(subprocess, "call", lambda command: 7)
    assert wheels.main(["--download", str(tmp_path)]) == 7
    with pytest.raises(SystemExit):
        wheels.main(["--python", "312"])


def test_a_missing_or_broken_trace_loses_only_the_profile(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(step, "make_shards", lambda *_, **__: None)
    case = step.Case("tiny", {"model": {"size": "small"}}, batch=4, samples=2)
    for content in (None, b"no gzip"):

        def trainer(case, shards, kept, gpus, *, plain, content=content):
            kept.mkdir(parents=True, exist_ok=True)
            if content is not None:
                (kept / step.TRACE_FILE).write_bytes(content)
            return {"samples/s": 10.0}

        monkeypatch.setattr(step, "time_trainer", trainer)
        assert step.run(tmp_path, [case], ["engine, torch", "engine, DeepSpeed"]) == 0
        rows = results.read(tmp_path / "gpu-step.json")
        assert [row["samples/s"] for row in rows] == [10.0, 10.0]
        assert capsys.readouterr().out.count("no profile") == 2


def test_a_failed_run_loses_only_its_own_results(tmp_path, monkeypatch):
    monkeypatch.setattr(step, "make_shards", lambda *_, **__: None)

    def trainer(case, shards, kept, gpus, *, plain):
        if plain:
            return {"samples/s": 10.0}
        raise OSError("no disk")

    monkeypatch.setattr(step, "time_trainer", trainer)
    case = step.Case("tiny", {"model": {"size": "small"}})
    assert step.run(tmp_path, [case], ["engine, DeepSpeed", "engine, torch"]) == 1
    assert [row["samples/s"] for row in results.read(tmp_path / "gpu-step.json")] == [None, 10.0]


def test_a_run_that_ends_during_start_up_is_reported(tmp_path):
    with pytest.raises(RuntimeError, match=r"metrics\.jsonl has no line of a step after"):
        step.stable_medians(tmp_path / "metrics.jsonl")


def test_the_peak_throughput_of_a_cpu_is_measured(monkeypatch):
    rows = ceilings.measure_all(CpuDevice(), divide=512, rounds=1)
    assert len(rows) == 1 + 2 * 4 * 3 + 1 and all(row["p50 ms"] > 0 for row in rows)
    assert rows[-1]["what"] == "copy" and rows[-1]["GB/s"] > 0 and rows[0]["TFLOP/s"] > 0
    assert {row["shape"] for row in rows[1:4]} == {"55 x 2 x 6", "55 x 6 x 2", "6 x 55 x 2"}


def test_attention_kernels_are_timed_and_incorrect_ones_are_named(monkeypatch):
    def wrong(*args):
        out, lse = PADDED.forward(*args)
        return 2 * out, lse

    def broken(*args):
        raise ValueError("not for\nthis GPU")

    found = {"padded": PADDED, "wrong": Kernel("wrong", wrong, PADDED.backward), "broken": Kernel("b", broken, broken)}
    monkeypatch.setattr(attention, "SHAPES", {"encoder": (2, 16, 5)})
    monkeypatch.setattr(attention, "REPEATS", 2)
    rows = attention.time_kernels(CpuDevice(), found, samples=3, dtype=torch.float32)
    assert [row["verdict"].partition(" by")[0] for row in rows] == ["ok", "off", "not for this GPU"]
    assert [row["ms"] is None for row in rows] == [False, False, True]


def test_a_killed_and_resumed_run_has_the_same_loss_curve(tmp_path):
    """A run that is killed and resumed has the losses of an uninterrupted run, for a few steps on the CPU."""
    curves = [curve.Curve("whole", "fp32", curve.CPU), curve.Curve("killed, once", "fp32", curve.CPU, kill_at=4)]
    settings = {
        "model.emb_dim": 32, "model.depth": 1, "model.num_heads": 2, "model.dec_emb_dim": 16, "model.dec_depth": 1,
        "model.dec_num_heads": 2, "train.global_batch": 8, "train.steps": 12, "train.log_every": 2,
        "train.eval_every": 6, "train.eval_samples": 8, "train.save_every": 3, "deepspeed": "null",
        "optim.warmup_epochs": 0, "data.workers": 1, "model.image_size": 32, "train.pictures": 0,
    }  # fmt: skip
    assert curve.measure(tmp_path, curves, settings) == 0
    rows = results.read(tmp_path / "gpu-curve.json")
    assert {row["step"] for row in rows} == {0, 6, 12}
    assert all(row["whole"] == row["killed, once"] > 0 for row in rows)
    assert (tmp_path / "killed--once/log.txt").exists() and (tmp_path / "whole/metrics.jsonl").exists()
