"""Files of a store: .npy headers, checksums, writes that survive a kill, the lock."""

import contextlib
import errno
import fcntl
import hashlib
import os
import stat
import warnings
import weakref
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from logra_kernels.store.errors import StoreFormatError, StoreLockedError, StoreWriteError

DATA_OFFSET_BYTES = 4096  # where the data of every .npy file starts: one page, so maps are aligned
TEMPORARY_SUFFIX = ".tmp"
_READ_BYTES = 1 << 22
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # of a file system without locks


def npy_header(dtype: str, shape: Sequence[int]) -> bytes:
    """The first 4096 bytes of an .npy file (format 1.0), for a C-ordered array of `dtype`."""
    body = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {tuple(shape)!r}, }}".encode()
    head = b"\x93NUMPY\x01\x00" + (DATA_OFFSET_BYTES - 10).to_bytes(2, "little")
    return head + body.ljust(DATA_OFFSET_BYTES - 11) + b"\n"


def npy_bytes(dtype: str, shape: Sequence[int]) -> int:
    """The size of an .npy file that holds such an array."""
    size = np.dtype(dtype).itemsize
    for extent in shape:
        size *= extent
    return DATA_OFFSET_BYTES + size


def powers_of_two(values: np.ndarray) -> np.ndarray:
    """[n] bool: which float32 values are positive, finite powers of two."""
    fraction, _ = np.frexp(values)
    good: np.ndarray = np.isfinite(values) & (fraction == 0.5)
    return good


def finite(values: np.ndarray) -> np.ndarray:
    """Which elements are finite, as bool of the same shape."""
    good: np.ndarray
    if values.dtype == np.float16:
        # np.isfinite converts every float16 to float32: 1.2 GB/s, against 4.6 for the bits.
        good = (values.view(np.uint16) & 0x7C00) != 0x7C00
    else:
        good = np.isfinite(values)
    return good


def open_regular(path: Path, flags: int = os.O_RDONLY) -> int:
    """A descriptor of a regular file.

    A pipe or a device in its place would keep the process waiting, or feed it without end. A file
    that is to be written is not reached through a symbolic link, which may lead out of the store.

    Raises:
        OSError: the system refuses, or there is something else than a regular file.
    """
    if flags & (os.O_WRONLY | os.O_RDWR):
        flags |= os.O_NOFOLLOW
    descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        what = os.strerror(errno.EISDIR) if stat.S_ISDIR(mode) else "it is no regular file"
        raise OSError(errno.EINVAL, what, str(path))
    return descriptor


def open_to_read(path: Path) -> BinaryIO:
    """A regular file, opened for reading; errors as those of `open_regular`."""
    return os.fdopen(open_regular(path), "rb")


def own_folder(path: Path) -> None:
    """Make a folder of a store, and those above it; accept one that is there.

    Raises:
        StoreFormatError: it is a symbolic link, which may lead out of the store.
    """
    if path.is_symlink():
        raise StoreFormatError(f"{path}: expected a folder, got a symbolic link")
    path.mkdir(parents=True, exist_ok=True)


def crc32_text(crc: int) -> str:
    """A CRC-32 as it stands in a manifest: eight hexadecimal digits."""
    return f"{crc:08x}"


def crc32_of_file(path: Path, start: int = 0, progress: Callable[[int], None] | None = None) -> str:
    """CRC-32 (zlib's) of a file's bytes from `start` on; `progress` gets the bytes of each read."""
    crc = 0
    with open_to_read(path) as file:
        file.seek(start)
        while piece := file.read(_READ_BYTES):
            crc = zlib.crc32(piece, crc)
            if progress is not None:
                progress(len(piece))
    return crc32_text(crc)


def sha256_of_file(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file in hexadecimal; `progress` gets the bytes of each read."""
    digest = hashlib.sha256()
    with open_to_read(path) as file:
        while piece := file.read(_READ_BYTES):
            digest.update(piece)
            if progress is not None:
                progress(len(piece))
    return digest.hexdigest()


def read_array(path: Path, dtype: np.dtype, count: int, skip: int = 0) -> np.ndarray:
    """[count], the elements of an .npy file behind the first `skip`, read into memory.

    Raises:
        StoreFormatError: the file is shorter, or cannot be read.
    """
    try:
        with open_to_read(path) as file:
            offset = DATA_OFFSET_BYTES + skip * dtype.itemsize
            values = np.fromfile(file, dtype, count, offset=offset)
    except OSError as error:
        raise StoreFormatError(f"{path}: cannot be read: {error.strerror}") from None
    if len(values) != count:
        raise StoreFormatError(f"{path}: expected {count} values, got {len(values)}")
    return values


def read_whole(descriptor: int, place: memoryview, offset: int, path: Path) -> None:
    """Fill `place` with a file's bytes from `offset` on.

    Raises:
        StoreFormatError: the file ends before.
    """
    got = 0
    while got < len(place):
        read = os.preadv(descriptor, [place[got:]], offset + got)
        if read == 0:
            raise StoreFormatError(
                f"{path}: expected {offset + len(place)} bytes, got {offset + got}: the file was "
                "cut short"
            )
        got += read


def check_mapped(path: Path, want_bytes: int, descriptor: int | None = None) -> None:
    """Look at the size of a mapped file right before its use: behind its end the process is killed.

    A map keeps a file that was removed, so that one is good.

    Raises:
        StoreFormatError: the file was cut short.
    """
    try:
        got = os.stat(path if descriptor is None else descriptor).st_size
    except OSError:
        return
    if got < want_bytes:
        raise StoreFormatError(
            f"{path}: expected {want_bytes} bytes, got {got}: the file was cut short while it was "
            "read"
        )


def identity(path: Path) -> tuple[int, ...] | None:
    """What changes when a file is replaced, or a folder's entries are; None if there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def write_all(descriptor: int, data: Any) -> None:
    """Write every byte of a buffer; one call of os.write may take only a part of it."""
    view = memoryview(data).cast("B")
    while view:
        view = view[os.write(descriptor, view) :]


def sync_folder(folder: Path) -> None:
    """Sync a folder, so that the names in it survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary(path: Path) -> Path:
    """Where a file is written before it gets its name."""
    return path.with_name(path.name + TEMPORARY_SUFFIX)


def create_temporary(path: Path) -> int:
    """A descriptor of a new, empty file under the file's temporary name.

    What lies there, an unfinished file or a link, goes; nothing is written through it.
    """
    place = temporary(path)
    remove(place)
    return open_regular(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL)


def write_temporary(path: Path, *pieces: Any) -> Path:
    """Write the pieces to the file's temporary name and to the disk; leave nothing on failure."""
    place = temporary(path)
    try:
        descriptor = create_temporary(path)
        try:
            for piece in pieces:
                write_all(descriptor, piece)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except BaseException:
        remove(place)
        raise
    return place


def replace_file(path: Path, *pieces: Any) -> None:
    """Give `path` new content atomically. The folder is left for the caller to sync."""
    place = write_temporary(path, *pieces)
    try:
        os.replace(place, path)
    except BaseException:
        remove(place)
        raise


def remove(path: Path) -> None:
    """Delete a file. Where that fails it stays, for a file that nobody lists does no harm."""
    with contextlib.suppress(OSError):
        path.unlink()


def write_error(error: OSError, doing: str) -> StoreWriteError:
    """An error that says in one sentence what was done and why the system refused it."""
    if error.errno == errno.ENOSPC:
        why = "the disk is full"
    elif error.errno == errno.EDQUOT:
        why = "the disk quota is used up"
    elif error.errno == errno.EFBIG:
        why = "the file would be larger than the system allows (ulimit -f)"
    else:
        why = str(error)
    return StoreWriteError(f"{doing}: {why}")


def check_file(folder: Path, name: str, want_bytes: int, header: bytes | None = None) -> None:
    """Compare the size of a file, and the header of an .npy file, with what the manifest says.

    Raises:
        StoreFormatError: the file is missing, cut short or grown, or is another array.
    """
    path = folder / name
    try:
        with open_to_read(path) as file:
            got_bytes = os.fstat(file.fileno()).st_size
            got = file.read(len(header)) if header is not None else None
    except FileNotFoundError:
        raise StoreFormatError(f"{path}: the manifest lists this file, but it is missing") from None
    except OSError as error:
        raise StoreFormatError(f"{path}: cannot be read: {error.strerror}") from None
    if got_bytes != want_bytes:
        raise StoreFormatError(f"{path}: expected {want_bytes} bytes, got {got_bytes}")
    if header is not None and got is not None and got != header:
        want_text = header[10:].split(b"}")[0].decode() + "}"
        raise StoreFormatError(
            f"{path}: expected the .npy header {want_text}, got {got[10:120].rstrip()!r}"
        )


class Lock:
    """An exclusive lock on a store. The system releases it when the process dies.

    Raises:
        StoreLockedError: another process, or another writer of this process, holds it.
    """

    def __init__(self, path: Path) -> None:
        # Without O_TRUNC: the holder's process id must stay readable until this process holds it.
        descriptor = open_regular(path, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 20).decode("ascii", "replace").strip() or "unknown"
            os.close(descriptor)
            raise StoreLockedError(
                f"{path.parent}: another writer (process {holder}) has this store open; "
                "wait until it has finished"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(descriptor)
                raise
            warnings.warn(
                f"{path}: this file system has no locks; two writers at once would spoil the store",
                stacklevel=2,
            )
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        self._descriptor: int | None = descriptor
        _held.add(self)

    def __enter__(self) -> None:
        """Hold the lock inside a with block."""

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Release the lock. A second call does nothing."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


_held: "weakref.WeakSet[Lock]" = weakref.WeakSet()


def _release_in_child() -> None:
    # A forked data-loader worker shares the lock with its parent, and would keep the store locked
    # after the parent was killed. Closing the child's copy leaves the parent's lock in place.
    for lock in list(_held):
        lock.release()


os.register_at_fork(after_in_child=_release_in_child)
