"""The README's way from a folder of images to a trained model."""

import re
import shlex
import subprocess
import sys

import pytest
import torch

from m3ae_fast.cli import draw, export
from m3ae_fast.cli.shards import main as data
from m3ae_fast.model.m3ae import M3AE
from tests.helpers.ranks import environment
from tests.helpers.shards import caption, picture
from tests.helpers.trainer import ROOT, TINY

pytestmark = pytest.mark.slow

SMALL = {**{f"model.{key}": value for key, value in TINY["model"].items() if key not in ("size", "vocab_size")}}
SMALL |= {"train.steps": 3, "train.global_batch": 8, "train.pictures": 0, "data.workers": 0, "deepspeed": "null"}


def test_five_commands_from_a_folder_to_a_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(10):
            (tmp_path / "images" / name / f"{i}.jpg").write_bytes(picture(i))
            if i % 5:
                (tmp_path / "images" / name / f"{i}.txt").write_text(f"{name} {caption(i)}")
    block = re.search(r"```sh\n(m3ae-fast shards make.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    commands = [shlex.split(line) for line in block[1].splitlines()]
    make, words, train, show, write = (command[2:] for command in commands)  # five, each m3ae-fast COMMAND ...
    assert data(make) == 0 and data(words) == 0
    said = capsys.readouterr().out
    assert "20 samples" in said and "fewer than the 2,048 requested" in said
    size = re.search(r"model\.vocab_size=(\d+)", said)[1]
    train = [size.join(word.split("2048")) if "vocab_size" in word else word for word in train]
    options = [option for key, value in SMALL.items() for option in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "m3ae_fast", "train", *train, *options]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert draw.main([*show, "--pictures", "2"]) == 0 and export.main(write) == 0
    features = M3AE.from_pretrained("out").representation(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    assert features.isfinite().all()
