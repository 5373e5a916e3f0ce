"""The commands of the recipes run in the order in which they are printed, with small models and few samples."""

import csv
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from m3ae_fast.__main__ import MODULES
from tests.helpers.ranks import environment
from tests.helpers.shards import caption, picture
from tests.helpers.trainer import ROOT, TINY
from tests.test_installed_package import RUN

RECIPES = ROOT / "docs/recipes"


def lines(page: Path) -> list[list[str]]:
    """Return the words of each command of m3ae-fast in a page's code blocks, also if it is started by torchrun."""
    blocks = re.findall(r"^```\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    found = [shlex.split(line) for block in blocks for line in block.splitlines()]
    return [words for words in found if words and ("m3ae_fast" in words or words[0] == "m3ae-fast")]


def codes(page: Path) -> list[str]:
    """Return the blocks of Python in a page."""
    blocks = re.findall(r"^( *)```python\n(.*?)^ *```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [re.sub(f"^{indent}", "", block, flags=re.MULTILINE) for indent, block in blocks]


def run(folder: Path, *commands: list[str]) -> str:
    """Run commands of m3ae-fast in one process, and return what they printed."""
    done = subprocess.run(
        [sys.executable, "-c", RUN], cwd=folder, env=environment() | {"XDG_CACHE_HOME": str(folder / "cache")},
        input=json.dumps(commands), capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_the_recipe_for_own_images_runs_with_captions_and_classes_from_a_table(tmp_path, monkeypatch):
    (tmp_path / "photos/a").mkdir(parents=True)
    with open(tmp_path / "photos/products.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(("photo", "product_title", "category"))
        for i in range(60):
            (tmp_path / f"photos/a/{i:04}.jpg").write_bytes(picture(i))
            table.writerow((f"a/{i:04}.jpg", caption(i), ("shoes", "bags", "hats")[i % 3]))
    page = RECIPES / "own-images.md"
    commands = lines(page)
    assert [words[1] for words in commands] == ["pretrain", "evaluate", "pretrain", "embed", "neighbours"]
    small = ["--set", "train.steps=4", "--set", "train.global_batch=8", "--set", "data.workers=0"]
    few = ["--set", "data.workers=0"]
    commands = [[*words, *(small if words[1] == "pretrain" else few)] for words in commands]
    save_file(timm.create_model("resnet10t", pretrained=False).state_dict(), tmp_path / "weights.safetensors")
    local = "timm:resnet10t@32=weights.safetensors"  # no download
    commands = [[local if word.startswith("timm:") else word for word in words] for words in commands]
    output = run(tmp_path, *commands)
    for part in ("classes by json.category: 3", "54 samples and 6 held out; captions", "verdict: ", "features.parquet"):
        assert part in output
    assert output.count("  photos/a/") == 12 and (tmp_path / "neighbours.png").is_file()
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for code in codes(page):
        exec(code, names)
    assert sorted(names["keys"]) == [f"a/{i:04}.jpg" for i in range(60)] and names["similarity"].shape == (60,)
    assert names["similarity"].argmax() == names["keys"].index("a/0001.jpg")


@pytest.mark.slow
def test_the_recipe_for_the_paper_runs_with_two_ranks_and_a_folder_with_classes(tmp_path):
    source = ROOT / "data/openclipart"
    (tmp_path / "data/cc12m").mkdir(parents=True)
    for number, name in (("00000", "train-0000"), ("01242", "val-0000")):
        (tmp_path / f"data/cc12m/{number}.tar").symlink_to(source / f"{name}.tar")
    for split in ("train", "val"):
        for kind in ("cat", "dog"):
            (tmp_path / "imagenet" / split / kind).mkdir(parents=True)
            for i in range(8):
                seed = i + 100 * (kind == "dog") + 50 * (split == "val")
                (tmp_path / "imagenet" / split / kind / f"{i}.jpg").write_bytes(picture(seed))
    model = TINY["model"] | {"vocab_size": 2048}
    tokenizer = str(source / "tokenizer.json")
    config = {"model": model, "data": {"train": [{"shards": "none"}], "tokenizer": tokenizer, "workers": 0}}
    config |= {"train": {"steps": 2, "global_batch": 8, "pictures": 0, "eval_samples": 8}}
    (tmp_path / "tiny.json").write_text(json.dumps(config))

    def smaller(words: list[str]) -> list[str]:
        words = ["tiny.json" if word == "large" else word.replace("{00000..01241}", "00000") for word in words]
        words = [word.replace("eval_every=5000", "eval_every=2").replace("epochs=160", "steps=2") for word in words]
        probe = ["--set", "train.steps=2", "--set", "train.global_batch=4", "--set", "data.workers=0"]
        return [*words, *(probe if "linear" in words else [])]

    table, make, plan, hours, m3ae, probe, compare = lines(RECIPES / "cc12m.md")
    (changed,) = re.findall(r"replace\s`([^`]*)` with\s`([^`]*)`", (RECIPES / "cc12m.md").read_text(encoding="utf-8"))
    mae = shlex.split(shlex.join(m3ae).replace(*changed))
    assert mae[-4:] == ["--out", "runs/mae", "--resume", "auto"] and "model.vocab_size=0" in mae
    second = [word.replace("m3ae", "mae") if "/" in word else word for word in probe]
    output = run(tmp_path, table, make, plan)
    assert "GB per GPU" in output and (tmp_path / "data/imagenet/train-00000.tar").is_file()
    for words in (hours, m3ae, mae, probe, second):
        at = words.index("m3ae_fast")
        ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
        assert words[:at] == ["torchrun", "--nproc-per-node", "8", "-m"] and words[at + 1] in MODULES
        done = subprocess.run(
            [*ranks, *smaller(words[at:])], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        assert words != hours or "on this machine: 2 steps" in done.stdout
    for name in ("m3ae", "mae"):
        assert json.loads((tmp_path / "results" / name / "result.json").read_text())["val_samples"] == 16
    assert "results/m3ae" in run(tmp_path, compare)


def test_the_recipe_for_fused_ops_runs_as_printed():
    names: dict = {}
    for code in codes(RECIPES / "fused-ops.md"):
        exec(code, names)
    weights = [names["mask_token"], names["vit"].blocks[0].attn.qkv.weight]
    layers = (names["embed"], names["decoder_pred"], names["lm_head"])
    assert all(weight.grad.abs().sum() > 0 for weight in (*weights, *(layer.weight for layer in layers)))


def test_the_results_of_the_recipe_for_fused_ops_are_those_of_the_code_that_they_replace():
    names: dict = {}
    exec(codes(RECIPES / "fused-ops.md")[0], names)
    B, L, K, D = (names[name] for name in "BLKD")
    vit, images, restore = names["vit"], names["images"], names["ids_restore"]
    mean, std = (torch.tensor(names["norm"][name])[:, None, None] for name in ("mean", "std"))
    pixels = (images / 255 - mean) / std
    with torch.no_grad():
        patches = vit.patch_embed(pixels) + vit.pos_embed[:, 1:]
        kept = patches.gather(1, names["ids_keep"][..., None].expand(-1, -1, D))
        x = vit.blocks[:2](torch.cat((names["cls"], kept), 1))
        every = torch.cat((x[:, 1:], names["mask_token"].expand(B, L - K, D)), 1)
        every = torch.cat((x[:, :1], every.gather(1, restore[..., None].expand(-1, -1, D))), 1)
        y = vit.blocks[2](every + names["positions"])
        targets = pixels.unfold(2, 16, 16).unfold(3, 16, 16).permute(0, 2, 3, 4, 5, 1).reshape(B, L, -1)
        targets = (targets - targets.mean(-1, keepdim=True)) / (targets.var(-1, keepdim=True) + 1e-6).sqrt()
        hidden = y[:, 1:][restore >= K]
        loss = (names["decoder_pred"](hidden) - targets[restore >= K]).square().mean()
        words = torch.nn.functional.cross_entropy(names["lm_head"](names["hidden"]).mT, names["targets"])
    torch.testing.assert_close(names["x"], x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(names["y"], y, rtol=1e-4, atol=1e-4)
    assert names["hidden"].shape == (B, L - K, D)
    torch.testing.assert_close(names["loss"].detach(), loss + words, rtol=1e-4, atol=1e-4)
    exec(codes(RECIPES / "fused-ops.md")[1], names)
    alone = torch.cat([names["attn"](own[None])[0] for own in names["rows"].split(names["lengths"].tolist())])
    torch.testing.assert_close(names["out"], alone, rtol=1e-4, atol=1e-4)


def test_the_loader_reads_the_batch_of_one_step_as_contributing_shows(tmp_path, monkeypatch):
    (tmp_path / "data").symlink_to(ROOT / "data")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    (code,) = codes(ROOT / "CONTRIBUTING.md")
    exec(code, names)
    assert names["loader"].num_workers == 0 and len(names["batch"].keys) == 64
    config, data, share = names["config"], names["data"], names["split_batch"](names["config"].train, 1)
    _, _, third = names["train_loader"](config.data, data.train, names["preparation"], share, range(3))
    exec(code.replace("N = 1", "N = 3"), names)
    assert names["batch"].keys == third.keys and torch.equal(names["batch"].images, third.images)
    with Image.open("crop-63.png") as crop:
        assert np.array_equal(np.asarray(crop), third.images[63].permute(1, 2, 0))
