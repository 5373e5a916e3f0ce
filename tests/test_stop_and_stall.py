"""Signals, launchers that end, and ranks or loaders that stall. Some tests start the trainer, and the others start
small programs that use the tested modules."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import psutil
import pytest

from tests.helpers.ranks import environment, free_port
from tests.helpers.trainer import ROOT
from tests.helpers.waiting import has_ended, until

pytestmark = pytest.mark.slow

STUCK = "pipe:sleep 100; cat /nowhere"  # a shard that blocks the start for ever


def in_main(code: str) -> str:
    """Return a program whose `main` is this code."""
    code = textwrap.indent(textwrap.dedent(code), "    ")
    head = "import sys\nfrom m3ae_fast.base.errors import exit_cleanly\ndef main():\n"
    return f"{head}{code}\nsys.exit(exit_cleanly(main))"


def program(code: str, **variables: str) -> subprocess.Popen:
    return script(in_main(code), **variables)


def script(code: str, **variables: str) -> subprocess.Popen:
    """Start a process that runs a user's code."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**environment(), "PYTHONPATH": f"{ROOT}:{ROOT}/kernels", **variables},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


STARTING = """
    import threading
    from m3ae_fast.process.stop_request import StopRequest
    with StopRequest() as stop:
        print("ready", flush=True)
        {}
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
@pytest.mark.parametrize("busy", ["threading.Event().wait()", "input()", "while True: pass"])
def test_a_signal_before_the_first_step_ends_the_process_with_exit_code_0(number, busy):
    process = program(STARTING.format(busy))
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    out = process.stdout.read()  # communicate() would end the input
    assert (process.wait(20), out) == (0, f"stopped before the first step ({number.name}); nothing to save\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_user_code_receives_a_keyboard_interrupt_and_can_continue(number):
    """The code may run in a notebook, whose process must not end."""
    code = """
        import signal, time
        from m3ae_fast.process import stop_request
        stop_request._GRACE_S = 0.2
        before = signal.getsignal(signal.SIGINT)
        try:
            with stop_request.StopRequest():
                print("ready", flush=True)
                time.sleep(60)
        except KeyboardInterrupt:
            time.sleep(0.5)
            print("goes on", signal.getsignal(signal.SIGINT) is before)
    """
    process = script(code)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    out = process.communicate(timeout=20)[0]
    assert out == f"stopped before the first step ({number.name}); nothing to save\ngoes on True\n"
    assert process.returncode == 0


def test_the_message_about_a_stop_contains_the_advice_of_the_program():
    process = program(
        STARTING.format("stop.advice = 'start again'; print('set', flush=True); threading.Event().wait()")
    )
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n", "set\n"]
    process.send_signal(signal.SIGTERM)
    out = process.stdout.read()
    assert (process.wait(20), out) == (0, "stopped (SIGTERM); start again\n")


def test_a_signal_is_handled_while_a_thousand_files_are_open():
    code = """
        import os, resource, time
        from m3ae_fast.process.stop_request import StopRequest
        resource.setrlimit(resource.RLIMIT_NOFILE, (2000, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        files = [os.open("/dev/null", os.O_RDONLY) for _ in range(1100)]
        with StopRequest():
            print("ready", flush=True)
            time.sleep(60)
    """
    process = program(code)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert "stopped before the first step (SIGTERM)" in process.communicate(timeout=20)[0] and process.returncode == 0


def test_a_closed_terminal_is_ignored_under_nohup():
    code = """
        import os, signal, time
        from m3ae_fast.process.stop_request import StopRequest
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with StopRequest() as stop:
            stop.listen()
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.5)
            print(stop.requested)
        print(signal.getsignal(signal.SIGHUP) == signal.SIG_IGN)
    """
    assert program(code).communicate(timeout=20)[0] == "False\nTrue\n"


def test_a_stopped_process_exits_even_if_code_swallows_the_exception():
    # holds the GIL, so that no Python code runs, in any thread
    process = program(STARTING.format("import ctypes; ctypes.PyDLL(None).sleep(60)"))
    assert process.stdout.readline() == "ready\n"
    time.sleep(1)  # wait until it sleeps, because an earlier signal would not interrupt the sleep
    process.send_signal(signal.SIGTERM)  # the signal interrupts the C library's sleep
    assert process.wait(20) == 0
    process.stdout.close()
    swallow = """
        while True:
            try:
                time.sleep(60)
            except BaseException:
                pass
    """
    process = program(STARTING.format("import time") + textwrap.indent(textwrap.dedent(swallow), "    " * 2))
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 0


def test_a_signal_during_the_imports_is_handled():
    code = """
        import os, signal, time
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1))
        os.kill(os.getpid(), signal.SIGUSR1)
        from m3ae_fast.process.stop_request import StopRequest
        with StopRequest():
            time.sleep(60)
    """
    process = program(code)
    assert "(SIGUSR1)" in process.communicate(timeout=20)[0] and process.returncode == 0


def test_the_first_signal_requests_a_stop_and_a_later_ctrl_c_exits_at_once():
    code = """
        import time
        from m3ae_fast.process import stop_request
        with stop_request.StopRequest() as stop:
            stop.listen()
            print("ready", flush=True)
            while not stop.requested: time.sleep(0.01)
            print(stop.reason, flush=True)
            time.sleep(60)
    """
    process = program(code)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)  # Ctrl-C reaches the program twice: a launcher forwards it
    assert process.stdout.readline() == "SIGINT\n"
    time.sleep(2.1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 130


def test_a_stopped_rank_leaves_after_it_has_notified_the_other_ranks():
    code = """
        import threading, time
        from m3ae_fast.process.stop_request import StopRequest
        with StopRequest() as stop:
            print("ready", flush=True)
            input()
            stop.joined(lambda reason: print("told", reason, flush=True))
            time.sleep(60)
    """
    process = program(code, WORLD_SIZE="2")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None
    out, _ = process.communicate("\n", timeout=20)
    assert (process.returncode, out) == (0, "told SIGTERM\n")


def test_a_rank_that_another_rank_stops_prints_nothing_even_if_it_cannot_tell_the_others():
    """The process that hosts the store may have ended."""
    code = """
        import time
        from m3ae_fast.process.stop_request import BY_ANOTHER, StopRequest
        def tell(reason):
            print("telling", flush=True)
            raise RuntimeError("the store has ended")
        with StopRequest() as stop:
            stop.joined(tell)
            stop.request(BY_ANOTHER)
            time.sleep(60)
    """
    process = program(code, WORLD_SIZE="2")
    out, _ = process.communicate(timeout=20)
    assert (process.returncode, out) == (0, "telling\n")


def test_no_gloo_thread_is_left_when_the_interpreter_shuts_down():
    """A thread that drops a Python tensor at that time would abort the process."""
    code = """
        import atexit
        from pathlib import Path
        def threads():
            names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
            return sum("gloo" in name for name in names)
        atexit.register(lambda: print(threads(), flush=True))  # runs last
        from m3ae_fast.process.session import joined_program
        def run():
            with joined_program() as session:
                import torch.distributed.nn.functional
                cycle = [session]
                cycle.append(cycle)
                assert session.ranks.gather(1) == [1, 1] and threads() >= 2
        run()
    """
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    ranks = [program(code, RANK=rank, LOCAL_RANK=rank, **where) for rank in ("0", "1")]
    assert [process.communicate(timeout=60)[0] for process in ranks] == ["0\n"] * 2


def test_a_rank_whose_peer_left_first_ends_without_an_error():
    """The end of the other rank has closed the connections on which this rank waits."""
    code = """
        import threading
        from m3ae_fast.process.session import joined_program
        with joined_program() as session:
            main, session.stop.advice = session.ranks.is_main, "start again"
            print("ready", flush=True)
            session.ranks.gather(1) if main else threading.Event().wait()
    """
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    ranks = [program(code, RANK=rank, LOCAL_RANK=rank, **where) for rank in ("0", "1")]
    assert [process.stdout.readline() for process in ranks] == ["ready\n"] * 2
    ranks[1].send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=60)[0] for process in ranks]
    assert outputs == ["", "stopped (SIGTERM); start again\n"]
    assert [process.returncode for process in ranks] == [0, 0]


@pytest.mark.parametrize(("when", "world"), [("before", "1"), ("after", "1"), ("after", "2")])
def test_a_process_exits_if_its_launcher_has_died(when, world):
    """The process may also wait for other ranks that never start."""
    child = "import sys; sys.stdin.readline()\n" if when == "before" else ""
    child += "from m3ae_fast.process import stop_request; stop_request._ORPHAN_S = 0.5\n"
    child += in_main(STARTING.format("threading.Event().wait()"))
    code = f"""
        import subprocess, sys
        # without a pipe, which would break and end the child, too, when the launcher is killed
        out = subprocess.PIPE if {when == "after"} else subprocess.DEVNULL
        child = subprocess.Popen([sys.executable, "-c", {child!r}], stdin=subprocess.PIPE, stdout=out)
        if {when == "after"}: child.stdout.readline()
        print(child.pid, flush=True)
        input()
    """
    launcher = program(code, TORCHELASTIC_RUN_ID="1", WORLD_SIZE=world)
    child = psutil.Process(int(launcher.stdout.readline()))
    launcher.kill()  # this also closes the input of the child
    try:
        launcher.communicate(timeout=20)  # waits for the child, too, which has inherited the output
        child.wait(20)
    finally:
        if child.is_running():
            child.kill()


def test_a_process_without_a_launcher_outlives_its_shell():
    child = in_main(STARTING.format("threading.Event().wait()"))
    code = f"""
        import subprocess, sys
        child = subprocess.Popen([sys.executable, "-c", {child!r}], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        child.stdout.readline()
        print(child.pid, flush=True)
    """
    shell = program(code)
    child = psutil.Process(int(shell.stdout.readline()))
    shell.communicate()
    time.sleep(1)  # the child checks four times whether its parent is alive
    assert child.is_running() and child.status() != psutil.STATUS_ZOMBIE
    child.terminate()
    child.wait(20)


HEARTBEATS = """
    import hashlib, subprocess, sys, time
    import torch.distributed as dist
    from m3ae_fast.process.heartbeats import Heartbeats
    from m3ae_fast.process.node_groups import HeartbeatGroup
    from m3ae_fast.process.stop_request import StopRequest
    store = dist.TCPStore("127.0.0.1", 0, 1, True)
    heard = [list(range(1, {world})), *[[0]] * ({world} - 1)]
    groups = [[HeartbeatGroup(store.clone(), ranks)] for ranks in heard]
    heartbeats_of = [Heartbeats(rank, groups[rank], store, StopRequest()) for rank in range({world})]
    for heartbeats in heartbeats_of: heartbeats.timeout = 1.0
"""


def run_heartbeats(world: int, code: str) -> tuple[int, str]:
    process = program(textwrap.dedent(HEARTBEATS.format(world=world)) + textwrap.dedent(code))
    out, _ = process.communicate(timeout=60)
    return process.returncode, out


def test_an_immediate_exit_kills_all_child_processes():
    """Processes that a child has started are ended too."""
    code = """
        import subprocess, sys
        from m3ae_fast.process.stop_request import kill_children
        child = subprocess.Popen(["sh", "-c", "sleep 100 & echo $!; wait"], stdout=subprocess.PIPE)
        number = child.stdout.readline().decode().strip()
        kill_children()
        print(child.wait(10), number, flush=True)
    """
    code, number = program(code).communicate(timeout=20)[0].split()
    assert int(code) == -signal.SIGKILL
    until(lambda: has_ended(int(number)))


def test_a_rank_without_a_heartbeat_ends_the_run_and_is_named():
    code = """
        with heartbeats_of[0] as heartbeats:
            heartbeats.mark("step 7")
            with heartbeats_of[1] as other:
                other.mark("step 6")
                time.sleep(0.5)
            time.sleep(60)
    """
    assert run_heartbeats(2, code) == (
        75,
        "error: rank 0, step 7: for 1 s, no heartbeat from rank 1 (last activity: step 6); --resume auto continues "
        "from the last checkpoint\n",
    )


def test_a_rank_that_is_computing_does_not_count_as_stalled():
    code = """
        with heartbeats_of[0] as heartbeats, heartbeats_of[1]:
            until = time.monotonic() + 3
            while time.monotonic() < until: hashlib.sha256(bytes(1 << 20))  # without the interpreter's lock, as torch
        print("whole")
    """
    assert run_heartbeats(2, code) == (0, "whole\n")


HUNG = """
    def batches():
        child = subprocess.Popen([sys.executable, "-c", {child!r}])
        yield 1
        time.sleep(2.5)  # the child's batch does not come
        child.kill()
    with heartbeats_of[0] as heartbeats:
        print(list(heartbeats.watch(batches(), "training")))
"""


def test_a_hung_loader_ends_the_run_and_a_slow_one_does_not():
    code, out = run_heartbeats(1, HUNG.format(child="import time; time.sleep(60)"))
    assert code == 75 and "rank 0, waiting for its loader: for 1 s, its data-loader workers have been idle" in out
    assert run_heartbeats(1, HUNG.format(child="while True: pass")) == (0, "[1]\n")
    downloading = (
        "import time\nwith open('/dev/null', 'wb') as f:\n  while True: f.write(b'x' * 9999); time.sleep(0.05)"
    )
    assert run_heartbeats(1, HUNG.format(child=downloading)) == (0, "[1]\n")


@pytest.mark.parametrize(("launcher", "ranks"), [("torchrun", 2), ("deepspeed", 1)])
def test_a_signal_during_start_up_ends_all_ranks_and_leaves_no_files(trainer, launcher, ranks):
    """The signal reaches one rank while another one downloads its data, or the launcher is killed."""
    source = json.dumps([{"shards": STUCK}])
    process = trainer.start("run", "--set", f"data.train={source}", ranks=ranks, launcher=launcher)
    run = trainer.folder / "run"
    while not run.exists():  # the folder is created after the ranks have joined
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    time.sleep(0.5)
    script = str(ROOT / "m3ae_fast/train.py")
    found = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if script in child.cmdline() and not any("launch" in word for word in child.cmdline())
    ]
    assert len(found) == ranks
    if launcher == "torchrun":
        found[-1].terminate()
    else:
        process.kill()
    psutil.wait_procs(found, timeout=20)
    assert not any(child.is_running() for child in found)
    out, _ = process.communicate(timeout=20)
    if launcher == "torchrun":
        assert process.returncode == 0, out
    assert out.count("nothing to save") == 1 and "Traceback" not in out and "error" not in out.lower()
    assert not run.exists() or os.listdir(run) == [".lock"]
