"""Mapped files, what the page cache holds of them, and buffers in huge pages."""

import contextlib
import ctypes
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from logra_kernels.store.errors import StoreFormatError
from logra_kernels.store.files import open_to_read

HUGE_PAGE_BYTES = 2 << 20
SAMPLED_PAGES = 8  # pages of a range that are asked about to tell whether it is cached

_MADV_POPULATE_READ = 22  # Linux 5.14; Python knows no name for it
_EINVAL = 22
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]


class _Map:
    """A mapped part of a file, under the array interface. It is unmapped when no array uses it.

    Python's own maps, and so NumPy's, each keep a file descriptor: a thousand shards would use up
    what a process may have.
    """

    def __init__(self, path: Path, dtype: np.dtype, shape: Sequence[int], offset: int) -> None:
        self._address = None
        num_bytes = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        before = offset % mmap.PAGESIZE  # a map begins on a page of the system's size
        with open_to_read(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size < offset + num_bytes:
                raise StoreFormatError(
                    f"{path}: cannot be mapped: expected {offset + num_bytes} bytes, got {size}"
                )
            self._length = max(1, before + num_bytes)
            address = _libc.mmap(
                None,
                self._length,
                mmap.PROT_READ,
                mmap.MAP_SHARED,
                file.fileno(),
                offset - before,
            )
        if address == ctypes.c_void_p(-1).value:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        self._address = address
        self.__array_interface__ = {
            "version": 3,
            "shape": tuple(shape),
            "typestr": dtype.str,
            "data": (address + before, True),
        }

    def __del__(self) -> None:
        if self._address is not None:
            _libc.munmap(self._address, self._length)


def map_array(path: Path, dtype: np.dtype, shape: Sequence[int], offset: int) -> np.ndarray:
    """A read-only array over a part of a file, without a copy.

    Raises:
        StoreFormatError: the file is too short, or the system refuses.
    """
    try:
        return np.asarray(_Map(path, dtype, shape, offset))
    except OSError as error:
        raise StoreFormatError(f"{path}: cannot be mapped: {error.strerror}") from None


def huge_buffer(num_bytes: int) -> np.ndarray:
    """A new array [num_bytes] uint8, in huge pages and aligned to them where the system can."""
    length = -(-num_bytes // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    memory = mmap.mmap(-1, length + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(memory, np.uint8)
    skip = -whole.ctypes.data % HUGE_PAGE_BYTES
    return whole[skip : skip + num_bytes]


def is_cached(rows: np.ndarray, first: int, last: int) -> bool:
    """Whether the page cache holds the bytes [first, last) of a map, judged by a few pages.

    If the process may not write the file, the system says of every page that it is cached.
    """
    page = ctypes.c_ubyte()
    start = rows.ctypes.data
    for i in range(SAMPLED_PAGES):
        address = start + first + (last - 1 - first) * i // (SAMPLED_PAGES - 1)
        address -= address % mmap.PAGESIZE
        if _libc.mincore(address, 1, ctypes.byref(page)) or not page.value & 1:
            return False
    return True


def populate(rows: np.ndarray, first: int, last: int) -> int:
    """Read the bytes [first, last) of a map into the page cache. Returns 0, or an error number.

    On a kernel that cannot do it, the pages are read when they are used.
    """
    code = _advise(rows, first, last, _MADV_POPULATE_READ)
    return 0 if code == _EINVAL else code


def cached_bytes(path: Path) -> int:
    """The number of bytes of a file that the page cache holds."""
    size = os.path.getsize(path)
    view = map_array(path, np.dtype(np.uint8), [size], 0)
    pages = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
    if _libc.mincore(view.ctypes.data, size, pages.ctypes.data):
        raise OSError(ctypes.get_errno(), "mincore", str(path))
    return int((pages & 1).sum()) * mmap.PAGESIZE


def _advise(rows: np.ndarray, first: int, last: int, advice: int) -> int:
    begin = rows.ctypes.data + first
    end = rows.ctypes.data + last
    begin -= begin % mmap.PAGESIZE
    return ctypes.get_errno() if _libc.madvise(begin, end - begin, advice) else 0
