"""The disk fills, the system refuses: the user hears of it, and committed shards stay whole."""

import contextlib
import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from refusals import refuse
from store_samples import append, listed_files, rows_of, stored_rows, writer_of
from tree import environment, output

from logra_kernels.store import Store, StoreError, StoreWriteError, StoreWriter


class Refusal:
    """Makes the n-th call of a function of `os` fail, and every call after it."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, name: str, number: int, code: int = errno.ENOSPC
    ) -> None:
        self.calls = 0
        self.real = getattr(os, name)
        self.number = number
        self.code = code
        monkeypatch.setattr(os, name, self)

    def __call__(self, *arguments: Any) -> Any:
        self.calls += 1
        if self.calls >= self.number:
            raise OSError(self.code, os.strerror(self.code))
        return self.real(*arguments)


@contextlib.contextmanager
def full_disk(
    message: str = "the disk is full",
    name: str = "write",
    number: int = 1,
    code: int = errno.ENOSPC,
) -> Iterator[None]:
    """What is inside fails by an error that says the message; then the disk has room again."""
    with pytest.MonkeyPatch.context() as patch, refuse(message, StoreWriteError):
        Refusal(patch, name, number, code)
        yield


def fill(writer: StoreWriter) -> None:
    """Five shards of three rows, then the end."""
    for start in range(0, 15, 3):
        append(writer, list(range(start, start + 3)))
    writer.close()


# Writes of a shard: rows, header, scale header, scales, ids, manifest; so 13 is in the third.
@pytest.mark.parametrize(
    ("name", "number"),
    [
        *[("write", number) for number in (1, 2, 3, 4, 5, 6, 7, 12, 13, 18)],
        *[("fsync", number) for number in (1, 2, 3, 4, 5, 6, 7, 13)],
        *[("replace", number) for number in (1, 2, 3, 4, 5, 8)],
        *[("open", number) for number in (1, 2, 3, 4, 5, 6, 7, 13)],
    ],
)
@pytest.mark.parametrize("dtype", ["float16", "int4"])
def test_a_full_disk_at_any_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int, dtype: str
) -> None:
    """A shard of int4 rows has four files of them, so that the calls lie elsewhere in it."""
    writer = writer_of(tmp_path / "s", dtype=dtype)
    refusal = Refusal(monkeypatch, name, number)
    with pytest.raises(StoreWriteError) as caught:
        fill(writer)
    assert refusal.calls >= number
    monkeypatch.undo()
    store = Store.open(tmp_path / "s")
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 's'}: cannot write shard {len(store.shards)} (the ")
    assert message.endswith(
        f"with {store.num_rows} rows, are intact; resume goes on from there): the disk is full"
    )
    assert store.verify() == []
    assert not store.finalized
    assert set(os.listdir(tmp_path / "s")) == {"lock", "manifest.json", *listed_files(store)}

    options = {"resume": True, "duplicates": "skip"}
    with writer_of(tmp_path / "s", dtype=dtype, **options) as writer:
        fill(writer)
    store = Store.open(tmp_path / "s")
    assert store.verify() == []
    assert store.ids.to_pylist() == [str(value) for value in range(15)]
    np.testing.assert_array_equal(stored_rows(store), rows_of(list(range(15)), dtype))


@pytest.mark.parametrize(
    ("code", "why"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "the disk quota is used up"),
        (errno.EFBIG, "the file would be larger than the system allows (ulimit -f)"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_the_reason_is_said(tmp_path: Path, code: int, why: str) -> None:
    writer = writer_of(tmp_path / "s")
    append(writer, [1])
    with full_disk(why, code=code):
        writer.flush()


def test_an_error_of_the_thread_is_raised_by_every_call_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = writer_of(tmp_path / "s")
    append(writer, [0, 1, 2])
    writer.flush()
    monkeypatch.setattr("logra_kernels.store.committer.encode_ids", lambda *_: 1 / 0)
    append(writer, [3, 4, 5])
    message = r"s: cannot write: ZeroDivisionError\('division by zero'\)"
    for call in (writer.flush, lambda: append(writer, [6]), writer.flush, writer.close):
        with pytest.raises(StoreError, match=message) as caught:
            call()
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
    writer.close()
    assert Store.open(tmp_path / "s").num_rows == 3
    monkeypatch.undo()
    with writer_of(tmp_path / "s", resume=True) as writer:
        append(writer, [3])


def test_an_error_wakes_a_waiting_append(tmp_path: Path) -> None:
    writer = writer_of(tmp_path / "s", queue_bytes=1)
    with full_disk():
        for value in range(1000):
            append(writer, [value])
    writer.abort()


def test_with_raises_the_threads_error(tmp_path: Path) -> None:
    writer = writer_of(tmp_path / "s")
    with full_disk(), writer:
        append(writer, [1])
    with writer_of(tmp_path / "s", resume=True) as writer:
        assert writer.committed_rows == 0


def test_a_full_disk_while_finalizing(tmp_path: Path) -> None:
    writer = writer_of(tmp_path / "s")
    append(writer, [0, 1])
    writer.flush()
    with full_disk("cannot finalize the store: the disk is full"):
        writer.close()
    store = Store.open(tmp_path / "s")
    assert (store.num_rows, store.finalized, store.verify()) == (2, False, [])
    writer_of(tmp_path / "s", resume=True).close()
    assert Store.open(tmp_path / "s").finalized


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_full_disk_while_creating(tmp_path: Path, number: int) -> None:
    options = {"projection_tensors": {"p": np.ones((2, 2), np.float32)}}
    with full_disk("s: cannot make the store: the disk is full", "open", number):
        writer_of(tmp_path / "s", **options)
    with writer_of(tmp_path / "s", **options) as writer:
        append(writer, [1])
    assert Store.open(tmp_path / "s").verify() == []


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_full_disk_while_saving_curvature(tmp_path: Path, store: Store, number: int) -> None:
    tensors = {"layers.0.mlp": np.full((3, 3), 2.0), "layers.1.mlp": np.ones(2)}
    with full_disk("cannot save the curvature: the disk is full", "write", number):
        store.save_curvature("raw", tensors, {"count": 9})
    store = Store.open(tmp_path)
    assert store.load_curvature("raw")[1] == {"count": 8, "kind": "raw"}
    assert store.verify() == []
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_full_disk_while_caching(store: Store) -> None:
    cache = store.self_influence_cache("new", None)
    with full_disk("npy: cannot write: the disk is full", "write", 3):
        cache.write(0, np.ones((3, 2), np.float32))
    assert cache.missing() == [0, 1, 2]
    assert store.verify() == []
    cache.write(0, np.ones((3, 2), np.float32))
    assert cache.missing() == [1, 2]


FILL_UNTIL_REFUSED = """
import sys
from collections.abc import Iterator
from pathlib import Path
from store_samples import append, writer_of
from logra_kernels.store import Store, StoreWriteError
path = Path(sys.argv[1])
{limit}
writer = writer_of(path, shard_rows=int(sys.argv[2]))
try:
    for start in range(0, 100_000, 500):
        append(writer, list(range(start, start + 500)))
    writer.close()
    sys.exit("it never filled")
except StoreWriteError as error:
    print(error)
store = Store.open(path)
assert store.verify() == [], store.verify()
assert not list(path.glob("*.tmp")), list(path.glob("*.tmp"))
print(store.num_rows)
"""


def test_a_real_file_size_limit(tmp_path: Path) -> None:
    """setrlimit stands for a quota: the kernel, not a mock, cuts the write short."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, 1 << 18))"
    code = FILL_UNTIL_REFUSED.format(limit=limit)
    sentence, rows = output(sys.executable, "-c", code, tmp_path / "s", 50000).splitlines()
    assert sentence.endswith("the file would be larger than the system allows (ulimit -f)")
    assert rows == "0"


def test_a_real_full_disk(tmp_path: Path) -> None:
    """A file system of one MiB, mounted where nobody else sees it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = 'mount -t tmpfs -o size=1m tmpfs "$0" || exit 77; exec "$@"'
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, str(disk)]
    code = FILL_UNTIL_REFUSED.format(limit="")
    try:
        result = subprocess.run(
            [*command, sys.executable, "-c", code, str(disk / "s"), "1000"],
            capture_output=True,
            text=True,
            env=environment(),
            check=False,
        )
    except FileNotFoundError:
        pytest.skip("there is no unshare here")
    if result.returncode == 77 or "unshare" in result.stderr:
        pytest.skip("this system allows no private mounts")
    assert result.returncode == 0, result.stderr
    sentence, rows = result.stdout.splitlines()
    assert sentence.endswith("are intact; resume goes on from there): the disk is full")
    assert int(rows) >= 10_000  # a shard of 1000 rows takes about 50 KiB
