"""From blocks of rows in host memory to work on a device, each stage ahead of the next.

    disk ─ reader's threads ─► host buffers ─ copy lane ─► two device buffers ─ compute lane ─► work

A lane does what it was given in order; lanes run beside each other and beside the host, and meet in
events. `CudaLanes` (cuda_lanes.py) makes them of streams. Work on the CPU needs no lanes: it uses
the host's memory in place.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from logra_kernels.rows import share
from logra_kernels.store import RowBlock

DEVICE_BUFFERS = 2  # one computed with, one copied into

Event = Any  # what a lane has done so far, when it was made
Work = Callable[[RowBlock, Tensor], None]


class Lanes(Protocol):
    """A device's copy lane and compute lane."""

    device: torch.device

    def host_buffer(self, num_bytes: int) -> np.ndarray:
        """[num_bytes] uint8 that copies leave while the host goes on."""

    def device_buffer(self, num_bytes: int) -> Tensor:
        """[num_bytes] uint8."""

    def copy(self, target: Tensor, source: Tensor) -> Event:
        """Copy lane: host to device. The event: it is there, and the source is free."""

    def copy_waits_for(self, event: Event) -> None:
        """What the copy lane is given from now on begins after the event."""

    def compute(self, work: Callable[[], None]) -> Event:
        """Compute lane: whatever work() launches. The event: it is done."""

    def compute_waits_for(self, event: Event) -> None:
        """What the compute lane is given from now on begins after the event."""

    def wait(self, event: Event) -> None:
        """The host waits for the event."""

    def upload(self, values: np.ndarray) -> Tensor:
        """Compute lane, inside work(): a small array on the device."""

    def close(self) -> None:
        """Wait for both lanes, and let go of the buffers."""


class HostLanes:
    """Another device than CUDA: the host's memory is used in place, or copied as torch does it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def upload(self, values: np.ndarray) -> Tensor:
        return share(values).to(self.device)

    def close(self) -> None:
        """Nothing is under way."""


class _Threads:
    """One compute thread where that is enough for what the disk brings, else all.

    A team of threads that waits for the next block spins, and so takes from the threads (and, in
    a virtual machine, from the host) what reads need. Results do not depend on the choice.
    """

    ENOUGH = 0.6  # of the time of a block: the most that one thread's work may take
    BUSY = 0.1  # of the work: less waiting than this, and the disk is no longer what is slow
    MEMORY = 0.7  # weight of the blocks before

    def __init__(self) -> None:
        self._all = self._now = torch.get_num_threads()
        self._waited_s = self._worked_s = 0.0

    def __enter__(self) -> _Threads:
        return self

    def __exit__(self, *_: object) -> None:
        self._use(self._all)

    def saw(self, waited_s: float, worked_s: float) -> None:
        """A block came after so much waiting, and took so much work."""
        self._waited_s = self.MEMORY * self._waited_s + waited_s
        self._worked_s = self.MEMORY * self._worked_s + worked_s
        if self._now == 1:
            if self._waited_s < self.BUSY * self._worked_s:
                self._use(self._all)
        elif self._worked_s * self._now < self.ENOUGH * (self._waited_s + self._worked_s):
            self._use(1)

    def _use(self, threads: int) -> None:
        if threads != self._now:
            torch.set_num_threads(threads)
            self._now = threads
            self._waited_s = self._worked_s = 0.0


@dataclass
class _Slot:
    """A device buffer, and the last work that reads it."""

    memory: Tensor  # [n] uint8
    used: Event | None = None


@dataclass
class _Copied:
    """A block whose copy to the device has begun."""

    block: RowBlock
    rows: Tensor  # [r, D], in the slot
    slot: _Slot
    done: Event


def lanes_of(device: torch.device) -> Lanes | HostLanes:
    if device.type != "cuda":
        return HostLanes(device)
    from logra_kernels.attribution.cuda_lanes import CudaLanes

    return CudaLanes(device)


def feed(
    blocks: Iterable[RowBlock], lanes: Lanes | HostLanes, work: Work, block_bytes: int
) -> None:
    """work(block, its rows on the device) for every block, in order; done when it returns.

    A block's copy is under way before the work on the block before it begins. Three waits keep
    lanes off each other's memory, and nothing else is waited for:

    - a copy into a device buffer for the work on what is there;
    - the work for its copy;
    - a host buffer's return to the reader for the copy out of it.

    Args:
        blocks: as a BlockReader gives them; two are held at most when the next is asked for.
        lanes: the device.
        work: launches the work on a block; what it needs of the block it takes before it returns.
        block_bytes: the size of the largest block.
    """
    if isinstance(lanes, HostLanes):
        with _Threads() as threads:
            before_s = time.perf_counter()
            for block in blocks:
                come_s = time.perf_counter()
                work(block, share(block.rows).to(lanes.device))
                block.release()
                done_s = time.perf_counter()
                threads.saw(come_s - before_s, done_s - come_s)
                before_s = done_s
        return
    slots = [_Slot(lanes.device_buffer(block_bytes)) for _ in range(DEVICE_BUFFERS)]
    before: _Copied | None = None
    for number, block in enumerate(blocks):
        copied = _copy(block, slots[number % DEVICE_BUFFERS], lanes)
        if before is not None:
            _compute(before, lanes, work)
        before = copied
    if before is not None:
        _compute(before, lanes, work)
        lanes.wait(before.slot.used)


def _copy(block: RowBlock, slot: _Slot, lanes: Lanes) -> _Copied:
    source = share(block.rows)
    rows = slot.memory[: source.nbytes].view(source.dtype).view(source.shape)
    if slot.used is not None:
        lanes.copy_waits_for(slot.used)
    return _Copied(block, rows, slot, lanes.copy(rows, source))


def _compute(copied: _Copied, lanes: Lanes, work: Work) -> None:
    lanes.compute_waits_for(copied.done)
    copied.slot.used = lanes.compute(lambda: work(copied.block, copied.rows))
    lanes.wait(copied.done)
    copied.block.release()
