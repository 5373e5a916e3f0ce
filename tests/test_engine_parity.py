"""A config has the same loss curve with every engine and every split of a step."""

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.ranks import run_ranks
from tests.helpers.trainer import zero
from tests.helpers.zero_cases import CONFIGS

pytestmark = pytest.mark.slow


def _curves(folder: Path, which: str, ranks: int) -> dict[str, np.ndarray]:
    """Return the curve of each case, [steps, (loss, gradient norm)]."""
    found = folder / f"{which}-{ranks}.jsonl"
    code, out = run_ranks("tests.helpers.zero_cases", [which, str(found)], ranks, folder / f"{which}-{ranks}.log")
    assert code == 0, out[-3000:]
    return {name: np.array(curve) for name, curve in map(json.loads, found.read_text().splitlines())}


def test_loss_curves_equal_those_of_plain_torch(tmp_path):
    """Curves are equal in float32. In bf16, ZeRO keeps bf16 weights with float32 master weights, so its curves are
    close to those of plain torch's autocast but not equal. This is a single test, because each of pytest's workers
    would compute the curves again if they were a fixture."""
    found = {ranks: _curves(tmp_path, "matrix", ranks) for ranks in (1, 2)}
    plain = {precision: found[1][f"{precision} stage=None accumulation=1"] for precision in ("fp32", "bf16")}
    assert np.ptp(plain["fp32"][:, 0]) > 0.3  # the curve moves
    assert (plain["bf16"] != plain["fp32"]).all()
    for (ranks, curves), (precision, tolerance) in product(found.items(), (("fp32", 1e-5), ("bf16", 1e-2))):
        cases = {name: curve for name, curve in curves.items() if name.startswith(precision)}
        assert len(cases) == (16 if precision == "fp32" and ranks > 1 else 10)
        for name, curve in cases.items():
            np.testing.assert_allclose(curve, plain[precision], rtol=tolerance, err_msg=f"{name} on {ranks} ranks")


def test_the_number_of_ranks_need_not_divide_the_batch(tmp_path):
    """Sixteen samples are split over three ranks, in one or more micro-batches, at every ZeRO stage. The images have
    different sizes."""
    curves, one = _curves(tmp_path, "uneven", 3), _curves(tmp_path, "uneven", 1)
    assert len(curves) == 10
    for name, curve in curves.items():
        np.testing.assert_allclose(curve, one["stage=None accumulation=1"], rtol=1e-5, err_msg=name)


def test_clipping_and_layer_decay_equal_plain_torch(tmp_path):
    curves = _curves(tmp_path, "unclipped", 2)
    plain = curves.pop("plain")
    for kind, number in (("unclipped", 3), ("layer decay", 5)):
        own = {name: curve for name, curve in curves.items() if name.endswith(kind)}
        first = next(iter(own.values()))
        assert len(own) == number and abs(plain - first).max() > 1e-3
        for name, curve in own.items():
            np.testing.assert_allclose(curve, first, rtol=1e-5, err_msg=name)


def test_shipped_configs_train_as_in_plain_torch(tmp_path):
    """The configs are trained at small sizes on two ranks in bf16, with their deepspeed section, compiled blocks and
    gradient accumulation."""
    curves = _curves(tmp_path, "configs", 2)
    assert len(curves) == 2 * len(CONFIGS) >= 10
    for path in CONFIGS:
        np.testing.assert_allclose(curves[path.name], curves[f"{path.name} plain"], rtol=1e-2, err_msg=path.name)


def test_the_trainer_has_the_same_loss_curve_on_two_ranks(trainer):
    """The runs have stochastic depth. Those on two ranks have another micro-batch size than the run on one rank."""
    drops = ["--set", "model.drop_path=0.3"]
    trainer("one", *zero(None), *drops)
    for stage in (None, 3):
        trainer(f"two-{stage}", *zero(stage), *drops, "--set", "train.micro_batch=8", ranks=2)
        np.testing.assert_allclose(np.array(trainer.losses(f"two-{stage}")), np.array(trainer.losses("one")), rtol=2e-5)
