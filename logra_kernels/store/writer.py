"""Writing a store: what is appended is checked, queued, and committed in shards."""

import atexit
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from logra_kernels.store.basis import Basis
from logra_kernels.store.codecs import Encoded, Float16, RowCodec, row_codec
from logra_kernels.store.committer import Committer
from logra_kernels.store.errors import StoreError
from logra_kernels.store.files import write_error
from logra_kernels.store.folder import open_folder
from logra_kernels.store.ids import id_texts
from logra_kernels.store.incoming import Batch, Incoming
from logra_kernels.store.layout import Module, RowLayout
from logra_kernels.store.manifest import basis_of, check_modules, check_rotated, new_manifest
from logra_kernels.store.tensors import check_tensors
from logra_kernels.store.write_queue import WriteQueue

# A shard of 256 MiB takes 0.3 s to write at 0.8 GB/s, and costs half a second if it is lost.
SHARD_BYTES = 256 << 20
# A shard's ids stay in memory until it is committed; tiny rows must not make that a gigabyte.
LARGEST_SHARD_ROWS = 1 << 20
QUEUE_BYTES = 128 << 20


class StoreWriter:
    """Appends rows to a store; finished shards survive a kill at any moment.

    Rows are copied, queued and written by a background thread. A shard is committed when it is
    full, and by `flush` and `close`. An error of the thread ends the writer and is raised by every
    call from then on. One thread at a time may call the methods.

    A `with` block closes the store and marks it finalized; when the block raises, the rows
    appended so far are committed and the store stays open for `resume`.
    """

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        *,
        modules: Sequence[Module],
        dtype: str = Float16.name,
        projection: Any = None,
        projection_tensors: Mapping[str, np.ndarray] | None = None,
        fingerprints: Any = None,
        coverage: Any = None,
        rotation: int | None = None,
        whitening: Mapping[str, np.ndarray] | None = None,
        shard_rows: int | None = None,
        duplicates: str = "error",
        resume: bool = False,
        queue_bytes: int = QUEUE_BYTES,
    ) -> "StoreWriter":
        """Make a store, or with `resume` go on with the one that is there.

        Args:
            path: the store's folder; it is made if it is not there.
            modules: the layout of a row.
            dtype: the name of a row codec, such as "float16", "float32" or "int8".
            projection: JSON that says how the rows were projected (kind, seed, scaling).
            projection_tensors: the projection's matrices, {name: array}, to keep in the store.
            fingerprints: JSON that tells this model and data from others.
            coverage: JSON that says which part of the model the modules are; a store that is
                resumed keeps its own.
            rotation: the seed of the rotation of the rows. None: they are not rotated, but those in
                bit planes, which always are, by the seed 0.
            whitening: {module name: L [K, K] float32}, lower triangular: what is stored of the
                module's g is that of L⁻¹ g. A module that is not in it is stored as it is.
            shard_rows: rows of a full shard; by default 256 MiB of them, at most 2**20.
            duplicates: an id that is in the store already is an "error", or "skip" leaves it out.
            resume: continue the store if there is one.
            queue_bytes: how much may wait for the disk before `append` waits too.

        Raises:
            StoreExistsError: there is a store and `resume` is false, or other files.
            StoreMismatchError: the store is of other modules, dtype, projection or fingerprints.
            StoreLockedError: another writer has it open.
            StoreFormatError: the store to resume is damaged.
        """
        folder, layout, codec = Path(path), RowLayout.of(check_modules(modules)), row_codec(dtype)
        fresh = new_manifest(layout, codec, projection, fingerprints, coverage, rotation)
        tensors: dict[str, dict[str, np.ndarray] | None] = {}
        if projection_tensors is not None:
            tensors["projection_tensors"] = check_tensors(projection_tensors, "projection_tensors")
        if whitening is not None:
            check_rotated(codec, "whitening")
            tensors["whitening"] = check_tensors(whitening, "whitening")
            Basis(layout, (), None, whitening)  # checks the factors
        for name, value in (("shard_rows", shard_rows), ("queue_bytes", queue_bytes)):
            if value is not None and (type(value) is not int or value < 1):
                raise StoreError(f"{name}: expected a positive integer, got {value!r}")
        shard_rows = shard_rows or usual_shard_rows(codec, layout)
        incoming = Incoming(codec, layout, duplicates)
        lock, manifest, ids = open_folder(folder, fresh, tensors, resume)
        incoming.known_ids.update(ids)
        incoming.exponents = manifest["module_exponents"]
        incoming.basis = basis_of(manifest, folder)
        committer = Committer(folder, manifest, ids, codec, layout, shard_rows)
        return cls(folder, incoming, committer, WriteQueue(committer, lock, queue_bytes))

    def __init__(
        self, path: Path, incoming: Incoming, committer: Committer, queue: WriteQueue
    ) -> None:
        self.path = path
        self.codec = incoming.codec
        self.layout = incoming.layout
        self.modules: list[Module] = list(self.layout)
        self.dim = self.layout.dim
        self.dtype = self.codec.name
        self.shard_rows = committer.shard_rows
        self.skipped_rows = 0
        self._incoming = incoming
        self._committer = committer
        self._queue = queue
        self._closed = False
        self._process = os.getpid()
        # A program that forgets to close its store must not lose the rows it has appended.
        atexit.register(self._close_at_exit)

    @property
    def module_exponents(self) -> list[int] | None:
        """The modules' fixed exponents; None until they are set."""
        exponents = self._incoming.exponents
        return None if exponents is None else list(exponents)

    @property
    def committed_ids(self) -> list[str]:
        """The ids of the rows that no kill can take away any more, in row order."""
        return list(self._committer.committed_ids)

    @property
    def committed_rows(self) -> int:
        """The number of rows that no kill can take away any more."""
        return len(self._committer.committed_ids)

    def __contains__(self, id: object) -> bool:
        """Whether the id is in the store or on its way there."""
        return id_texts([id])[0] in self._incoming.known_ids

    def set_module_exponents(self, exponents: Sequence[int]) -> None:
        """Fix the exponents that a scaled codec (float16) packs rows with, before the first append.

        Raises:
            StoreError: not one integer per module, or others are fixed already.
        """
        self._check_usable()
        self._incoming.fix_exponents(exponents)
        self._committer.exponents = self._incoming.exponents

    def encode(self, rows: np.ndarray) -> Encoded:
        """Rows g [n, D] float32 as `append` takes them: stored, row_scale, row_exponents."""
        return self.basis.encode(self.codec, rows)

    @property
    def basis(self) -> Basis:
        """What the store makes of rows before its codec; with the modules' exponents."""
        return self._incoming.basis

    def append(
        self,
        ids: Iterable[str | int],
        rows: np.ndarray,
        row_scale: np.ndarray | None = None,
        metadata: Sequence[Mapping[str, Any] | None] | None = None,
        row_exponents: np.ndarray | None = None,
    ) -> np.ndarray:
        """Queue rows for writing. All of them are taken, or none and an error is raised.

        Args:
            ids: n strings or integers (written in decimal).
            rows: [n, W], as `encode` gives them: float16 or float32, with W = D; of bit planes
                the bytes of each, one after the other.
            row_scale: [n] float32, powers of two for float16 rows; None for float32.
            metadata: n JSON objects (or None) to be kept beside the ids.
            row_exponents: [n, M] int16, as the store's codec gives them beside the rows; None where
                all are zero.

        Returns:
            [n] bool: which rows were taken; all of them, unless duplicates are skipped.

        Raises:
            DuplicateIdError: ids that are in the batch twice or in the store already.
            StoreError: a wrong shape or dtype, a value that is not finite, or a failed writer.
        """
        self._check_usable()
        return self._put(*self._incoming.batch(ids, rows, row_scale, metadata, row_exponents))

    def flush(self) -> None:
        """Commit everything appended so far, as a short shard if need be."""
        self._check_usable()
        self._queue.put(None)
        self._queue.wait_until_done()
        self._check_usable()

    def close(self, *, finalize: bool = True) -> None:
        """Commit everything and let go of the store; closing twice is harmless.

        Args:
            finalize: mark the store complete. False leaves it open for `resume`.

        Raises:
            StoreError: the writing failed; the shards committed before are intact.
        """
        if self._closed:
            return
        try:
            self.flush()
            if finalize:
                self._finalize()
        except StoreError:
            self._stop()
            raise
        self._stop()

    def abort(self) -> None:
        """Drop what is not committed and let go of the store."""
        if not self._closed:
            self._stop()

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        elif self._queue.failure is not None:
            self.abort()
        else:
            self.close(finalize=False)

    def _put(self, batch: Batch, taken: np.ndarray) -> np.ndarray:
        if batch.ids:
            self._queue.put(batch)
            self._check_usable()
            self._incoming.known_ids.update(batch.ids)
        self.skipped_rows += len(taken) - len(batch.ids)
        return taken

    def _check_usable(self) -> None:
        if self._process != os.getpid():
            raise StoreError(f"{self.path}: this writer belongs to another process; it was forked")
        if self._closed:
            raise StoreError(f"{self.path}: this writer is closed")
        failure, manifest = self._queue.failure, self._committer.manifest
        if isinstance(failure, OSError):
            kept = len(manifest["shards"])
            raise write_error(
                failure,
                f"{self.path}: cannot write shard {kept} (the {kept} shards before it, with "
                f"{manifest['rows']} rows, are intact; resume goes on from there)",
            ) from failure
        if failure is not None:
            raise StoreError(f"{self.path}: cannot write: {failure!r}") from failure

    def _finalize(self) -> None:
        # The queue is empty and only this thread fills it, so the committer is this thread's.
        try:
            self._committer.finalize()
        except OSError as error:
            raise write_error(error, f"{self.path}: cannot finalize the store") from error

    def _stop(self) -> None:
        if self._process == os.getpid():
            self._queue.stop()
        self._closed = True
        atexit.unregister(self._close_at_exit)

    def _close_at_exit(self) -> None:
        if self._queue.failure is None and self._process == os.getpid():
            self.close(finalize=False)


def usual_shard_rows(codec: RowCodec, layout: RowLayout) -> int:
    """Rows of a full shard where nobody chooses: 256 MiB of them, at most 2**20."""
    return min(max(1, SHARD_BYTES // codec.row_bytes(layout)), LARGEST_SHARD_ROWS)


def append_finite(
    writer: StoreWriter,
    ids: Iterable[str | int],
    rows: np.ndarray,
    row_scale: np.ndarray | None = None,
    metadata: Sequence[Mapping[str, Any] | None] | None = None,
    row_exponents: np.ndarray | None = None,
) -> np.ndarray:
    """`writer.append` for a caller in this package that has looked at the rows' values itself.

    Every element is finite (`RowCodec.finite`), so it is not looked at again. Ids, shapes, dtypes,
    row scales and exponents are checked as in `append`.
    """
    writer._check_usable()
    return writer._put(
        *writer._incoming.batch(ids, rows, row_scale, metadata, row_exponents, check_values=False)
    )
