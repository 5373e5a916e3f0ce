"""Without a home folder, caches go to a temporary one, and a line says so."""

import subprocess
import sys

import pytest

from tests.helpers.ranks import environment
from tests.helpers.trainer import ROOT

PROGRAM = """
import os, pwd
def unknown(*_): raise KeyError("uid not found")
pwd.getpwuid = unknown
import m3ae_fast
from pathlib import Path
print(Path.home(), Path("~/.cache").expanduser())
"""


def _run(tmp_path, **variables):
    env = {k: v for k, v in environment().items() if k not in ("HOME", "XDG_CACHE_HOME")}
    env |= {"PYTHONPATH": f"{ROOT}:{ROOT}/kernels", "TMPDIR": str(tmp_path), **variables}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, check=True)
    home, cache = done.stdout.split()
    return home, cache, done.stderr


@pytest.mark.parametrize("variables", [{}, {"HOME": "/not/there"}])
def test_a_user_without_a_home_has_a_temporary_one_and_is_told(tmp_path, variables):
    home, cache, told = _run(tmp_path, **variables)
    assert home.startswith(f"{tmp_path}/") and cache == f"{home}/.cache"
    assert told.count("\n") == 1 and f"no home folder: caches go to {home}" in told
    assert _run(tmp_path, LOCAL_RANK="1", **variables) == (home, cache, "")  # all ranks share it, one speaks


def test_a_home_that_is_there_is_used(tmp_path):
    assert _run(tmp_path, HOME=str(tmp_path)) == (str(tmp_path), f"{tmp_path}/.cache", "")
