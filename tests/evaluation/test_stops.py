"""The partial results of tasks that are stopped. The tasks would never end, and are stopped once they have reported
their progress."""

import json
import os
import re
import signal
import time
from types import SimpleNamespace

import pytest
from pyarrow import parquet

from m3ae_fast.evaluation import labelled_task, logistic, probe_grid
from m3ae_fast.evaluation.difference import compare_results
from m3ae_fast.evaluation.job import Job
from m3ae_fast.evaluation.labelled_task import LabelledTask
from tests.evaluation.conftest import settings
from tests.helpers.ranks import LIMIT_S, await_ranks, fork_ranks

pytestmark = pytest.mark.slow

ENDLESS = 10_000_000  # steps


@pytest.fixture
def stopped(run, shards, tmp_path):
    """Return a function stopped(when, task, *options), which sends a signal to a task once it has printed `when`, and
    returns its output and the content of result-so-far.json."""

    def perform(when, task, *options, ranks=1, to=0):
        log, out = tmp_path / "log", tmp_path / "out"
        data = ["--train", shards[0], "--val", shards[1], "--out", str(out), "--set", "data.workers=0"]
        processes = fork_ranks("m3ae_fast.cli.evaluate", [task, str(run), *data, *options], ranks, log)
        deadline = time.monotonic() + LIMIT_S
        while not (log.exists() and re.search(when, log.read_text())):
            assert time.monotonic() < deadline and all(process.is_alive() for process in processes), log.read_text()
            time.sleep(0.05)
        os.kill(processes[to].pid, signal.SIGTERM)
        code, text = await_ranks(processes, log)
        assert code == 0 and not (out / "result.json").exists(), text
        return text, json.loads((out / "result-so-far.json").read_text())

    return perform


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_stopped_comparison_writes_the_table_of_the_finished_models(stopped, tmp_path, ranks):
    options = [*settings(f"linear.steps={ENDLESS}", "linear.peak_lr=1"), "--probes", "knn,linear", "--seeds", "1"]
    output, result = stopped("random weights, knn, seed 42: ", "compare", *options, ranks=ranks, to=ranks - 1)
    page = (tmp_path / "out/comparison.md").read_text()
    assert page.startswith("Partial result: the comparison was stopped after 0 of 3 models.\n") and page in output
    assert re.search(r"\| random weights \| \d+\.\d ± \d+\.\d \| not yet \|", page) is None, (
        "no column without a number"
    )
    assert (result["partial"], result["done"]) == (True, "0 of 3 models")
    ((row),) = result["rows"]
    assert (row["model"], row["probe"]) == ("random weights", "knn")
    assert parquet.read_table(tmp_path / "out/predictions.parquet").num_rows == 18
    reason = "SIGTERM" if ranks == 1 else "requested by another rank"
    assert output.count("stopped (") == 1 and f"stopped ({reason}); partial result, 0 of 3 models, in " in output
    assert re.search(r"the probes train for about [^;]*\d:\d\d:\d\d in total", output), "before an image is encoded"


def test_a_stopped_attentive_probe_writes_its_latest_accuracy(stopped, tmp_path):
    options = settings(f"attentive.steps={ENDLESS}", "attentive.batch=8", "attentive.peak_lr=0.001")
    output, result = stopped(r"attentive probe: [\d,]+ of 10,000,000, about .* left", "attentive", *options)
    assert re.search(r"48 training samples: 1 probe; training takes about .*\d:\d\d:\d\d\n", output)
    assert result["partial"] and 0 <= result["top1"] <= 1
    (row,) = result["results"]
    assert re.fullmatch(r"attentive probe at step [\d,]+ of 10,000,000", row["unfinished"])
    assert result["done"] == f"0 of 1 probes and the {row['unfinished']}"
    assert f"stopped (SIGTERM); partial result, {result['done']}, in " in output
    table = parquet.read_table(tmp_path / "out/predictions.parquet").to_pydict()
    assert sum(a == b for a, b in zip(table["label"], table["prediction"])) / 18 == pytest.approx(result["top1"])


def test_stopped_fine_tuning_writes_its_last_evaluation_and_a_checkpoint(stopped, tmp_path):
    options = settings(f"finetune.steps={ENDLESS}", "finetune.global_batch=16", "finetune.eval_every=2")
    output, result = stopped("val_top1", "finetune", *options)
    assert result["partial"] and result["steps"] % 2 == 0 and result["total_steps"] == ENDLESS
    assert result["done"] == f"the evaluation after step {result['steps']:,} of {ENDLESS:,}"
    last = [line for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines() if "val_top1" in line][-1]
    assert json.loads(last)["step"] == result["steps"] and json.loads(last)["val_top1"] == result["top1"]
    assert any((tmp_path / "out/checkpoints").iterdir())
    assert f"partial result, {result['done']}, in {tmp_path}/out/result-so-far.json: top1 " in output
    assert output.rstrip().endswith("; --resume auto continues")
    note = f"note: {tmp_path}/out contains a partial result: the task was stopped before its end\n"
    assert compare_results([tmp_path / "out"] * 2).startswith(note)


def test_a_resumed_run_that_is_stopped_reports_the_last_evaluation(monkeypatch):
    lines = [{"step": 0, "val_top1": 0.1}, {"step": 4, "val_top1": 0.5, "val_top5": 0.8}, {"step": 5, "loss": 1.0}]
    monkeypatch.setattr(labelled_task, "read_metrics", lambda folder: lines)
    trainer = SimpleNamespace(schedule=SimpleNamespace(total_steps=9), run=SimpleNamespace(dir=None), step=6)
    found = LabelledTask.partial_result(SimpleNamespace(predictions=None), trainer)
    assert found.result == {"top1": 0.5, "top5": 0.8, "steps": 4, "total_steps": 9} and not found.columns
    assert found.done == "the evaluation after step 4 of 9"
    lines.insert(2, {"step": 5, "val_top1": 0.6})
    found = LabelledTask.partial_result(SimpleNamespace(predictions=None), trainer)
    assert found.result == {"top1": 0.6, "steps": 5, "total_steps": 9}
    del lines[1:3]
    assert LabelledTask.partial_result(SimpleNamespace(predictions=None), trainer) == (
        "step 6 of 9, before the first evaluation", {}, {}, ""
    )  # fmt: skip


@pytest.mark.parametrize("task", ["knn", "logistic"])
def test_a_task_stopped_while_encoding_reports_that_there_is_no_result(transfer, monkeypatch, task):
    said, real = [], Job.encode_with_baselines

    def encode(self, *arguments):
        said.append(self.stop.at_leaving())
        return real(self, *arguments)

    monkeypatch.setattr(Job, "encode_with_baselines", encode)
    transfer(task)
    assert {*said} == {"no result yet (the samples are being encoded); running the same command again starts over"}


@pytest.mark.parametrize(
    ("task", "options", "done"),
    [
        ("logistic", (), "inverse_strength"),
        ("knn", ("--layers", "all"), "results"),
        ("attentive", settings("attentive.steps=3", "attentive.online=true"), "results"),
    ],
)
def test_a_task_stopped_during_its_baselines_writes_its_accuracy(transfer, monkeypatch, task, options, done):
    said, initialise = [], Job.__post_init__

    def stops_at_baselines(job):
        """Write the partial result when baselines are about to be fitted."""
        initialise(job)
        module, name = (logistic, "predict") if task == "logistic" else (probe_grid, "_baselines")
        fit = getattr(module, name)

        def stopped(*given):
            said.append((job.stop.at_leaving(), json.loads((job.out / "result-so-far.json").read_text())))
            return fit(*given)

        monkeypatch.setattr(module, name, stopped)

    monkeypatch.setattr(Job, "__post_init__", stops_at_baselines)
    result = transfer(task, *options, baselines=True)
    message, partial = said[0]
    assert partial["partial"] and partial["done"] == "without baselines" and "baselines" not in partial
    assert partial["top1"] == result["top1"] and partial[done] == result[done] and "baselines" in result
    assert message.startswith("partial result, without baselines, in ")
