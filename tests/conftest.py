from pathlib import Path

import pytest

from tests.helpers.trainer import Trainer


@pytest.fixture
def trainer(tmp_path: Path) -> Trainer:
    return Trainer(tmp_path)
