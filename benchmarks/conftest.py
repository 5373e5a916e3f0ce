import os

# Before torch is imported: OpenMP threads that wait must not keep a core from the others.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import pytest

from m3ae_fast.engine import distributed


@pytest.fixture(scope="session")
def ranks():
    yield distributed.start()
    distributed.stop()
