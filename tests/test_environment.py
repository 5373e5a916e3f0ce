"""Environment variables must be set before libraries read them: the home folder, how torch's threads wait, and how it
allocates memory."""

import json
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
def test_a_user_without_a_home_folder_gets_a_temporary_one_and_a_note(tmp_path, variables):
    home, cache, output = _run(tmp_path, **variables)
    assert home.startswith(f"{tmp_path}/") and cache == f"{home}/.cache"
    assert output.count("\n") == 1 and f"there is no home folder, so caches are kept in {home}" in output
    assert _run(tmp_path, LOCAL_RANK="1", **variables) == (home, cache, "")  # only rank 0 prints the note


def test_an_existing_home_folder_is_used(tmp_path):
    assert _run(tmp_path, HOME=str(tmp_path)) == (str(tmp_path), f"{tmp_path}/.cache", "")


SETTINGS = {
    "GOMP_SPINCOUNT": "1000",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "THP_MEM_ALLOC_ENABLE": "1",
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    "PYTORCH_CUDA_ALLOC_CONF": None,  # older name of the variable
}
# the ways in which programs start, and other imports of the package
STARTS = {
    "module": "sys.argv = ['-m']; import m3ae_fast",
    "script": f"sys.argv = ['{ROOT}/m3ae_fast/train.py']; import m3ae_fast",
    "console script": "import m3ae_fast.__main__ as m, runpy; runpy.run_module = lambda *_, **__: 0; "
    "sys.argv = ['m3ae-fast', 'report']; m.run()",
    "pretrain in Python": "import m3ae_fast; m3ae_fast.pretrain",
}


def _set(start, **given):
    """Return the variables at the time when torch is imported or, if it is not imported, at the end."""
    program = f"""
import json, os, sys
class Torch:
    def find_spec(name, *_):
        if name == "torch":
            print(json.dumps({{name: os.environ.get(name) for name in {list(SETTINGS)}}}), flush=True)
            os._exit(0)
sys.meta_path.insert(0, Torch)
{start}
import torch
"""
    env = {k: v for k, v in environment().items() if k not in SETTINGS} | {"PYTHONPATH": f"{ROOT}:{ROOT}/kernels"}
    done = subprocess.run([sys.executable, "-c", program], env=env | given, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("start", STARTS)
def test_a_program_configures_how_torch_waits_and_allocates_before_importing_it(start):
    assert _set(STARTS[start]) == SETTINGS


def test_environment_variables_of_the_user_are_kept_and_the_library_sets_none():
    theirs = dict.fromkeys(SETTINGS, "theirs")
    assert _set(STARTS["module"], **theirs) == theirs
    older = {"PYTORCH_CUDA_ALLOC_CONF": "theirs"}
    assert _set(STARTS["module"], **older) == SETTINGS | {"PYTORCH_ALLOC_CONF": None} | older
    assert _set("import m3ae_fast") == dict.fromkeys(SETTINGS)
