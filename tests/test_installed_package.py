"""The commands in the guide work with an installed wheel without extras, in an empty folder without a
clone."""

import json
import re
import shlex
import shutil
import subprocess
import sys

import m3ae_kernels
import pytest
from PIL import Image

from m3ae_fast.config import load_config
from m3ae_fast.model.m3ae import M3AE
from m3ae_fast.training.run_state import status
from tests.helpers.ranks import environment
from tests.helpers.shards import caption, picture
from tests.helpers.trainer import ROOT, TINY
from tests.test_pretrain import make_pictures

pytestmark = pytest.mark.slow

EXTRAS = ("datasets", "deepspeed", "scipy", "sklearn", "timm", "wandb")  # not installed with a wheel without extras
SMALL = {**{f"model.{key}": value for key, value in TINY["model"].items() if key not in ("size", "vocab_size")}}
SMALL |= {"train.steps": 3, "train.global_batch": 8, "train.pictures": 0, "data.workers": 0, "deepspeed": "null"}
# A program that runs command lines one after another, so that torch is imported only once.
RUN = """
import json, sys
from m3ae_fast.__main__ import run

for line in json.load(sys.stdin):
    if "--config" in line and "--dry-run" not in line:  # of so few captions
        size = len(json.load(open("tokenizer.json"))["model"]["vocab"])
        line = [word.replace("model.vocab_size=2048", f"model.vocab_size={size}") for word in line]
    sys.argv = line
    try:
        code = run()
    except SystemExit as end:
        code = end.code
    assert not code, (line, code)
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Return a folder with the packages of the wheel, installed without network access."""
    work = tmp_path_factory.mktemp("wheel")
    for name in ("m3ae_fast", "kernels", "configs", "pyproject.toml", "setup.py", "README.md", "LICENSE"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, work / "source" / name) if name != "m3ae_fast" else copy(
            ROOT / name, work / "source" / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", work / "source", "--no-deps", "--no-build-isolation", "--no-index", "-w", work], check=True
    )
    (wheel,) = work.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", work / "site", wheel], check=True)
    blocked = f"import sys\nsys.modules.update(dict.fromkeys({EXTRAS!r}))\n"  # importing one of them fails
    (work / "site/sitecustomize.py").write_text(blocked)
    return work / "site"


def test_the_quickstart_runs_from_an_empty_folder(site, tmp_path):
    """The config is found by its name. Its images are not installed, but are only in a clone of the repository, as the
    error message says."""
    where = environment() | {"PYTHONPATH": str(site)}
    small = {"deepspeed": "null", "train.steps": 2, "train.pictures": 0, "train.eval_samples": 8, "data.workers": 0}
    line = [site / "bin/m3ae-fast", "train", "--config", "quickstart"]
    line += [word for key, value in small.items() for word in ("--set", f"{key}={value}")]

    def run():
        return subprocess.run(
            [sys.executable, *line], cwd=tmp_path, env=where, capture_output=True, text=True, timeout=300
        )

    missing = run()
    assert missing.returncode == 2 and missing.stderr.count("\n") == 1 and not [*tmp_path.iterdir()]
    assert "no such file; it is part of a clone of m3ae-fast: run the command there, or specify" in missing.stderr
    (tmp_path / "data").mkdir()
    shutil.copytree(ROOT / "data/openclipart", tmp_path / "data/openclipart")
    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert status(tmp_path / "runs/quickstart")[0] == "finished"


def test_the_kernels_are_installed_without_the_engine(tmp_path):
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--no-build-isolation", "--target", tmp_path / "only", tmp_path / "kernels"], check=True)
    code = """
import sys
sys.modules["m3ae_fast"] = None
import torch, m3ae_kernels
hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(16, 8)
m3ae_kernels.masked_token_loss(hidden, weight, torch.arange(4)).backward()
print(m3ae_kernels.__file__, m3ae_kernels.__version__)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment() | {"PYTHONPATH": str(tmp_path / "only")},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / "only/m3ae_kernels/__init__.py"), m3ae_kernels.__version__]


def test_one_command_of_an_installed_wheel_trains_a_model_and_writes_a_report(site, tmp_path):
    make_pictures(tmp_path / "photos")
    line = [site / "bin/m3ae-fast", "pretrain", "photos", "--out", "run", "--hours", "0.001"]
    where = environment() | {"PYTHONPATH": str(site)}
    command = [sys.executable, *line, "--set", "data.workers=0", "--set", "train.steps=12"]
    done = subprocess.run(command, cwd=tmp_path, env=where, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    for expected in ("54 samples and 6 held out", "3 classes", 'model: "tiny"', "images of 40 px", "length: 12 steps"):
        assert expected in done.stdout
    run = tmp_path / "run"
    assert status(run)[0] == "finished"
    for task in ("knn", "logistic"):
        result = json.loads((run / "results" / task / "result.json").read_text())
        assert [*result["baselines"]] == ["random weights", "downscaled pixels", "colour histogram", "HOG"]
        for found in (result, *result["baselines"].values()):
            assert f" {100 * found['top1']:.1f} ± {100 * found['top1_se']:.1f}" in done.stdout
            assert 0 <= found["top1"] <= 1
    # the fraction of the largest class; in the dataset, the three classes have the same size, but not among six random
    # samples
    share = re.escape(f"{100 * result['chance']:.1f}")
    assert result["chance"] >= 1 / 3
    assert re.search(rf"\nthe largest class +{share} +{share}   \(6 samples\)\n", done.stdout)
    page = (run / "report.html").read_text()
    *_, spent, last = done.stdout.splitlines()
    assert re.match(r"time: 0:\d\d:\d\d; preparation \d+%, training steps \d+%", spent)
    assert re.match(r"verdict: by (k-NN|logistic regression) .*, this run is (not )?better than ", last)
    for other in ("random weights", "downscaled pixels", "colour histogram", "HOG", "the largest class"):
        assert re.search(rf"{other} \([+-]\d+\.\d ± \d+\.\d points\)", last)
    assert re.search(r"<p>knn: run .* the largest class[^<]*\.</p>", page) and "<th>chance level</th>" in page
    features = M3AE.from_pretrained(run / "export").encode([Image.new("RGB", (40, 40))], ["a red picture"])
    assert features.isfinite().all()
    config = load_config(run / "config.json")
    assert config.train.steps == 12 and config.model.vocab_size > 0 and config.train.probe


def test_the_guides_commands_train_an_image_model_and_use_it(site, tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(10):
            (tmp_path / "images" / name / f"{i}.jpg").write_bytes(picture(i + 10 * (name == "dog")))
            if i % 5:
                (tmp_path / "images" / name / f"{i}.txt").write_text(f"{name} {caption(i)}")
    block = re.search(
        r"```sh\n(m3ae-fast shards make.*?)```", (ROOT / "docs/guide/training.md").read_text(), re.DOTALL
    )[1]
    make, words, train, show, write = (shlex.split(line) for line in block.splitlines())
    options = [option for key, value in SMALL.items() for option in ("--set", f"{key}={value}")]
    knn = [
        "evaluate",
        "knn",
        "out",
        "--train",
        "shards/train-*.tar",
        "--val",
        "shards/train-*.tar",
        "--set",
        "data.workers=0",
        "--out",
        "results",
    ]
    others = """
        m3ae-fast draw attention runs/mine --pictures 2
        m3ae-fast embed out images/ --out images.npz --set data.workers=0
        m3ae-fast report runs/mine --results results
        m3ae-fast convert out --out again
        m3ae-fast shards stats shards/*.tar
        m3ae-fast train --config small --dry-run --no-data --world 8
        m3ae-fast train --config large --dry-run --no-data
        m3ae-fast shards table shards/*.tar
    """
    lines = [make, words, [*train, *options], [*show, "--pictures", "2"], write, ["m3ae-fast", *knn]]
    lines += [line.split() for line in others.strip().splitlines()]
    where = environment() | {"PYTHONPATH": str(site), "XDG_CACHE_HOME": str(tmp_path / "cache")}

    def run(*command, **options):
        done = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, env=where, capture_output=True, text=True, timeout=200, **options
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    output = run("-c", RUN, input=json.dumps(lines))
    for part in ("20 samples", "fewer than the 2,048 requested", "drew runs/mine/reconstructions.png"):
        assert part in output
    for part in ("images.npz: keys [20]", "Finished at step 3 of 3", "parameters"):
        assert part in output
    assert M3AE.from_pretrained(tmp_path / "again").encode([Image.new("RGB", (40, 40))]).isfinite().all()
    made = {"again", "cache", "images", "images.npz", "out", "results", "runs", "shards", "tokenizer.json"}
    assert {path.name for path in tmp_path.iterdir()} == made
    installed = {path.name for path in (site / "m3ae_fast/configs").glob("*.json")}
    assert installed == {path.name for path in (ROOT / "configs").glob("*.json")}
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "m3ae_fast", *knn[:-1]]
    run(*ranks, "ranks")
    one, two = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("results", "ranks"))
    assert one["top1"] == two["top1"] and one["per_class"] == two["per_class"]
