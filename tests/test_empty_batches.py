"""A rank without samples takes part in all operations of the other ranks: at the end of an evaluation, there may be
fewer samples than ranks."""

import json

import pytest

from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.slow


def test_ranks_with_empty_batches_do_not_change_steps_or_evaluations_at_any_zero_stage(tmp_path):
    found = {}
    for ranks in (1, 3):
        out = tmp_path / f"{ranks}.json"
        code, output = run_ranks("tests.helpers.evaluation_cases", [str(out)], ranks, tmp_path / f"{ranks}.log")
        assert code == 0, output[-3000:]
        found[ranks] = json.loads(out.read_text())
    expected = found[1]["None"]
    assert len(expected) == 11 and {"val_image_loss", "val_text_loss", "val_rankme"} <= expected[0].keys()
    assert "val_position_share" in expected[2]  # not in expected[0], because a single sample has too few patches
    for ranks, stages in found.items():
        for stage, values in stages.items():
            for number, (value, wanted) in enumerate(zip(values, expected, strict=True)):
                assert value == pytest.approx(wanted, rel=1e-5), f"stage {stage} on {ranks} ranks, number {number}"
