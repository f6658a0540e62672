"""The ops under pytest-benchmark, a group for each problem: pytest bench/test_ops.py

Every provider is checked before it is timed, and one that is wrong fails. The harness of the other
benches takes providers in turns, which is fairer where neighbours disturb; this one fits tools that
compare runs (--benchmark-save, --benchmark-compare).
"""

import random
from collections.abc import Callable

import pytest
import torch

from bench import bench_covariance_update as covariance
from bench import bench_pack_rows as packing
from bench import bench_per_sample_gradients as per_sample
from bench import bench_project as project
from bench import bench_projected_gradients as projected
from bench import bench_scores as scan
from bench import bench_self_influence as influence
from bench import bench_topk_scores as top
from bench._harness import Case


def _rows(num_rows: int, dim: int) -> torch.Tensor:
    return torch.randn(num_rows, dim).half()


PROBLEMS: dict[str, Callable[[], Case]] = {
    "project fp32": lambda: project.case(2048, 2048, 64, "fp32"),
    "project bf16": lambda: project.case(2048, 2048, 64, "bf16"),
    "per_sample_gradients fp32": lambda: per_sample.case(8, 256, 64, "fp32", "full"),
    "per_sample_gradients ragged": lambda: per_sample.case(8, 256, 64, "fp32", "ragged"),
    "projected_gradients fp32": lambda: projected.case(8, 256, 2048, 64, "fp32", "full"),
    "projected_gradients bf16": lambda: projected.case(8, 256, 2048, 64, "bf16", "full"),
    "covariance_update fp32": lambda: covariance.case(1024, 256, "fp32"),
    "covariance_update fp64": lambda: covariance.case(1024, 256, "fp64"),
    "scores Q=1": lambda: scan.case(torch.randn(1, 4096), _rows(4000, 4096)),
    "scores Q=16": lambda: scan.case(torch.randn(16, 4096), _rows(4000, 4096)),
    "scores Q=64": lambda: scan.case(torch.randn(64, 4096), _rows(4000, 4096)),
    "topk_scores Q=16": lambda: top.case(torch.randn(16, 4096), _rows(4000, 4096), 10),
    "self_influence K=256": lambda: influence.case(4000, 256),
    "pack_rows": lambda: packing.case(64, 16384),
    "unpack_rows": lambda: packing.case(64, 16384, unpack=True),
}

_made: dict[str, Case] = {}


def made(problem: str) -> Case:
    """One problem at a time is kept; every provider of it is given the same numbers."""
    if problem not in _made:
        _made.clear()
        torch.manual_seed(0)
        random.seed(0)
        with torch.no_grad():
            _made[problem] = PROBLEMS[problem]()
    return _made[problem]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    pairs = [(problem, name) for problem in PROBLEMS for name in made(problem).providers]
    metafunc.parametrize(("problem", "provider"), pairs)


def test_op(benchmark, problem: str, provider: str) -> None:
    case = made(problem)
    call = case.providers[provider]
    with torch.no_grad():
        error = case.error(provider, call())
        assert error <= case.allowed(provider), f"{provider} is wrong by {error:.1e}"
        benchmark.group = f"{case.op}: {case.title}"
        benchmark.extra_info.update(case.params, error=error)
        benchmark(call)
