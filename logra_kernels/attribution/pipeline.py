"""From blocks of rows in host memory to work on a device, each stage ahead of the next.

    disk ─ reader's threads ─► host buffers ─ copy lane ─► two device buffers ─ compute lane ─► work

Each lane does its work in order, beside the other lane and the host. An event marks a point in a
lane's work that the host or the other lane can wait for. `CudaLanes` (cuda_lanes.py) makes lanes of
streams. Work on the CPU needs none: it uses the host's memory in place.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from logra_kernels.ops._threads import set_own_threads
from logra_kernels.rows import share
from logra_kernels.store import RowBlock

ALIGN_BYTES = 256  # of a part in a device buffer, for loads of whole vectors
DEVICE_BUFFERS = 2  # work reads one while the next block is copied into the other

Event = Any  # a point in a lane's work: reached when all that the lane was given before is done
Work = Callable[[RowBlock, Sequence[Tensor]], None]


class Lanes(Protocol):
    """A device's copy lane and compute lane."""

    device: torch.device

    def host_buffer(self, num_bytes: int) -> np.ndarray:
        """Host memory, [num_bytes] uint8, that is copied from while the host goes on."""

    def device_buffer(self, num_bytes: int) -> Tensor:
        """Device memory, [num_bytes] uint8."""

    def copy(self, target: Tensor, source: Tensor) -> Event:
        """Copy lane: host to device. At the event the copy is done and the source is free."""

    def copy_waits_for(self, event: Event) -> None:
        """The copy lane does nothing that it is given from now on before the event."""

    def compute(self, work: Callable[[], None]) -> Event:
        """Compute lane: what work() launches. At the event it is done."""

    def compute_waits_for(self, event: Event) -> None:
        """The compute lane does nothing that it is given from now on before the event."""

    def wait(self, event: Event) -> None:
        """The host waits for the event."""

    def upload(self, values: np.ndarray) -> Tensor:
        """Compute lane, called in work(): a small host array, copied to the device."""

    def close(self) -> None:
        """Wait for both lanes, then free the buffers."""


class HostLanes:
    """For the CPU, in place, and for devices other than CUDA, to which torch copies."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def upload(self, values: np.ndarray) -> Tensor:
        """A host array on the device."""
        return share(values).to(self.device)

    def close(self) -> None:
        """Nothing runs that could be waited for."""


class _Threads:
    """Lets one thread compute where the disk is slower than that, else all threads.

    Threads that wait for the next block spin, and so take processor time from the reads (in a
    virtual machine, from the host's part of them). Results do not depend on the choice.
    """

    ENOUGH = 0.6  # one thread computes if its work would take less than this part of a block's time
    BUSY = (
        0.1  # all threads compute again once waiting takes less than this part of the work's time
    )
    MEMORY = 0.7  # weight of the blocks before in both times

    def __init__(self) -> None:
        self._all = self._now = torch.get_num_threads()
        self._waited_s = self._worked_s = 0.0

    def __enter__(self) -> _Threads:
        return self

    def __exit__(self, *_: object) -> None:
        self._use(self._all)

    def saw(self, waited_s: float, worked_s: float) -> None:
        """Count a block that was waited for and worked on so long, and choose anew."""
        self._waited_s = self.MEMORY * self._waited_s + waited_s
        self._worked_s = self.MEMORY * self._worked_s + worked_s
        if self._now == 1:
            if self._waited_s < self.BUSY * self._worked_s:
                self._use(self._all)
        elif self._worked_s * self._now < self.ENOUGH * (self._waited_s + self._worked_s):
            self._use(1)

    def _use(self, threads: int) -> None:
        if threads != self._now:
            set_own_threads(threads)
            self._now = threads
            self._waited_s = self._worked_s = 0.0


@dataclass
class _Slot:
    """A device buffer, and the event after the last work that reads it."""

    memory: Tensor  # [n] uint8
    used: Event | None = None


@dataclass
class _Copied:
    """A block whose copy to the device has begun."""

    block: RowBlock
    parts: list[Tensor]  # [r, W] for each file of rows, in the slot
    slot: _Slot
    done: Event


def lanes_of(device: torch.device) -> Lanes | HostLanes:
    """The lanes of a device; close them after use."""
    if device.type != "cuda":
        return HostLanes(device)
    from logra_kernels.attribution.cuda_lanes import CudaLanes

    return CudaLanes(device)


def feed(
    blocks: Iterable[RowBlock], lanes: Lanes | HostLanes, work: Work, block_bytes: int
) -> None:
    """Call work(block, its parts on the device) for every block, in order; all is done at the end.

    A block's copy begins before the work on the block before it. Three waits keep the lanes from
    memory that is in use, and nothing else is waited for:

    - a copy into a device buffer waits for the work that reads the buffer;
    - the work on a block waits for the block's copy;
    - a host buffer goes back to the reader after the copy out of it.

    Args:
        blocks: as a BlockReader gives them; at most two are unreleased when the next is asked for.
        lanes: the device's.
        work: launches the work on a block, and does not use the block after it returns.
        block_bytes: the size of the largest block's parts, each rounded up to `ALIGN_BYTES`.
    """
    if isinstance(lanes, HostLanes):
        with _Threads() as threads:
            before_s = time.perf_counter()
            for block in blocks:
                come_s = time.perf_counter()
                work(block, [share(part).to(lanes.device) for part in block.parts])
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
    if slot.used is not None:
        lanes.copy_waits_for(slot.used)
    parts, place, done = [], 0, None
    for source in map(share, block.parts):
        room = slot.memory[place : place + source.nbytes]
        parts.append(room.view(source.dtype).view(source.shape))
        done = lanes.copy(parts[-1], source)
        place += -(-source.nbytes // ALIGN_BYTES) * ALIGN_BYTES
    return _Copied(block, parts, slot, done)


def _compute(copied: _Copied, lanes: Lanes, work: Work) -> None:
    lanes.compute_waits_for(copied.done)
    copied.slot.used = lanes.compute(lambda: work(copied.block, copied.parts))
    lanes.wait(copied.done)
    copied.block.release()
