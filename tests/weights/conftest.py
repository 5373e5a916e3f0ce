from pathlib import Path

import pytest

from tests.helpers.trainer import Trainer


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Path:
    """The folder of a run that learned a little."""
    trainer = Trainer(tmp_path_factory.mktemp("run"))
    trainer("run", "--set", "train.eval_every=6")
    return trainer.folder / "run"
