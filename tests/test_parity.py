"""One config gives one loss curve, whatever trains it: plain torch or ZeRO 0-3, one rank or two."""

import numpy as np
import pytest
from trainer import Trainer, zero


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> tuple[Trainer, np.ndarray]:
    trainer = Trainer(tmp_path_factory.mktemp("parity"))
    trainer("plain")
    return trainer, np.array(trainer.losses("plain"))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", [None, 0, 1, 2, 3])
def test_same_curve(reference, stage, ranks):
    trainer, expected = reference
    run = f"stage-{stage}-ranks-{ranks}"
    trainer(run, *zero(stage), ranks=ranks)
    np.testing.assert_allclose(np.array(trainer.losses(run)), expected, rtol=2e-5)
    assert np.ptp(expected[:, 1]) > 0.1  # the curve moves


def test_bf16_stays_near(reference):
    """ZeRO-2 keeps bf16 weights with float32 masters: near the float32 curve, not on it."""
    trainer, expected = reference
    trainer("bf16", *zero(2), "--set", "train.precision=bf16")
    got = np.array(trainer.losses("bf16"))
    np.testing.assert_allclose(got[:, 1], expected[:, 1], rtol=2e-2)
    assert (got[:, 1] != expected[:, 1]).any()
