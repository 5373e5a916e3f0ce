"""The example programs and the notebook run unchanged."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
import yaml
from nbclient import NotebookClient
from PIL import Image
from torch.distributed.run import parse_args as torchrun

from m3ae_fast.cli.shards import main as data
from m3ae_fast.config import ModelConfig, load_config
from m3ae_fast.model import M3AE
from m3ae_fast.train import parse_args
from tests.helpers.shards import caption
from tests.helpers.trainer import ROOT, TINY, environment

EXAMPLES = ROOT / "examples"
NOTEBOOK = EXAMPLES / "pictures_to_probe.ipynb"


def texts(cell) -> str:
    """Return the printed output of a cell."""
    return "".join(output.get("text", "") for output in cell.get("outputs", []))


def pictures(notebook) -> int:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def test_the_notebook_runs_from_images_to_a_probe(tmp_path, monkeypatch):
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    stored = nbformat.read(NOTEBOOK, as_version=4)
    fresh = nbformat.from_dict(stored)
    for cell in fresh.cells:  # half the number of training steps
        cell.source = cell.source.replace('--config "$CONFIG"', '--config "$CONFIG" --set train.epochs=14')
    NotebookClient(fresh, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(map(texts, fresh.cells))
    losses = [float(value) for value in re.findall(r"val_image_loss ([\d.]+)", printed)]
    assert losses[-1] < 0.6 * losses[0]
    rows = re.findall(r"^(k-NN|logistic) +([\d.]+)% +([\d.]+)%$", printed, re.MULTILINE)
    assert [name for name, *_ in rows] == ["k-NN", "logistic"]
    untrained, trained = (sum(float(row[column]) for row in rows) / 2 for column in (1, 2))
    # Chance is 12.5 %. The two probes are averaged, because one alone is only two or three
    # samples better than with random weights.
    assert trained > max(untrained, 25)
    assert pictures(fresh) == pictures(stored) == 5  # the stored output is up to date
    assert NOTEBOOK.stat().st_size < 500_000


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return a folder with images of two classes and their captions, which is the current folder of the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name, level in (("dark", 60), ("light", 190)):
        Path("pictures", name).mkdir(parents=True)
        for i in range(20):
            pixels = rng.integers(level - 50, level + 50, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(f"pictures/{name}/{i}.png")
            Path(f"pictures/{name}/{i}.txt").write_text(f"{name} {caption(i)}")
    return tmp_path


def test_the_own_data_config_fits_shards_made_from_a_folder(folder, capsys):
    assert data(["make", "pictures", "--out", "shards", "--held-out", "0.2"]) == 0
    assert data(["tokenizer", "shards/train-*.tar", "--vocab-size", "1024", "--out", "tokenizer.json"]) == 0
    size = re.search(r"model\.vocab_size=(\d+)", capsys.readouterr().out)[1]  # few captions give a small vocabulary
    config = str(EXAMPLES / "own_data.json")
    command = [sys.executable, "-m", "m3ae_fast", "train", "--config", config, "--set", f"model.vocab_size={size}"]
    done = subprocess.run([*command, "--dry-run"], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "32 samples, 8 held out" in done.stdout and not Path("runs").exists()
    named = set(re.findall(r"^\| `([\w.]+)`", (EXAMPLES / "README.md").read_text(), re.MULTILINE))
    written = {
        f"{section}.{key}" for section, keys in json.loads(Path(config).read_text()).items() if keys for key in keys
    }
    assert named <= written | {"model.size", "deepspeed"}  # all settings in the file are explained


def _classify(*options):
    """Return the printed output of the example."""
    command = [sys.executable, str(EXAMPLES / "classifier.py"), "model", "pictures", "--batch", "8", *options]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_classifier_example_uses_the_encoder_in_plain_torch(folder):
    M3AE(ModelConfig(**TINY["model"])).save_pretrained("model")
    output = _classify("--epochs", "4")
    losses, accuracies = (
        [float(value) for value in re.findall(pattern, output)] for pattern in (r"loss ([\d.]+)", r"accuracy ([\d.]+)%")
    )
    assert len(losses) == 4 and losses[-1] < losses[0] and accuracies[-1] == 100
    (short,) = re.findall(
        r"(epoch 1, step 1 of 4, .*)\nepoch 1  loss .*\nstopped after --minutes 0\n", _classify("--minutes", "0")
    )
    assert "min: loss is " in short


def test_the_classifier_example_preprocesses_images_as_shards_do(folder):
    """Transparent pixels are white, regardless of their stored colour."""
    M3AE(ModelConfig(**TINY["model"])).save_pretrained("model")
    for path in Path("pictures").rglob("*.png"):
        pixels = np.array(Image.open(path).convert("RGBA"))
        pixels[..., 3] = 0
        Image.fromarray(pixels).save(path)
    last = re.findall(r"accuracy ([\d.]+)%", _classify("--epochs", "3"))[-1]
    assert float(last) < 90  # the classes cannot be distinguished


def test_scripts_for_many_nodes_name_existing_programs_and_options():
    """The scripts require a cluster. Their syntax, their options and their config are tested without one."""
    folder = EXAMPLES / "many_nodes"
    job = yaml.safe_load((folder / "pytorchjob.yaml").read_text())
    (container,) = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"]
    launcher, script, *options = container["command"] + container["args"]
    assert launcher == "torchrun" and (ROOT / script).is_file()
    args = parse_args(options)
    assert args.resume == "auto" and load_config(ROOT / args.config, args.set).run.dir == Path("/runs/large")
    for name in ("slurm.sbatch", "elastic.sh"):
        subprocess.run(["bash", "-n", folder / name], check=True)
    text = (folder / "elastic.sh").read_text().replace("\\\n", " ")
    words = shlex.split(next(line for line in text.splitlines() if line.startswith("exec torchrun")))
    parsed = torchrun(words[2:])
    assert (parsed.nnodes, parsed.training_script) == ("48:64", "m3ae_fast/train.py")
