"""The pipeline's waits, on a device that does everything as late, or as early, as it may."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from logra_kernels.attribution.pipeline import (
    ALIGN_BYTES,
    HostLanes,
    Lanes,
    _Threads,
    feed,
    lanes_of,
)
from logra_kernels.rows import share
from logra_kernels.store import RowBlock

BLOCKS, ROWS, DIM = 9, 3, 5
BLOCK_BYTES = ROWS * DIM * 2 + 2 * ALIGN_BYTES
POLICIES = ["copies first", "work first", "copies late", *range(20)]
WAITS = ["copy_waits_for", "compute_waits_for", "wait"]


class LateLanes:
    """Two queues of what was asked for; nothing is done before something waits for it.

    Whoever waits lets the queues run in an order that the waits they were given allow, chosen by
    the policy: one queue as far ahead of the other as it may, or by lot.
    """

    def __init__(self, policy: str | int, without: str = "") -> None:
        self.device = torch.device("cpu")
        self._policy = policy
        self._without = without  # a wait that is left out
        self._chance = random.Random(policy)
        self._queues: dict[str, list[tuple[Callable[[], None], list[Flag]]]] = {
            "copy": [],
            "compute": [],
        }
        self._before: dict[str, list[Flag]] = {"copy": [], "compute": []}
        self.closed = False

    def host_buffer(self, num_bytes: int) -> np.ndarray:
        return np.zeros(num_bytes, np.uint8)

    def device_buffer(self, num_bytes: int) -> Tensor:
        return torch.full([num_bytes], 0xFF, dtype=torch.uint8)  # NaN in every float

    def copy(self, target: Tensor, source: Tensor) -> Flag:
        def run() -> None:
            target.copy_(source)

        return self._ask("copy", run)

    def compute(self, work: Callable[[], None]) -> Flag:
        return self._ask("compute", work)

    def copy_waits_for(self, event: Flag) -> None:
        if self._without != "copy_waits_for":
            self._before["copy"].append(event)

    def compute_waits_for(self, event: Flag) -> None:
        if self._without != "compute_waits_for":
            self._before["compute"].append(event)

    def wait(self, event: Flag) -> None:
        if self._without != "wait":
            self._run_until(lambda: event.done)

    def upload(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values.copy())

    def close(self) -> None:
        self._run_until(lambda: not any(self._queues.values()))
        self.closed = True

    def _ask(self, lane: str, work: Callable[[], None]) -> Flag:
        done = Flag()

        def run() -> None:
            work()
            done.done = True

        self._queues[lane].append((run, self._before[lane]))
        self._before[lane] = []
        return done

    def _run_until(self, enough: Callable[[], bool]) -> None:
        while not enough():
            ready = [
                lane
                for lane, queue in self._queues.items()
                if queue and all(event.done for event in queue[0][1])
            ]
            assert ready, "every lane waits for the other"
            if isinstance(self._policy, int):
                lane = self._chance.choice(ready)
            else:
                favourite = "compute" if self._policy == "work first" else "copy"
                lane = favourite if favourite in ready else ready[0]
            self._queues[lane].pop(0)[0]()


class Flag:
    done = False


def truth() -> np.ndarray:
    return np.arange(BLOCKS * ROWS * DIM, dtype=np.float16).reshape(BLOCKS, ROWS, DIM)


def blocks(buffers: int = 3) -> Iterator[RowBlock]:
    """Blocks in a ring of buffers; a buffer that is given back is overwritten at once."""
    free = [np.empty((ROWS, DIM), np.float16) for _ in range(buffers)]

    def give_back(buffer: np.ndarray) -> None:
        buffer[:] = np.nan
        free.append(buffer)

    for number, rows in enumerate(truth()):
        assert free, "the pipeline holds more blocks than it may"
        buffer = free.pop(0)
        buffer[:] = rows
        last = ROWS - 1 if number == BLOCKS - 1 else ROWS  # a short block at the end
        parts = [buffer[:last, :3], buffer[:last, 3:]]  # two files of rows
        yield RowBlock(0, number * ROWS, parts, partial(give_back, buffer))


def scan(lanes: Lanes | HostLanes) -> Tensor:
    """All rows as the work saw them, [N, D]."""
    seen = torch.zeros(BLOCKS * ROWS, DIM)

    def work(block: RowBlock, parts: Sequence[Tensor]) -> None:
        seen[block.start : block.start + len(parts[0])] = torch.cat(list(parts), dim=1)

    feed(blocks(), lanes, work, BLOCK_BYTES)
    return seen


def wanted() -> Tensor:
    rows = torch.from_numpy(truth().reshape(-1, DIM)).float()
    rows[-1] = 0
    return rows


@pytest.mark.parametrize("policy", POLICIES)
def test_every_order_that_the_waits_allow_gives_the_rows(policy: str | int) -> None:
    assert torch.equal(scan(LateLanes(policy)), wanted())


def test_the_host_in_place() -> None:
    assert torch.equal(scan(HostLanes(torch.device("cpu"))), wanted())
    assert isinstance(lanes_of(torch.device("cpu")), HostLanes)


@pytest.mark.parametrize("without", WAITS)
def test_each_wait_is_needed(without: str) -> None:
    """Leaving any one of them out gives wrong rows under some order: the test above can fail."""
    wrong = [p for p in POLICIES if not torch.equal(scan(LateLanes(p, without)), wanted())]
    assert wrong


def test_a_copy_is_under_way_before_the_work_on_the_block_before_it() -> None:
    asked = []

    class Recorder(LateLanes):
        def copy(self, target: Tensor, source: Tensor) -> Flag:
            asked.append("copy")
            return super().copy(target, source)

        def compute(self, work: Callable[[], None]) -> Flag:
            asked.append("work")
            return super().compute(work)

    scan(Recorder("copies late"))
    block = ["copy", "copy"]  # of its two files
    assert asked == [*block, *[*block, "work"] * (BLOCKS - 1), "work"]


def test_an_error_of_the_work_passes_through() -> None:
    lanes = LateLanes("copies first")

    def work(block: RowBlock, parts: Sequence[Tensor]) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        feed(blocks(), lanes, work, BLOCK_BYTES)


def test_threads_follow_what_is_slow(set_threads: None) -> None:
    """Waiting for the disk: one thread; hardly waiting: all; and those of before at the end."""
    torch.set_num_threads(2)
    with _Threads() as threads:
        threads.saw(0.01, 0.0)
        threads.saw(0.01, 0.001)
        assert torch.get_num_threads() == 1
        threads.saw(0.002, 0.004)
        assert torch.get_num_threads() == 1
        threads.saw(0.0, 0.1)
        assert torch.get_num_threads() == 2
        threads.saw(0.004, 0.004)
        assert torch.get_num_threads() == 2
        threads.saw(0.1, 0.004)
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2


class Recorder:
    """Writes down every call on it, and on what the calls give: "Stream().wait_event(…)"."""

    def __init__(self, name: str, calls: list[str]) -> None:
        self.name, self.calls = name, calls

    def __getattr__(self, method: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Recorder:
            given = ", ".join(a.name for a in arguments if isinstance(a, Recorder))
            result = Recorder(f"{self.name}.{method}({given})".removeprefix("."), self.calls)
            self.calls.append(result.name)
            return result

        return call

    def __enter__(self) -> None:
        self.calls.append("in it")

    def __exit__(self, *_: object) -> None:
        self.calls.append("out of it")

    def __int__(self) -> int:
        return 0


def test_the_calls_that_cuda_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which stream copies and which computes, and who waits for whom; no GPU was asked."""
    from logra_kernels.attribution import cuda_lanes

    calls: list[str] = []
    monkeypatch.setattr(torch, "cuda", Recorder("", calls))
    lanes = cuda_lanes.CudaLanes(torch.device("cpu"))
    source = lanes.host_buffer(4096)
    assert source.ctypes.data % 4096 == 0
    target = lanes.device_buffer(4096)

    class Spy(Tensor):
        def copy_(self, other: Tensor, non_blocking: bool = False) -> Tensor:
            calls.append(f"copy, non_blocking={non_blocking}")
            return self

    copied = lanes.copy(Spy(), share(source))
    lanes.compute_waits_for(copied)
    used = lanes.compute(lambda: calls.append("work"))
    lanes.copy_waits_for(used)
    lanes.wait(copied)
    lanes.close()
    assert target.shape == (4096,)
    copies, compute = "Stream()", "current_stream()"
    assert calls == [
        *(copies, compute, "cudart()", "cudart().cudaHostRegister()", "check_error()"),
        f"{copies}.wait_stream({compute})",
        *(f"stream({copies})", "in it", "copy, non_blocking=True", "out of it"),
        f"{copies}.record_event()",
        f"{compute}.wait_event({copies}.record_event())",
        *(f"stream({compute})", "in it", "work", "out of it"),
        f"{compute}.record_event()",
        f"{copies}.wait_event({compute}.record_event())",
        f"{copies}.record_event().synchronize()",
        *(f"{copies}.synchronize()", f"{compute}.synchronize()"),
        *("cudart()", "cudart().cudaHostUnregister()"),
    ]
