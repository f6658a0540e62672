"""Several threads at once: one Attributor, and numbers of threads that nobody else sees."""

from __future__ import annotations

import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_influence import gradients, make_store
from torch import Tensor

from logra_kernels.attribution import Attributor
from logra_kernels.curvature import RawCurvature
from logra_kernels.curvature.preconditioner import each_module
from logra_kernels.defaults import SCAN_MODES
from logra_kernels.ops._threads import set_own_threads

QUERIES = gradients(3, seed=7)
CALLS, THREADS = 1000, 8


def parts(answer: Any) -> list[Tensor]:
    """The numbers in what a call returned."""
    if isinstance(answer, Tensor):
        return [answer]
    if isinstance(answer, dict):
        return list(answer.values())
    results = [answer, *answer.groups.values()]
    names = ("scores", "top_scores", "top_rows", "bottom_scores", "bottom_rows")
    return [value for one in results for name in names if (value := getattr(one, name)) is not None]


@pytest.fixture
def hurried() -> Iterator[None]:
    """Python changes from one thread to another as often as it can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("reading", ["mapped", "streamed", "resident"])
def test_one_attributor_answers_eight_threads_with_equal_bits(
    tmp_path: Path, reading: str, native: None, hurried: None
) -> None:
    """Of 1,000 calls the first find no norms and no resident rows; all modes come mixed."""
    store = make_store(tmp_path / "s", gradients(150), shard_rows=40)
    curvature = RawCurvature.rebuild(store)
    kinds: list[Callable[[Attributor], Any]] = [
        lambda a: a.self_influence(),
        lambda a: a.self_influence(groups=["up", "down"]),
    ]
    for mode in SCAN_MODES:
        kinds.append(lambda a, mode=mode: a.scores(QUERIES, mode, groups=["up"]))  # type: ignore[misc]
        kinds.append(lambda a, mode=mode: a.top_k(QUERIES, 7, mode))  # type: ignore[misc]
    alone = Attributor(store, curvature, reading=reading, block_rows=16)
    want = [parts(kind(alone)) for kind in kinds]
    shutil.rmtree(store.path / "self_influence")

    shared = Attributor(store, curvature, reading=reading, block_rows=16)
    begin = threading.Barrier(THREADS)

    def ask(thread: int) -> int:
        begin.wait()
        equal = 0
        for call in range(thread, CALLS, THREADS):
            number = call * 7 % len(kinds)
            got = parts(kinds[number](shared))
            pairs = zip(got, want[number], strict=True)
            equal += all(torch.equal(one, other) for one, other in pairs)
        return equal

    with ThreadPoolExecutor(THREADS) as pool:
        assert sum(pool.map(ask, range(THREADS))) == CALLS


def test_a_callback_may_ask_the_attributor_that_calls_it(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", gradients(50), shard_rows=20)
    attributor = Attributor(store, RawCurvature.rebuild(store))
    want = attributor.scores(QUERIES, "l2").scores
    shutil.rmtree(store.path / "self_influence")
    inner = []
    again = Attributor(store, RawCurvature.rebuild(store))
    outer = again.scores(
        QUERIES, "l2", progress=lambda done, total: inner.append(again.scores(QUERIES, "l2").scores)
    )
    assert torch.equal(outer.scores, want)
    assert inner
    assert all(torch.equal(scores, want) for scores in inner)


def seen_by_a_new_thread() -> int:
    """What torch tells a thread that uses it for the first time, and will go on telling it."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.get_num_threads).result()


def test_own_threads_are_no_other_thread_s(set_threads: None) -> None:
    if "OpenMP" not in torch.__config__.parallel_info():
        pytest.skip("torch without OpenMP")
    torch.set_num_threads(2)
    set_own_threads(1)
    assert torch.get_num_threads() == 1
    assert seen_by_a_new_thread() == 2
    set_own_threads(2)
    assert torch.get_num_threads() == 2


def test_the_work_on_modules_leaves_other_threads_alone(set_threads: None) -> None:
    """Each module's work is on one thread; a thread that begins meanwhile has as many as ever."""
    torch.set_num_threads(2)
    for flops in (0.0, 1e12):  # here, and in a pool

        def work(i: int) -> tuple[int, int]:
            return torch.get_num_threads(), seen_by_a_new_thread()

        assert each_module(3, work, flops) == [(1, 2)] * 3
        assert torch.get_num_threads() == 2


def test_no_module_of_the_package_sets_the_threads_of_all() -> None:
    package = Path(__file__).parents[2] / "logra_kernels"
    users = [
        str(path.relative_to(package))
        for path in sorted(package.rglob("*.py"))
        if "set_num_threads(" in path.read_text()
    ]
    assert users == []
