"""SIGKILL at any system call: no committed shard is lost, and a resumed store ends as if whole.

run/test_kill_run.py kills whole runs, at random moments.

The writer is a process of its own that imports the numpy side only, so that it starts in 0.2 s. Its
rows follow from their ids (store_samples), so every one of them can be checked at the end.
"""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from store_samples import listed_files, rows_of, scales_of, stored_rows
from tree import environment

from logra_kernels.store import Store, codec_names

# argv: store, number of rows, the number of the system call to die at (0: live), codec.
WRITER = """
import os, signal, sys
from pathlib import Path
import numpy as np
from store_samples import append, writer_of

path, rows, deadly_call = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
calls = 0

def deadly(name):
    real = getattr(os, name)
    def call(*arguments, **options):
        global calls
        calls += 1
        if calls == deadly_call:
            if name == "write":
                data = memoryview(arguments[1]).cast("B")
                real(arguments[0], data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)
    setattr(os, name, call)

for name in ("mkdir", "open", "write", "fsync", "replace", "unlink", "close"):
    deadly(name)
writer = writer_of(
    path,
    shard_rows=5,
    dtype=sys.argv[4],
    resume=True,
    duplicates="skip",
    projection={"seed": 1},
    projection_tensors={"p": np.arange(6.0)},
)
print("ready", flush=True)
start = 0
while start < rows:
    stop = min(rows, start + 1 + start % 13)
    append(writer, list(range(start, stop)), metadata=[{"row": row} for row in range(start, stop)])
    start = stop
writer.close()
assert "torch" not in sys.modules
"""
ENVIRONMENT = environment()


def start_writer(
    path: Path, rows: int, deadly_call: int = 0, dtype: str = "float16"
) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", WRITER, str(path), str(rows), str(deadly_call), dtype]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)


def wait_until_ready(child: "subprocess.Popen[str]") -> bool:
    """Whether the child has opened the store, or died before."""
    assert child.stdout is not None
    return child.stdout.readline() == "ready\n"


def committed(path: Path) -> list[dict[str, Any]]:
    """The shards that the manifest lists; [] before there is one."""
    try:
        return list(json.loads((path / "manifest.json").read_bytes())["shards"])
    except FileNotFoundError:
        return []


def check_survivors(path: Path, before: list[dict[str, Any]]) -> None:
    """What was committed before the kill is there after it, unchanged and whole."""
    assert committed(path)[: len(before)] == before
    if (path / "manifest.json").exists():
        assert Store.open(path).verify() == []


def finish_and_check(path: Path, rows: int, dtype: str = "float16") -> None:
    """Resume a last time, without a kill: the store equals one that was never killed."""
    with start_writer(path, rows, dtype=dtype) as child:
        assert wait_until_ready(child)
        assert child.wait() == 0
    store = Store.open(path)
    assert store.finalized
    assert store.verify() == []
    ids = list(range(rows))
    assert store.ids.to_pylist() == [str(value) for value in ids]
    scales = np.concatenate([shard.row_scale for shard in store.shards])
    assert stored_rows(store).tobytes() == rows_of(ids, dtype).tobytes()
    wanted = scales_of(ids) if store.codec.scaled else np.ones(rows, np.float32)
    assert scales.tobytes() == wanted.tobytes()
    assert store.metadata(ids) == [{"row": row} for row in ids]
    assert set(os.listdir(path)) == {"lock", "manifest.json", "projection", *listed_files(store)}
    assert len(os.listdir(path / "projection")) == 1


@pytest.mark.parametrize("dtype", codec_names())
def test_killed_while_committing(in_memory: Path, dtype: str) -> None:
    """Each kill comes right before a chosen system call, or half-way through a write."""
    path, rows = in_memory / "s", 400
    for call in random.Random(3).sample(range(10, 120), 15):
        before = committed(path)
        with start_writer(path, rows, call, dtype) as child:
            assert child.wait() == -signal.SIGKILL
        check_survivors(path, before)
    assert committed(path)
    finish_and_check(path, rows, dtype)


@pytest.mark.parametrize("call", range(1, 23, 2))
def test_killed_while_creating(in_memory: Path, call: int) -> None:
    path = in_memory / "s"
    with start_writer(path, 4, call) as child:
        assert not wait_until_ready(child), "the store was made; the kill came too late"
        assert child.wait() == -signal.SIGKILL
    check_survivors(path, [])
    finish_and_check(path, 4)
