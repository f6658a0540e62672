"""The pipeline's lanes on a CUDA (or ROCm) device: streams, events and pinned memory.

Nothing here has run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from logra_kernels.rows import share
from logra_kernels.store import huge_buffer


class CudaLanes:
    """Copies run on a stream of their own, work on the stream that is current in the caller.

    `close` waits for both, so buffers outlive their use on either stream, and no tensor has to be
    recorded with the other one.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._copies = torch.cuda.Stream(device)
        self._compute = torch.cuda.current_stream(device)
        self._pinned: list[np.ndarray] = []

    def host_buffer(self, num_bytes: int) -> np.ndarray:
        """Pinned memory of huge pages: a disk's request is no larger than the pages behind it."""
        buffer = huge_buffer(num_bytes)
        buffer[:: 1 << 12] = 0  # a page must be present to be pinned
        code = torch.cuda.cudart().cudaHostRegister(buffer.ctypes.data, buffer.nbytes, 0)
        torch.cuda.check_error(int(code))
        self._pinned.append(buffer)
        return buffer

    def device_buffer(self, num_bytes: int) -> Tensor:
        """Device memory, [num_bytes] uint8."""
        buffer = torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
        # The compute stream may still use this memory for a tensor that was freed before.
        self._copies.wait_stream(self._compute)
        return buffer

    def copy(self, target: Tensor, source: Tensor) -> torch.cuda.Event:
        """Copy host to device, beside the host."""
        with torch.cuda.stream(self._copies):
            target.copy_(source, non_blocking=True)
        event: torch.cuda.Event = self._copies.record_event()
        return event

    def copy_waits_for(self, event: torch.cuda.Event) -> None:
        """Later copies begin after the event."""
        self._copies.wait_event(event)

    def compute(self, work: Callable[[], None]) -> torch.cuda.Event:
        """Launch work() on the compute stream."""
        with torch.cuda.stream(self._compute):
            work()
        event: torch.cuda.Event = self._compute.record_event()
        return event

    def compute_waits_for(self, event: torch.cuda.Event) -> None:
        """Later work begins after the event."""
        self._compute.wait_event(event)

    def wait(self, event: torch.cuda.Event) -> None:
        """The host waits for the event."""
        event.synchronize()

    def upload(self, values: np.ndarray) -> Tensor:
        """A host array on the device; torch keeps its pinned copy until it is read."""
        return share(values).pin_memory().to(self.device, non_blocking=True)

    def close(self) -> None:
        """Wait for both streams, then unpin the buffers."""
        self._copies.synchronize()
        self._compute.synchronize()
        while self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._pinned.pop().ctypes.data)
