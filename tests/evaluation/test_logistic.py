"""The task `logistic` and the classifier that it writes."""

import re
from operator import eq

import pytest
import torch

from m3ae_fast.base.parquet import read_parquet
from m3ae_fast.heads.classifier import Classifier
from m3ae_fast.heads.logistic_regression import INVERSE_STRENGTHS
from m3ae_fast.weights.open_model import open_model
from tests.evaluation.conftest import figure_names, settings
from tests.helpers.labelled import NAMES, coloured
from tests.helpers.trainer import ROOT

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("pool", ["mean", "cls", "grid2"])
def test_robustness_and_ood_use_the_saved_logistic_classifier(transfer, run, shards, tmp_path, pool):
    labels = ["--labels", "json.name"]
    encode = settings("encode.precision=fp32", f"encode.pool={pool}")
    result = transfer("logistic", *labels, *encode, out="classifier")
    assert result["top1"] > 0.4 and result["inverse_strength"] in INVERSE_STRENGTHS  # chance: a third
    assert (result["classes"], result["train_samples"], result["val_samples"]) == (3, 48, 18)
    assert figure_names(tmp_path / "classifier") == ["confusion"]
    classifier = Classifier.from_pretrained(tmp_path / "classifier")
    saved = classifier.config
    assert (saved.pool, saved.head, saved.modality, saved.classes) == (
        pool,
        "logistic",
        "image",
        ["blue", "green", "red"],
    )
    encoder = open_model(str(run), text=False)
    assert torch.equal(classifier.backbone.patch_embed.weight, encoder.patch_embed.weight)

    given = {"model": tmp_path / "classifier"}
    clean = settings("robustness.epsilons=[]")
    transfer("robustness", *labels, *clean, **given, train=None, out="clean")
    transfer("ood", *labels, "--ood", shards[0], *encode, **given, out="ood")
    measured, attacked, ood = (
        read_parquet(tmp_path / f"{name}/predictions.parquet") for name in ("classifier", "clean", "ood")
    )
    assert attacked["prediction"] == measured["prediction"]
    assert attacked["score"] == pytest.approx(measured["score"], rel=1e-3)
    assert ood["max_softmax"][:18] == pytest.approx(measured["score"], rel=1e-3)


def test_the_guide_shows_how_to_classify_images(transfer, tmp_path):
    transfer("logistic", "--labels", "json.name")
    paths = []
    for number in range(100, 118):  # the images of the validation shard
        path = tmp_path / f"{number}.png"
        path.write_bytes(coloured(number, NAMES[number % 3]))
        paths.append(str(path))
    guide = (ROOT / "docs/guide/evaluating.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(import torch\n.*?)```", guide, re.DOTALL)
    names: dict = {}
    exec(code.replace('"runs/finetune"', repr(str(tmp_path / "out"))).replace('["a.jpg", "b.jpg"]', repr(paths)), names)
    predicted = read_parquet(tmp_path / "out/predictions.parquet")["prediction"]
    assert sum(map(eq, names["labels"], predicted)) >= 17  # rounding may decide a tie


@pytest.mark.parametrize("options", [["--layers", "1"], ["--shots", "5"], ["pixels"]])
def test_evaluations_of_several_layers_or_of_pixels_save_no_classifier(transfer, run, tmp_path, options):
    model = "pixels" if options == ["pixels"] else run
    result = transfer("logistic", *([] if options == ["pixels"] else options), model=model)
    assert not (tmp_path / "out/classifier.json").exists()
    assert ("results" in result) == (options != ["pixels"])
    assert ("inverse_strength" in result) == ("--shots" not in options)  # with --shots, each draw has its own
