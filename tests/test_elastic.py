"""After the loss of a node, the remaining nodes continue from the last checkpoint with the same global batch."""

import subprocess
import sys
import time

import numpy as np
import psutil
import pytest

from m3ae_fast import checkpoint
from tests.helpers.ranks import environment, free_port
from tests.helpers.trainer import ROOT

pytestmark = pytest.mark.slow

OPTIONS = ("train.steps=50", "train.save_every=5", "train.eval_every=1000", "run.loggers=[]")
WITHIN_S = 180.0  # maximum seconds until training continues, also on a busy machine


def kill(agent):
    for process in [*psutil.Process(agent.pid).children(recursive=True), agent]:
        process.kill()
    agent.wait()


def test_training_continues_on_the_remaining_nodes_if_a_node_is_lost(trainer):
    options = [word for option in OPTIONS for word in ("--set", option)]
    trainer("one", *options)
    port = free_port()

    def agent(node):
        """Start torchrun on a node with one rank. The first node hosts the store of the rendezvous.

        On a busy machine, one node may join seconds after the other, so the rendezvous waits 15 s for it. A node
        whose last heartbeat is less than an interval old does not renew it, so heartbeats can be two intervals
        apart, and a limit of two intervals would remove a healthy node.
        """
        conf = f"is_host={int(node == 0)},last_call_timeout=15,keep_alive_interval=1,keep_alive_max_attempt=6"
        torchrun = ["--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "3", "--rdzv-backend", "c10d"]
        torchrun += ["--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "run", "--rdzv-conf", conf]
        script = [str(ROOT / "m3ae_fast/train.py"), *trainer.arguments("run", *options, "--resume", "auto")]
        command = [sys.executable, "-m", "torch.distributed.run", *torchrun, *script]
        with open(trainer.folder / f"log{node}", "w") as log:
            return subprocess.Popen(command, env=environment(), cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)

    first, other = agent(0), agent(1)
    log = trainer.folder / "log0"
    try:
        while "on 2 x cpu" not in log.read_text() or not checkpoint.saved_steps(trainer.folder / "run"):
            assert first.poll() is other.poll() is None, log.read_text()
            time.sleep(0.02)
        kill(other)
        lost = time.monotonic()
        while "on 1 x cpu" not in log.read_text():
            assert first.poll() is None and time.monotonic() - lost < WITHIN_S, log.read_text()
            time.sleep(0.1)
        first.wait(WITHIN_S)
    finally:
        for left in (first, other):
            if left.poll() is None:
                kill(left)
    output = log.read_text()
    assert first.returncode == 0, output
    assert "batch 16 = 1 ranks x 16 samples" in output and "Traceback" not in output
    assert 0 < int(output.rpartition(", steps ")[2].split()[0]) < 50
    np.testing.assert_allclose(np.array(trainer.losses("run")), np.array(trainer.losses("one")), rtol=2e-5)
