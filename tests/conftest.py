"""Fixtures for every test: instruction sets, thread counts, poisoned memory."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from dense_influence import gradients, make_store

from logra_kernels import ops
from logra_kernels.store import Store


@pytest.fixture(params=ops.available_isas() or ["reference"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set this machine has; "reference" where the C++ kernels are not loaded."""
    if request.param == "reference":
        yield request.param
        return
    before = ops.isa()
    ops.set_isa(request.param)
    yield request.param
    ops.set_isa(str(before))


@pytest.fixture
def native() -> None:
    """For what only the C++ kernels promise."""
    if ops.isa() is None:
        pytest.skip("the C++ kernels are not loaded")


@pytest.fixture
def set_threads() -> Iterator[None]:
    """Puts torch.set_num_threads back after a test that changes it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def poison() -> Iterator[None]:
    """Fills memory from torch.empty with NaN, so that an element nobody writes is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def in_memory(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where that is possible: thousands of fsyncs take a minute on a busy disk.

    A killed process loses nothing that it gave to the kernel; a power cut is not tested.
    """
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        yield Path(name)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """150 rows of correlated gradients in float16, in four shards."""
    return make_store(tmp_path / "store", gradients(150), shard_rows=40)
