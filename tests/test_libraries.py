"""A missing optional library that a command, an option or a setting requires is reported at once."""

import json
import re
import sys
import time
from importlib import import_module
from importlib.util import find_spec

import numpy as np
import pytest
import tifffile

from m3ae_fast import pretrain
from m3ae_fast.__main__ import MODULES
from m3ae_fast.base.errors import UserError
from m3ae_fast.base.libraries import EXTRAS, library, require_libraries
from m3ae_fast.base.progress import working
from m3ae_fast.shards.options import SourceOptions
from m3ae_fast.shards.sources.folder import Folder
from tests.helpers.trainer import ROOT, TINY

EVALUATE = "run --val val.tar --out out"
TRAINS = f"{EVALUATE} --train train.tar"
PRETRAIN = "pretrain photos --out out"
DATASETS = "a Hugging Face dataset needs datasets: pip install 'm3ae-fast[huggingface]'"
PROBE = json.dumps({name: [{"shards": "gs://bucket/{0..9}.tar"}] for name in ("train", "val")}, separators=(",", ":"))
STAGE_3 = '{"zero_optimization":{"stage":3}}'
# the library, the command line, and the option or setting that requires the library
CASES = [
    ("sklearn", f"evaluate ood {TRAINS} --ood other.tar", "ood"),
    ("timm", f"evaluate finetune {TRAINS}", "finetune"),
    ("scipy", f"evaluate logistic {TRAINS} --shots 1,5", "shots"),
    ("tensorboard", f"evaluate knn {TRAINS}", "knn"),
    ("obstore", f"evaluate knn {TRAINS} s3://bucket/a.tar", "s3://bucket/a.tar"),
    ("boto3", f"evaluate ood {TRAINS} --ood gs://bucket/a.tar", "gs://bucket/a.tar"),
    ("boto3", "embed run a.tar s3://bucket/{0..3}.tar --out out.npz", "s3://bucket/{0..3}.tar"),
    ("wandb", 'train --config tiny.json --set run.loggers=["wandb"]', "run.loggers"),
    ("tensorboard", "train --config tiny.json", "run.loggers"),
    ("tensorboard", "train --config tiny.json --dry-run", "run.loggers"),
    ("deepspeed", f"train --config tiny.json --set deepspeed={STAGE_3}", "the section deepspeed"),
    ("deepspeed", f"evaluate finetune {TRAINS} --set deepspeed={STAGE_3}", "the section deepspeed"),
    ("boto3", "train --config tiny.json --set data.train.0.shards=s3://bucket/a.tar", "s3://bucket/a.tar"),
    ("obstore", f"train --config tiny.json --set train.probe={PROBE}", "gs://bucket/{0..9}.tar"),
    ("wandb", f'{PRETRAIN} --set run.loggers=["wandb"]', "run.loggers"),
    ("tensorboard", PRETRAIN, "run.loggers"),
    ("deepspeed", f"{PRETRAIN} --set deepspeed={STAGE_3}", "the section deepspeed"),
    ("boto3", "pretrain s3://bucket/a.tar --out out", "s3://bucket/a.tar"),
    ("boto3", "pretrain a.tar --val s3://bucket/a.tar --out out", "s3://bucket/a.tar"),
    ("datasets", "pretrain owner/name --out out", "a Hugging Face dataset"),
    ("datasets", "shards make owner/name --out out", "a Hugging Face dataset"),
    ("h5py", "shards make a.hdf5 --out out", "a.hdf5"),
    ("obstore", "shards table s3://bucket/a.tar", "s3://bucket/a.tar"),
    ("onnx", "convert run --out out.onnx --format onnx", "format onnx"),
    ("timm", "convert run --out out.onnx --format onnx", "format onnx"),
    ("msgpack", "convert vqgan.msgpack --out out", "vqgan.msgpack"),
]


@pytest.fixture
def hide(monkeypatch):
    return lambda *names: [monkeypatch.setitem(sys.modules, name, None) for name in names]


@pytest.mark.parametrize(("name", "line", "what"), CASES, ids=[f"{name}: {line[:40]}" for name, line, _ in CASES])
def test_a_missing_library_is_reported_before_any_output_is_written(tmp_path, monkeypatch, hide, name, line, what):
    """The run and the shards of these command lines do not exist: the library is checked first."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("signal.pthread_sigmask", lambda *_: None)
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    (tmp_path / "vqgan.msgpack").touch()
    before = sorted(tmp_path.rglob("*"))
    hide(name)
    command, *words = line.split()
    with pytest.raises(UserError) as error:
        import_module(MODULES[command]).main(words)
    message = str(error.value)
    known = next(extra for extra, names in EXTRAS.items() if name in names)
    assert f"{what} needs " in message and f"pip install 'm3ae-fast{f'[{known}]' if known else ''}'" in message
    assert "\n" not in message and sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("source", ["nosuch", "photos/cats", "C:/photos", "C:\\photos"])
def test_a_missing_source_is_reported_as_a_missing_folder_before_a_missing_library(tmp_path, monkeypatch, hide, source):
    monkeypatch.chdir(tmp_path)
    hide("datasets")
    with pytest.raises(UserError) as error:
        pretrain(source, "run")
    more = f"; if it is the name of a dataset on the Hugging Face Hub: {DATASETS}" if "C:" not in source else ""
    assert str(error.value) == f"{source}: no such folder{more}" and not list(tmp_path.iterdir())


def test_a_dry_run_for_other_machines_requires_no_optional_library(tmp_path, hide, capsys):
    hide("deepspeed", "tensorboard")
    line = ["--config", str(ROOT / "configs/base.json"), "--dry-run", "--no-data"]
    for more in (["--world", "8"], []):
        assert import_module(MODULES["train"]).main([*line, *more]) == 0


IMPORTED = {"scikit-image": "skimage", "scikit-learn": "sklearn"}  # names of modules by package, if they differ


def test_suggested_extras_are_extras_of_the_package():
    tomllib = pytest.importorskip("tomllib")  # part of Python from 3.11 on
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = {"": project["dependencies"], **project["optional-dependencies"]}
    for extra, names in EXTRAS.items():
        packages = [re.match(r"[\w-]+", each)[0] for each in listed[extra]]
        wanted = {IMPORTED.get(name, name) for name in packages}
        assert {*names} <= wanted if extra == "" else {*names} == wanted
    assert {*listed} - {*EXTRAS} == {"docs", "dev"}  # these extras are not required by any command


def test_one_line_names_all_missing_libraries(hide):
    hide("onnx", "timm", "wandb", "sklearn")
    for needs, message in (
        ({"onnx": "a", "timm": "a"}, "a needs onnx and timm: pip install 'm3ae-fast[onnx]'"),
        ({"timm": "a", "scipy": "a"}, "a needs timm: pip install 'm3ae-fast[evaluate]'"),
        (
            {"sklearn": "a", "wandb": "b"},
            "a needs scikit-learn; b needs wandb: pip install 'm3ae-fast[evaluate,wandb]'",
        ),
    ):
        with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
            require_libraries(needs)
    require_libraries({"scipy": "a"})


def test_the_reason_why_a_library_cannot_be_imported_is_reported(tmp_path, monkeypatch):
    (tmp_path / "msgpack.py").write_text("import nothing_of_this_name")
    monkeypatch.delitem(sys.modules, "msgpack", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"^x needs msgpack, which cannot be imported: No module named 'nothing_of"):
        library("msgpack", "x")


@pytest.mark.parametrize("name", ["a.tif", "A.TIFF"])
def test_a_folder_of_tiffs_that_require_tifffile_is_reported(tmp_path, hide, name):
    tifffile.imwrite(tmp_path / name, np.zeros((8, 8, 6), np.uint8), planarconfig="contig", photometric="minisblack")
    assert Folder(tmp_path, SourceOptions())
    hide("tifffile")
    with pytest.raises(
        UserError, match=rf"{re.escape(name)}: a TIFF with bands .* needs tifffile: pip install 'm3ae-fast\[tiff\]'"
    ):
        Folder(tmp_path, SourceOptions())


def test_work_of_unknown_length_prints_progress(capsys):
    with working("waiting", every=0.001):
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and capsys.readouterr().err.count("so far") < 1:
            time.sleep(0.001)
    assert time.monotonic() < deadline
    with working("quiet", show=False, every=0.001):
        time.sleep(0.01)
    assert "quiet" not in capsys.readouterr().err


def test_all_optional_libraries_are_installed_for_development():
    assert all(find_spec(name) for names in EXTRAS.values() for name in names)
