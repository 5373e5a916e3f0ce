"""Tasks that are stopped once they have reported their progress. Without the stop, they would never end."""

import os
import re
import signal
import time

import pytest

from tests.evaluation.conftest import settings
from tests.helpers.ranks import LIMIT_S, await_ranks, fork_ranks

pytestmark = pytest.mark.slow

ENDLESS = 10_000_000  # number of steps that no test completes


@pytest.fixture
def stopped(run, shards, tmp_path):
    """Return a function stopped(when, task, *options), which sends a signal to a task once it has printed `when`, and
    returns its output."""

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
        assert code == 0 and not [*out.glob("result*"), *out.glob("*.parquet")], text
        return text

    return perform


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_stopped_comparison_ends_with_one_message(stopped, ranks):
    options = [*settings(f"attentive.steps={ENDLESS}"), "--probes", "knn,attentive", "--seeds", "1"]
    output = stopped("random weights, knn, seed 42: ", "compare", *options, ranks=ranks, to=ranks - 1)
    assert output.count("stopped") == 1 and "stopped (SIGTERM); running the same command again continues\n" in output


def test_stopped_fine_tuning_writes_a_checkpoint(stopped, tmp_path):
    options = settings(f"train.steps={ENDLESS}", "train.global_batch=16", "train.eval_every=2")
    output = stopped("val_top1", "finetune", *options)
    assert any((tmp_path / "out/checkpoints").iterdir())
    assert re.search(r"stopped at step \d+ \(SIGTERM\); --resume auto continues\n$", output)
