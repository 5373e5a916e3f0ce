from collections.abc import Iterator

import pytest

from tests.cuda_path.fake_cuda import FakeCuda


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    with FakeCuda() as fake:
        yield fake
