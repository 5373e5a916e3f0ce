"""If a node joins or is lost, the nodes continue from the last checkpoint with the same global batch."""

import re
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest

from tests.helpers.ranks import environment, free_port
from tests.helpers.trainer import ROOT

pytestmark = pytest.mark.slow

OPTIONS = ("train.steps=120", "train.save_every=5", "train.eval_every=1000", "run.loggers=[]")
WITHIN_S = 180.0  # maximum seconds until training continues, also on a busy machine
OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"  # without this variable, a node cannot join (see elastic.sh)


def kill(agent):
    for process in [*psutil.Process(agent.pid).children(recursive=True), agent]:
        process.kill()
    agent.wait()


def test_training_continues_if_a_node_joins_and_is_lost(trainer):
    options = [word for option in OPTIONS for word in ("--set", option)]
    trainer("one", *options)
    port = free_port()

    def agent(node):
        """Start torchrun on a node with one rank. The first node hosts the store of the rendezvous.

        With keep_alive_max_attempt=2, torch would sometimes remove a healthy node: it renews a heartbeat only if the
        last one is at least one interval old, so almost two intervals can lie between them.
        """
        conf = f"is_host={int(node == 0)},last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=6"
        torchrun = ["--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "3", "--rdzv-backend", "c10d"]
        torchrun += ["--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "run", "--rdzv-conf", conf]
        script = [str(ROOT / "m3ae_fast/train.py"), *trainer.arguments("run", *options, "--resume", "auto")]
        command = [sys.executable, "-m", "torch.distributed.run", *torchrun, *script]
        with open(trainer.folder / f"log{node}", "w") as log:
            env = environment() | {OWN_STORE: "1"}
            return subprocess.Popen(command, env=env, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)

    log = trainer.folder / "log0"

    def wait_for(*parts):
        """Wait until the log of the first node contains these parts in this order."""
        since = time.monotonic()
        while not re.search(".*".join(parts), log.read_text(), re.DOTALL):
            assert first.poll() is None and time.monotonic() - since < WITHIN_S, log.read_text()
            time.sleep(0.02)

    first = agent(0)
    agents = [first]
    try:
        wait_for("on 1 x cpu")
        agents.append(agent(1))
        wait_for("on 1 x cpu", "on 2 x cpu", "saved")
        kill(agents[1])
        wait_for("on 1 x cpu", "on 2 x cpu", "on 1 x cpu")
        first.wait(WITHIN_S)
    finally:
        for left in agents:
            if left.poll() is None:
                kill(left)
    output = log.read_text()
    assert first.returncode == 0, output
    assert "batch 16 = 1 rank x 16 samples" in output and "Traceback" not in output
    assert 0 < int(output.rpartition(", steps ")[2].split()[0]) < 120
    np.testing.assert_allclose(np.array(trainer.losses("run")), np.array(trainer.losses("one")), rtol=2e-5)


def test_examples_of_elastic_training_allow_nodes_to_join():
    examples = ROOT / "examples/many_nodes"
    assert f"\nexport {OWN_STORE}=1\n" in (examples / "elastic.sh").read_text()
    assert f'- {{ name: {OWN_STORE}, value: "1" }}' in (examples / "pytorchjob.yaml").read_text()
