"""Fixtures for every test: instruction sets, thread counts, poisoned memory."""

from collections.abc import Iterator

import pytest
import torch

from logra_kernels import ops


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
