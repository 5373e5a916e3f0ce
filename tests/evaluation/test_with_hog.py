"""The features of the model and HOG are concatenated. Their result is reported next to that of the model alone."""

import json
import re

import pytest
import torch

from m3ae_fast import embed
from m3ae_fast.base.errors import UserError
from m3ae_fast.evaluation.baseline_results import BASELINES, MODEL, TOGETHER, WITH_HOG
from m3ae_fast.evaluation.run_report import write_report
from m3ae_fast.evaluation.significance import Difference
from m3ae_fast.heads.feature_bank import FeatureBank
from m3ae_fast.pretraining.final_evaluation import RUN, table, verdict
from m3ae_fast.process.ranks import join_ranks
from tests.evaluation.conftest import settings
from tests.helpers.trainer import ROOT

GUIDE = ROOT / "docs/guide/comparing.md"


@pytest.mark.slow
@pytest.mark.parametrize("task", ["knn", "logistic"])
def test_the_result_equals_that_of_the_file_made_by_the_code_in_the_guide(
    transfer, run, shards, tmp_path, monkeypatch, task, capsys
):
    result = transfer(task, baselines=True)
    together, output = result[WITH_HOG], capsys.readouterr().out
    pool = settings(f"encode.pool={result['pool']}")[1::2]
    embed(run, shards, overrides=pool, out=tmp_path / "model.npz")
    embed("hog", shards[::-1], out=tmp_path / "hog.npz")  # in another order
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(
        r"^## A model with HOG\n.*?^```python\n(.*?)^```$", GUIDE.read_text(), re.DOTALL | re.MULTILINE
    )
    exec(code, {})  # writes both.npz
    compared = transfer("compare", "--probes", task, "--seeds", "1", model=tmp_path / "both.npz", out="compared")
    (row,) = (row for row in compared["rows"] if row["model"] == "both.npz")
    assert {key: together[key] for key in ("top1", "top1_se")} == {key: row[key] for key in ("top1", "top1_se")}

    apart = {name: Difference.read(each) for name, each in together["differences"].items()}
    assert apart[MODEL].value == pytest.approx(together["top1"] - result["top1"])
    assert apart["HOG"].value == pytest.approx(together["top1"] - result[BASELINES]["HOG"]["top1"])
    words = [each.words(TOGETHER, name) for name, each in apart.items()]
    assert together["verdicts"] == words
    assert f"{task}: {TOGETHER}: top1 {together['top1']:.4f} ± " in output and f"; {'; '.join(words)}\n" in output
    (tmp_path / "out/metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0}))
    write_report(tmp_path / "out", tmp_path / "report.html")
    assert f"<td>{run} with HOG</td><td>top1</td>" in (tmp_path / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("options", [("--no-baselines",), ("--pools", "mean"), ("--shots", "2")])
def test_other_results_have_no_entry_with_hog(transfer, options):
    assert WITH_HOG not in transfer("knn", *options, baselines=options[0] != "--no-baselines")


@pytest.mark.slow
def test_the_result_with_hog_is_left_out_if_the_features_of_both_do_not_fit_into_memory(transfer, monkeypatch):
    def lacks(*_):
        raise UserError("the features do not fit")

    monkeypatch.setattr(FeatureBank, "beside", lacks)
    result = transfer("knn", baselines=True)
    assert WITH_HOG not in result and "HOG" in result[BASELINES]
    assert f"the result is written without {TOGETHER}: the features do not fit" in result["warnings"]


def test_each_part_has_unit_length_and_zeros_remain_zeros():
    with join_ranks("cpu") as ranks:
        first_SD, second_SD = torch.tensor([[3.0, 4], [9, 9], [0, 2], [5, 0]]), torch.tensor([[0.0] * 3, [8, 0, 6]])
        first = FeatureBank([*"abcd"], first_SD, torch.arange(4), ranks=ranks).rows([0, 2])
        both = first.beside(FeatureBank([*"ac"], second_SD, torch.tensor([0, 2]), ranks=ranks))
    assert both.keys == [*"ac"] and both.labels.tolist() == [0, 2]
    expected = torch.tensor([[0.6, 0.8, 0, 0, 0], [0, 1, 0.8, 0, 0.6]])
    torch.testing.assert_close(both.features_RD, expected)
    torch.testing.assert_close(both.rows([1]).features_RD, expected[1:])


def _result(top1, **more):
    return {"top1": top1, "top1_se": 0.01, "val_samples": 100, "chance": 0.1} | more


def test_a_run_ends_with_the_accuracy_with_hog(tmp_path):
    apart = {MODEL: Difference(0.04, 0.02, 0.06, 1e-4).entries()}
    knn = _result(0.5, **{WITH_HOG: {"top1": 0.54, "top1_se": 0.02, "differences": apart}})
    (row,) = (line for line in table({"knn": {RUN: knn}}) if line.startswith(f"{RUN} with HOG"))
    assert row.split() == ["this", "run", "with", "HOG", "54.0", "±", "2.0"]
    assert verdict(tmp_path, {"knn": {RUN: knn}}).endswith("; its features with HOG: 54.0 ± 2.0 % (+4.0 ± 1.0 points)")
    assert "HOG" not in verdict(tmp_path, {"knn": {RUN: _result(0.5)}})
    unknown = _result(0.5, **{WITH_HOG: {"top1": 0.54, "top1_se": 0.02, "differences": {}}})
    assert verdict(tmp_path, {"knn": {RUN: unknown}}).endswith("; its features with HOG: 54.0 ± 2.0 %")
