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
    """Copies on a stream of their own; work on the stream that is current in the caller.

    Buffers outlive what the streams do with them, because `close` waits: so no tensor's memory
    needs to be recorded with the other stream.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._copies = torch.cuda.Stream(device)
        self._compute = torch.cuda.current_stream(device)
        self._pinned: list[np.ndarray] = []

    def host_buffer(self, num_bytes: int) -> np.ndarray:
        """Memory of huge pages, pinned: the disk's requests, too, are as large as its pages."""
        buffer = huge_buffer(num_bytes)
        buffer[:: 1 << 12] = 0  # the pages must be there to be pinned
        code = torch.cuda.cudart().cudaHostRegister(buffer.ctypes.data, buffer.nbytes, 0)
        torch.cuda.check_error(int(code))
        self._pinned.append(buffer)
        return buffer

    def device_buffer(self, num_bytes: int) -> Tensor:
        buffer = torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
        # The allocator's memory may still be in use by what the compute stream did before.
        self._copies.wait_stream(self._compute)
        return buffer

    def copy(self, target: Tensor, source: Tensor) -> torch.cuda.Event:
        with torch.cuda.stream(self._copies):
            target.copy_(source, non_blocking=True)
        return self._copies.record_event()

    def copy_waits_for(self, event: torch.cuda.Event) -> None:
        self._copies.wait_event(event)

    def compute(self, work: Callable[[], None]) -> torch.cuda.Event:
        with torch.cuda.stream(self._compute):
            work()
        return self._compute.record_event()

    def compute_waits_for(self, event: torch.cuda.Event) -> None:
        self._compute.wait_event(event)

    def wait(self, event: torch.cuda.Event) -> None:
        event.synchronize()

    def upload(self, values: np.ndarray) -> Tensor:
        # torch keeps its own pinned memory until the copies out of it are done.
        return share(values).pin_memory().to(self.device, non_blocking=True)

    def close(self) -> None:
        self._copies.synchronize()
        self._compute.synchronize()
        while self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._pinned.pop().ctypes.data)
