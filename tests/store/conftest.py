"""The store that most tests of damage and of what is kept beside the rows begin with."""

from pathlib import Path

import pytest
from store_samples import full_store

from logra_kernels.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return full_store(tmp_path)
