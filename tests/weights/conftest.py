from pathlib import Path

import pytest

from tests.helpers.trainer import Trainer


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Path:
    """Return the folder of a run with a few training steps."""
    trainer = Trainer(tmp_path_factory.mktemp("run"))
    trainer("run", "--set", "train.eval_every=6")
    return trainer.folder / "run"
