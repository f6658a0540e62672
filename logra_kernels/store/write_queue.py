"""The thread that writes a store, and the bounded queue before it."""

import threading
from collections import deque

from logra_kernels.store.committer import Committer
from logra_kernels.store.files import Lock
from logra_kernels.store.incoming import Batch


class WriteQueue:
    """Hands batches to a committer, in order, on a thread of its own.

    An error of the thread ends it: what was not committed is discarded, the store's lock is
    released, and `failure` holds the error.

    Args:
        committer: writes; only the thread uses it while there is something in the queue.
        lock: the store's.
        limit_bytes: how much may wait before `put` waits too.
    """

    def __init__(self, committer: Committer, lock: Lock, limit_bytes: int) -> None:
        self.failure: BaseException | None = None
        self._committer = committer
        self._lock = lock
        self._limit_bytes = limit_bytes
        self._items: deque[Batch | None] = deque()  # None: commit what is there
        self._waiting_bytes = 0
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="logra-store", daemon=True)
        self._thread.start()

    def put(self, batch: Batch | None) -> None:
        """Append a batch, or None for a commit; waits while the queue is full.

        A batch that is larger than the limit goes in alone. After a failure nothing is taken.
        """
        size = 0 if batch is None else batch.bytes
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    not self._items
                    or self._waiting_bytes + size <= self._limit_bytes
                    or self.failure is not None
                )
            )
            if self.failure is None:
                self._items.append(batch)
                self._waiting_bytes += size
                self._changed.notify_all()

    def wait_until_done(self) -> None:
        """Return when the thread has nothing left to do, or has failed."""
        with self._changed:
            self._changed.wait_for(lambda: not self._items or self.failure is not None)

    def stop(self) -> None:
        """End the thread. What was not committed is discarded; the store's lock is released."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join()
        self._lock.release()

    def _work(self) -> None:
        """The thread: an item leaves the queue when it is done, so an empty queue means idle."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._items or self._stopping)
                if self._stopping:
                    break
                batch = self._items[0]
            try:
                if batch is None:
                    self._committer.commit()
                else:
                    self._write(batch)
            except BaseException as error:
                self._committer.discard()
                # Nothing more will be written: whoever resumes need not wait for our close.
                self._lock.release()
                with self._changed:
                    self.failure = error
                    self._changed.notify_all()
                return
            with self._changed:
                self._items.popleft()
                self._waiting_bytes -= 0 if batch is None else batch.bytes
                self._changed.notify_all()
        self._committer.discard()

    def _write(self, batch: Batch) -> None:
        start = 0
        while start < len(batch.ids) and not self._stopping:
            start = self._committer.write(batch, start)
