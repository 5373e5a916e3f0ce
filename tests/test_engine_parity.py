"""One config gives one loss curve, whatever trains it and however a step is split."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.ranks import run_ranks
from tests.helpers.trainer import zero
from tests.helpers.zero_cases import CONFIGS, OPTIONS

PLAIN = "stage=None accumulation=1"


def _curves(folder: Path, which: str, ranks: int) -> dict[str, np.ndarray]:
    """By case: [steps, (loss, gradient norm)]."""
    found = folder / f"{which}-{ranks}.jsonl"
    code, out = run_ranks("tests.helpers.zero_cases", [which, str(found)], ranks, folder / f"{which}-{ranks}.log")
    assert code == 0, out[-3000:]
    return {name: np.array(curve) for name, curve in map(json.loads, found.read_text().splitlines())}


@pytest.fixture(scope="module")
def matrix(tmp_path_factory) -> dict[int, dict[str, np.ndarray]]:
    folder = tmp_path_factory.mktemp("matrix")
    return {ranks: _curves(folder, "matrix", ranks) for ranks in (1, 2)}


@pytest.mark.parametrize("ranks", [1, 2])
def test_float32_curves_are_plain_torchs(matrix, ranks):
    expected = matrix[1][f"fp32 {PLAIN}"]
    assert np.ptp(expected[:, 0]) > 0.3  # the curve moves
    cases = {name: curve for name, curve in matrix[ranks].items() if name.startswith("fp32")}
    assert len(cases) == 28
    for name, curve in cases.items():
        np.testing.assert_allclose(curve, expected, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("ranks", [1, 2])
def test_bf16_curves_stay_near(matrix, ranks):
    """ZeRO keeps bf16 weights with float32 masters: near plain torch's autocast, not on it."""
    expected, exact = (matrix[1][f"{precision} {PLAIN}"] for precision in ("bf16", "fp32"))
    assert (expected != exact).all()
    cases = {name: curve for name, curve in matrix[ranks].items() if name.startswith("bf16")}
    assert len(cases) == 28
    for name, curve in cases.items():
        np.testing.assert_allclose(curve, expected, rtol=1e-2, err_msg=name)


def test_other_settings_of_the_deepspeed_section_change_nothing(tmp_path, matrix):
    curves = _curves(tmp_path, "options", 2)
    unclipped = {name: curves.pop(name) for name in list(curves) if name.startswith("unclipped")}
    assert len(curves) == len(OPTIONS) + 1
    for name, curve in curves.items():
        np.testing.assert_allclose(curve, matrix[1][f"fp32 {PLAIN}"], rtol=1e-5, err_msg=name)
    free = unclipped.pop("unclipped stage=None")
    assert abs(free - matrix[1][f"fp32 {PLAIN}"]).max() > 1e-3
    for name, curve in unclipped.items():
        np.testing.assert_allclose(curve, free, rtol=1e-5, err_msg=name)


def test_shipped_configs_train_as_plain_torch_does(tmp_path):
    """Their own deepspeed section, compiled blocks and accumulation, on two ranks, in bf16, with small sizes."""
    curves = _curves(tmp_path, "configs", 2)
    assert len(curves) == 2 * len(CONFIGS) >= 12
    for path in CONFIGS:
        np.testing.assert_allclose(curves[path.name], curves[f"{path.name} plain"], rtol=1e-2, err_msg=path.name)


def test_the_trainer_gives_the_same_curve_on_two_ranks(trainer):
    trainer("one", *zero(None))
    for stage in (None, 3):
        trainer(f"two-{stage}", *zero(stage), ranks=2)
        np.testing.assert_allclose(np.array(trainer.losses(f"two-{stage}")), np.array(trainer.losses("one")), rtol=2e-5)
