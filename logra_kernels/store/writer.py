"""Writing a store: rows in, finished shards out, on a thread of their own."""

import atexit
import os
import re
import threading
import zlib
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from logra_kernels.store.codecs import row_codec
from logra_kernels.store.codecs.base import SCALE_DTYPE
from logra_kernels.store.errors import (
    DuplicateIdError,
    StoreError,
    StoreExistsError,
    StoreFormatError,
)
from logra_kernels.store.files import (
    DATA_OFFSET_BYTES,
    Lock,
    crc32_of_file,
    crc32_text,
    npy_header,
    powers_of_two,
    remove,
    sync_folder,
    temporary,
    write_all,
    write_error,
    write_temporary,
)
from logra_kernels.store.ids import encode_ids, id_texts, metadata_texts, read_ids
from logra_kernels.store.layout import Module, RowLayout
from logra_kernels.store.manifest import (
    LARGEST_EXPONENT,
    LOCK,
    MANIFEST,
    SMALLEST_EXPONENT,
    check_files,
    check_modules,
    check_same_run,
    new_manifest,
    plain_json,
    read_manifest,
    shard_names,
    write_manifest,
)
from logra_kernels.store.tensors import check_tensors, fingerprint, write_tensors

# A shard of 256 MiB takes 0.3 s to write at 0.8 GB/s, and costs half a second if it is lost.
SHARD_BYTES = 256 << 20
# A shard's ids stay in memory until it is committed; tiny rows must not make that a gigabyte.
LARGEST_SHARD_ROWS = 1 << 20
QUEUE_BYTES = 128 << 20
_OUR_FOLDERS = ("projection", "curvature", "self_influence")
_SHARD_FILE = re.compile(r"shard-\d{5,}\.(npy|scale\.npy|ids\.arrow)(\.tmp)?\Z")


@dataclass
class _Batch:
    """Rows on their way to the writing thread."""

    ids: list[str]
    rows: np.ndarray  # [n, D], ours alone
    row_scale: np.ndarray | None  # [n]
    metadata: list[str | None]

    @property
    def bytes(self) -> int:
        texts = sum(map(len, self.ids)) + sum(len(text) for text in self.metadata if text)
        return self.rows.nbytes + texts


@dataclass
class _OpenShard:
    """The shard that is being filled: its rows are in a temporary file, the rest in memory."""

    index: int
    descriptor: int
    crc: int = 0
    ids: list[str] = field(default_factory=list)
    metadata: list[str | None] = field(default_factory=list)
    row_scales: list[np.ndarray] = field(default_factory=list)


_COMMIT = object()


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
        dtype: str = "float16",
        projection: Any = None,
        projection_tensors: Mapping[str, np.ndarray] | None = None,
        fingerprints: Any = None,
        shard_rows: int | None = None,
        duplicates: str = "error",
        resume: bool = False,
        queue_bytes: int = QUEUE_BYTES,
    ) -> "StoreWriter":
        """Make a store, or with `resume` go on with the one that is there.

        Args:
            path: the store's folder; it is made if it is not there.
            modules: the layout of a row.
            dtype: "float16" (packed rows, each with a scale) or "float32".
            projection: JSON that says how the rows were projected (kind, seed, scaling).
            projection_tensors: the matrices, {name: array}, if they are to be kept.
            fingerprints: JSON that tells this model and data from others.
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
        return cls(
            Path(path),
            check_modules(modules),
            dtype,
            plain_json(projection, "projection"),
            projection_tensors,
            plain_json(fingerprints, "fingerprints"),
            shard_rows,
            duplicates,
            resume,
            queue_bytes,
        )

    def __init__(
        self,
        path: Path,
        modules: list[Module],
        dtype: str,
        projection: Any,
        projection_tensors: Mapping[str, np.ndarray] | None,
        fingerprints: Any,
        shard_rows: int | None,
        duplicates: str,
        resume: bool,
        queue_bytes: int,
    ) -> None:
        self.codec = row_codec(dtype)
        if duplicates not in ("error", "skip"):
            raise StoreError(f"duplicates: expected 'error' or 'skip', got {duplicates!r}")
        for name, value in (("shard_rows", shard_rows), ("queue_bytes", queue_bytes)):
            if value is not None and (type(value) is not int or value < 1):
                raise StoreError(f"{name}: expected a positive integer, got {value!r}")
        self.path = path
        self.modules = modules
        self.layout = RowLayout.of(modules)
        self.dim = self.layout.dim
        self.dtype = dtype
        self.duplicates = duplicates
        self.skipped_rows = 0
        row_bytes = self.codec.row_bytes(self.layout)
        self.shard_rows = shard_rows or min(max(1, SHARD_BYTES // row_bytes), LARGEST_SHARD_ROWS)
        self._queue_bytes = queue_bytes
        self._committed_ids: list[str] = []
        self._known: set[str] = set()
        self._shard: _OpenShard | None = None
        self._queue: deque[Any] = deque()
        self._waiting_bytes = 0
        self._changed = threading.Condition()
        self._failure: BaseException | None = None
        self._stopping = False
        self._closed = False
        self._process = os.getpid()

        tensors = None
        if projection_tensors is not None:
            tensors = check_tensors(projection_tensors, "projection_tensors")
        _refuse_other_folder(path, resume)
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = Lock(path / LOCK)
        except OSError as error:
            raise write_error(error, f"{path}: cannot make the store") from error
        try:
            _refuse_other_folder(path, resume)
            self._manifest = self._begin(projection, tensors, fingerprints)
        except OSError as error:
            self._lock.release()
            raise write_error(error, f"{path}: cannot make the store") from error
        except BaseException:
            self._lock.release()
            raise
        self._exponents: list[int] | None = self._manifest["module_exponents"]
        self._thread = threading.Thread(target=self._work, name="logra-store", daemon=True)
        self._thread.start()
        # A program that forgets to close its store must not lose the rows it has appended.
        atexit.register(self._close_at_exit)

    @property
    def module_exponents(self) -> list[int] | None:
        """The modules' fixed exponents; None until they are set."""
        return None if self._exponents is None else list(self._exponents)

    @property
    def committed_ids(self) -> list[str]:
        """The ids that a kill can no longer take away, in row order."""
        with self._changed:
            return list(self._committed_ids)

    @property
    def committed_rows(self) -> int:
        """How many they are."""
        with self._changed:
            return len(self._committed_ids)

    def __contains__(self, id: object) -> bool:
        """Whether the id is in the store or on its way there."""
        return id_texts([id])[0] in self._known

    def set_module_exponents(self, exponents: Sequence[int]) -> None:
        """Fix the exponents that float16 rows are packed with, before the first append.

        Raises:
            StoreError: not one integer per module, or others are fixed already.
        """
        self._check_usable()
        values = [int(value) for value in exponents]
        if not self.codec.scaled:
            raise StoreError(
                f"module_exponents: expected none, for the store's rows are {self.dtype}"
            )
        if len(values) != len(self.modules):
            raise StoreError(
                f"module_exponents: expected {len(self.modules)}, one per module, got {len(values)}"
            )
        for value in values:
            if not SMALLEST_EXPONENT <= value <= LARGEST_EXPONENT:
                raise StoreError(
                    f"module_exponents: expected {SMALLEST_EXPONENT} to {LARGEST_EXPONENT}, "
                    f"got {value}"
                )
        if self._exponents is not None and self._exponents != values:
            raise StoreError(
                f"module_exponents: the store's are fixed as {self._exponents}, got {values}"
            )
        self._exponents = values

    def append(
        self,
        ids: Iterable[str | int],
        rows: np.ndarray,
        row_scale: np.ndarray | None = None,
        metadata: Sequence[Mapping[str, Any] | None] | None = None,
    ) -> np.ndarray:
        """Queue rows for writing. All of them are taken, or none and an error is raised.

        Args:
            ids: n strings or integers (written in decimal).
            rows: [n, D] float16, packed, or float32, as the store's dtype says.
            row_scale: [n] float32 powers of two for float16 rows, None for float32.
            metadata: n JSON objects (or None) to be kept beside the ids.

        Returns:
            [n] bool: which rows were taken; all of them, unless duplicates are skipped.

        Raises:
            DuplicateIdError: ids that are in the batch twice or in the store already.
            StoreError: a wrong shape or dtype, a value that is not finite, or a failed writer.
        """
        self._check_usable()
        texts = id_texts(ids)
        rows, row_scale = self._check_rows(texts, rows, row_scale)
        notes: list[str | None] = [None] * len(texts)
        if metadata is not None:
            if len(metadata) != len(texts):
                raise StoreError(
                    f"metadata: expected {len(texts)}, one per row, got {len(metadata)}"
                )
            notes = metadata_texts(metadata)
        kept = self._new_ids(texts)
        if kept.all():
            batch = _Batch(texts, np.array(rows, order="C"), row_scale, notes)
        else:
            places = np.flatnonzero(kept)
            batch = _Batch(
                [texts[place] for place in places],
                np.ascontiguousarray(rows[places]),
                None if row_scale is None else row_scale[places],
                [notes[place] for place in places],
            )
        if batch.ids:
            self._put(batch)
        self.skipped_rows += len(texts) - len(batch.ids)
        return kept

    def flush(self) -> None:
        """Commit everything appended so far, as a short shard if need be."""
        self._check_usable()
        self._put(_COMMIT)
        with self._changed:
            while self._queue and self._failure is None:
                self._changed.wait()
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
        elif self._failure is not None:
            self.abort()
        else:
            self.close(finalize=False)

    def _begin(
        self, projection: Any, tensors: dict[str, np.ndarray] | None, fingerprints: Any
    ) -> dict[str, Any]:
        described = None
        if tensors is not None:
            described = {"tensors": {name: fingerprint(value) for name, value in tensors.items()}}
        manifest = new_manifest(self.modules, self.dtype, projection, described, fingerprints)
        if (self.path / MANIFEST).exists():
            stored = read_manifest(self.path)
            check_same_run(stored, manifest, self.path)
            check_files(self.path, stored)
            self._load_ids(stored)
            _remove_rubbish(self.path, stored)
            stored["state"] = "open"
            return stored
        if described is not None and tensors is not None:
            described.update(write_tensors(self.path / "projection", "projection", tensors))
        _remove_rubbish(self.path, manifest)
        write_manifest(self.path, manifest)
        sync_folder(self.path)
        sync_folder(self.path.absolute().parent)
        return manifest

    def _load_ids(self, manifest: dict[str, Any]) -> None:
        for shard in manifest["shards"]:
            place = self.path / shard["ids"]["file"]
            got = crc32_of_file(place)
            if got != shard["ids"]["crc32"]:
                raise StoreFormatError(
                    f"{place}: damaged: expected crc32 {shard['ids']['crc32']}, got {got}"
                )
            self._committed_ids += read_ids(place, shard["rows"])["id"].to_pylist()
        self._known.update(self._committed_ids)

    def _check_usable(self) -> None:
        if self._process != os.getpid():
            raise StoreError(f"{self.path}: this writer belongs to another process; it was forked")
        if self._closed:
            raise StoreError(f"{self.path}: this writer is closed")
        if self._failure is not None:
            if isinstance(self._failure, OSError):
                kept = len(self._manifest["shards"])
                raise write_error(
                    self._failure,
                    f"{self.path}: cannot write shard {kept} (the {kept} shards before it, with "
                    f"{self._manifest['rows']} rows, are intact; resume goes on from there)",
                ) from self._failure
            raise StoreError(f"{self.path}: cannot write: {self._failure!r}") from self._failure

    def _check_rows(
        self, ids: list[str], rows: np.ndarray, row_scale: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        codec, columns = self.codec, self.codec.columns(self.layout)
        wanted = f"{codec.dtype} [{len(ids)}, {columns}]"
        if not isinstance(rows, np.ndarray):
            raise StoreError(f"rows: expected a numpy array, got {type(rows).__name__}")
        if rows.dtype != codec.dtype or rows.ndim != 2 or rows.shape[1] != columns:
            raise StoreError(f"rows: expected {wanted}, got {rows.dtype} {list(rows.shape)}")
        if len(rows) != len(ids):
            raise StoreError(f"ids: expected {len(rows)}, one per row, got {len(ids)}")
        good = codec.finite(rows, self.layout)
        if not good.all():
            row, column = (int(place) for place in np.argwhere(~good)[0])
            value = codec.elements(rows, self.layout)[row, column]
            raise StoreError(
                f"rows: expected finite values, got {value} in the row of id "
                f"{ids[row]!r}, module {self.layout.module_of(column).name!r}"
            )
        if not codec.scaled:
            if row_scale is not None:
                raise StoreError(f"row_scale: expected None, for the store's rows are {codec.name}")
            return rows, None
        if self._exponents is None:
            raise StoreError("module_exponents: expected set_module_exponents before append")
        if not isinstance(row_scale, np.ndarray):
            raise StoreError(f"row_scale: expected a numpy array, got {type(row_scale).__name__}")
        if row_scale.dtype != np.float32 or row_scale.shape != (len(rows),):
            raise StoreError(
                f"row_scale: expected float32 [{len(rows)}], "
                f"got {row_scale.dtype} {list(row_scale.shape)}"
            )
        bad = ~powers_of_two(row_scale)
        if bad.any():
            row = int(np.flatnonzero(bad)[0])
            raise StoreError(
                f"row_scale: expected powers of two, got {row_scale[row]} for id {ids[row]!r}"
            )
        return rows, row_scale.astype(SCALE_DTYPE)  # a copy

    def _new_ids(self, ids: list[str]) -> np.ndarray:
        kept = np.ones(len(ids), dtype=bool)
        twice, stored, seen = [], [], set()
        for place, text in enumerate(ids):
            if text in seen:
                twice.append(text)
            elif text in self._known:
                stored.append(text)
            else:
                seen.add(text)
                continue
            kept[place] = False
        if self.duplicates == "error" and not kept.all():
            found = [
                f"{len(group)} {where} ({_some(group)})"
                for group, where in (
                    (twice, "twice in the batch"),
                    (stored, "in the store already"),
                )
                if group
            ]
            raise DuplicateIdError(
                f"ids: expected new ids, got {' and '.join(found)}; nothing was written"
            )
        return kept

    def _put(self, item: Any) -> None:
        size = item.bytes if isinstance(item, _Batch) else 0
        with self._changed:
            # A batch larger than the bound goes in alone.
            while (
                self._queue
                and self._waiting_bytes + size > self._queue_bytes
                and self._failure is None
            ):
                self._changed.wait()
            if self._failure is None:
                self._queue.append(item)
                self._waiting_bytes += size
                if isinstance(item, _Batch):
                    self._known.update(item.ids)
                self._changed.notify_all()
        self._check_usable()

    def _work(self) -> None:
        """The thread: an item leaves the queue when it is done, so an empty queue means idle."""
        while True:
            with self._changed:
                while not self._queue and not self._stopping:
                    self._changed.wait()
                if self._stopping:
                    break
                item = self._queue[0]
            try:
                if isinstance(item, _Batch):
                    self._write(item)
                else:
                    self._commit()
            except BaseException as error:
                self._discard()
                # Nothing more will be written: whoever resumes need not wait for our close.
                self._lock.release()
                with self._changed:
                    self._failure = error
                    self._changed.notify_all()
                return
            with self._changed:
                self._queue.popleft()
                if isinstance(item, _Batch):
                    self._waiting_bytes -= item.bytes
                self._changed.notify_all()
        self._discard()

    def _write(self, batch: _Batch) -> None:
        start = 0
        while start < len(batch.ids) and not self._stopping:
            shard = self._open_shard()
            stop = min(len(batch.ids), start + self.shard_rows - len(shard.ids))
            data = batch.rows[start:stop].view(np.uint8).data  # [stop - start, D bytes]
            write_all(shard.descriptor, data)
            shard.crc = zlib.crc32(data, shard.crc)
            shard.ids += batch.ids[start:stop]
            shard.metadata += batch.metadata[start:stop]
            if batch.row_scale is not None:
                shard.row_scales.append(batch.row_scale[start:stop])
            if len(shard.ids) == self.shard_rows:
                self._commit()
            start = stop

    def _open_shard(self) -> _OpenShard:
        if self._shard is None:
            index = len(self._manifest["shards"])
            place = temporary(self.path / shard_names(index)[0])
            descriptor = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            self._shard = _OpenShard(index, descriptor)
            # The header holds the number of rows, so it is written last.
            os.lseek(descriptor, DATA_OFFSET_BYTES, os.SEEK_SET)
        return self._shard

    def _commit(self) -> None:
        """Rows, scales and ids to disk, then their names, then the manifest that lists them."""
        shard = self._shard
        if shard is None:
            return
        rows, names = len(shard.ids), shard_names(shard.index)
        os.lseek(shard.descriptor, 0, os.SEEK_SET)
        arrays = self.codec.arrays(rows, self.layout)
        write_all(shard.descriptor, npy_header(*arrays["data"]))
        size = os.fstat(shard.descriptor).st_size
        os.fsync(shard.descriptor)
        entry: dict[str, Any] = {
            "rows": rows,
            "first_row": self._manifest["rows"],
            "data": {"file": names[0], "bytes": size, "crc32": crc32_text(shard.crc)},
            "scale": None,
        }
        written = [names[0]]
        if shard.row_scales:
            scales = np.concatenate(shard.row_scales).view(np.uint8).data  # [4 * rows]
            header = npy_header(*arrays["scale"])
            write_temporary(self.path / names[1], header, scales)
            entry["scale"] = _entry(names[1], len(header) + len(scales), zlib.crc32(scales))
            written.append(names[1])
        texts = encode_ids(shard.ids, shard.metadata)
        write_temporary(self.path / names[2], texts)
        entry["ids"] = _entry(names[2], len(texts), zlib.crc32(texts))
        written.append(names[2])
        for name in written:
            os.replace(temporary(self.path / name), self.path / name)
        sync_folder(self.path)

        manifest = {
            **self._manifest,
            "module_exponents": self._exponents,
            "rows": self._manifest["rows"] + rows,
            "shards": [*self._manifest["shards"], entry],
        }
        write_manifest(self.path, manifest)
        with self._changed:
            self._manifest = manifest
            self._committed_ids += shard.ids
        os.close(shard.descriptor)
        self._shard = None
        sync_folder(self.path)

    def _discard(self) -> None:
        """Remove what is on the disk of the shard that was not committed."""
        shard, self._shard = self._shard, None
        if shard is None:
            return
        os.close(shard.descriptor)
        # The manifest on disk decides: it may list the shard although our call failed after that.
        if shard.index < len(self._manifest["shards"]):
            return
        for name in shard_names(shard.index):
            remove(temporary(self.path / name))
            remove(self.path / name)

    def _finalize(self) -> None:
        # The thread is idle: the queue is empty and only this thread fills it.
        manifest = {
            **self._manifest,
            "module_exponents": self._exponents,
            "state": "finalized",
        }
        try:
            write_manifest(self.path, manifest)
            sync_folder(self.path)
        except OSError as error:
            raise write_error(error, f"{self.path}: cannot finalize the store") from error
        self._manifest = manifest

    def _stop(self) -> None:
        if self._process == os.getpid():
            with self._changed:
                self._stopping = True
                self._changed.notify_all()
            self._thread.join()
            self._lock.release()
        self._closed = True
        atexit.unregister(self._close_at_exit)

    def _close_at_exit(self) -> None:
        if self._failure is None and self._process == os.getpid():
            self.close(finalize=False)


def _entry(name: str, size: int, crc: int) -> dict[str, Any]:
    return {"file": name, "bytes": size, "crc32": crc32_text(crc)}


def _some(ids: list[str]) -> str:
    shown = ", ".join(repr(text) for text in ids[:5])
    return shown if len(ids) <= 5 else f"{shown}, …"


def _refuse_other_folder(path: Path, resume: bool) -> None:
    """Nothing of anybody else's is overwritten, and no store without asking."""
    if not path.exists():
        return
    if not path.is_dir():
        raise StoreExistsError(f"{path}: expected a folder for the store, got a file")
    if (path / MANIFEST).exists():
        if not resume:
            raise StoreExistsError(f"{path}: there is a store already; resume=True goes on with it")
        return
    for entry in sorted(os.listdir(path)):
        # What a create leaves that was killed before its first manifest is no reason to refuse.
        if entry not in (LOCK, *_OUR_FOLDERS) and not entry.endswith(".tmp"):
            raise StoreExistsError(
                f"{path}: expected an empty folder or a store, got a folder with {entry!r} and "
                f"without {MANIFEST}"
            )


def _remove_rubbish(path: Path, manifest: dict[str, Any]) -> None:
    """Delete temporaries, and shards and tensors that no manifest mentions: a kill left them."""
    listed = {
        entry["file"]
        for shard in manifest["shards"]
        for entry in (shard["data"], shard["scale"], shard["ids"])
        if entry is not None
    }
    tensors = [manifest["projection_tensors"], *manifest["curvature"].values()]
    listed.update(entry["file"] for entry in tensors if entry is not None)
    for name in os.listdir(path):
        if (_SHARD_FILE.match(name) and name not in listed) or name == MANIFEST + ".tmp":
            remove(path / name)
    for folder in ("projection", "curvature"):
        if (path / folder).is_dir():
            for name in os.listdir(path / folder):
                ours = name.endswith((".safetensors", ".tmp"))
                if ours and f"{folder}/{name}" not in listed:
                    remove(path / folder / name)
