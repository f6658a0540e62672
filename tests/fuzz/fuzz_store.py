"""Damaged stores: an error in words from StoreError's family, or the scores of the intact store.

`python tests/fuzz/fuzz_store.py --calls 20000 --seed 0`. Each call damages a copy of a small store
(bits, lengths, missing and foreign files, manifests that are sealed again) and reads all of it,
in a child process, which a bad address, a signal or 20 seconds would end.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from dense_influence import gradients, make_store

from logra_kernels import Attributor, RawCurvature, Store
from logra_kernels.store import verify_store
from logra_kernels.store.manifest import seal

SLOWEST_S = 20
CALLS_A_CHILD = 50
QUERIES = gradients(2, seed=7)
VALUES: list[Any] = [None, -1, 0, 1, 2**63, 1e300, "", "..", "/etc/passwd", "x" * 300, [], {}, True]


def intact_store(folder: Path) -> tuple[Path, torch.Tensor]:
    """A float16 store of 40 rows in three shards, with a curvature and cached norms; its scores."""
    store = make_store(folder / "intact", gradients(40), shard_rows=16)
    RawCurvature.rebuild(store).save(store)
    return folder / "intact", read_all(folder / "intact")


def read_all(path: Path) -> torch.Tensor:
    """Everything a user reads: [Q, N] l-RelatIF scores; ids, metadata and rows on the way."""
    store = Store.open(path)
    store.ids.to_pylist()
    store.metadata(range(store.num_rows))
    store.take(range(store.num_rows))
    return Attributor(store).scores(QUERIES, "l-relatif").scores


def files_of(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file() and file.name != "lock")


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every key and index of a JSON value."""
    items: Any = value.items() if isinstance(value, dict) else ()
    items = enumerate(value) if isinstance(value, list) else items
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def reseal(path: Path, pick: random.Random) -> None:
    """Another value, or none, somewhere in a sealed JSON file, under a valid checksum."""
    manifest = json.loads(path.read_text())
    place = pick.choice(list(places(manifest)))
    inner = manifest
    for key in place[:-1]:
        inner = inner[key]
    if pick.random() < 0.2:
        del inner[place[-1]]
    else:
        inner[place[-1]] = pick.choice(VALUES)
    path.write_bytes(seal(manifest))


def damage(path: Path, pick: random.Random) -> str:
    """One damage; its name."""
    file = pick.choice(files_of(path))
    data = bytearray(file.read_bytes())

    def flip() -> None:
        for _ in range(pick.choice([1, 1, 1, 8])):
            data[pick.randrange(len(data))] ^= 1 << pick.randrange(8)
        file.write_bytes(data)

    def overwrite() -> None:
        begin = pick.randrange(len(data))
        data[begin : begin + 64] = pick.randbytes(64)
        file.write_bytes(data)

    def replace(make: Callable[[Path], Any]) -> None:
        file.unlink()
        make(file)

    ways: dict[str, Callable[[], Any]] = {
        "flip": flip,
        "overwrite": overwrite,
        "truncate": lambda: file.write_bytes(data[: pick.randrange(len(data))]),
        "extend": lambda: file.write_bytes(data + pick.randbytes(pick.randint(1, 99))),
        "empty": lambda: file.write_bytes(b""),
        "remove": file.unlink,
        "swap": lambda: file.write_bytes(pick.choice(files_of(path)).read_bytes()),
        "folder": lambda: replace(Path.mkdir),
        "fifo": lambda: replace(os.mkfifo),
        "link to nothing": lambda: replace(lambda place: place.symlink_to("nothing")),
        "link to a device": lambda: replace(lambda place: place.symlink_to("/dev/zero")),
        "stray file": lambda: (file.parent / "stray").write_bytes(bytes(data)),
        "reseal": lambda: reseal(path / "manifest.json", pick),
    }
    weights = [8 if name in ("flip", "reseal") else 1 for name in ways]
    (name,) = pick.choices(list(ways), weights)
    ways[name]()
    return name


def one_call(intact: Path, want: torch.Tensor, folder: Path, pick: random.Random) -> str:
    """Damage a copy and read it: how it ended."""
    copy = folder / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(intact, copy)
    name = damage(copy, pick)
    problems = verify_store(copy)
    try:
        got = read_all(copy)
    except (ValueError, OSError):  # StoreError is a ValueError
        return f"{name}: refused"
    if got.shape == want.shape and torch.equal(got, want):
        return f"{name}: harmless"
    if problems:
        return f"{name}: other scores, verify told"
    if name == "reseal":
        return f"{name}: other scores under a valid checksum"
    raise AssertionError(f"{name}: other scores, and verify found nothing")


def child(intact: Path, want: torch.Tensor, seeds: range) -> Counter[str]:
    """The calls of some seeds, in a process of their own.

    Raises:
        RuntimeError: it ended otherwise than by itself.
    """
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(reader)
        ended: Counter[str] = Counter()
        seed = seeds[0]
        try:
            with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for seed in seeds:
                    signal.alarm(SLOWEST_S)
                    ended[one_call(intact, want, Path(folder), random.Random(seed))] += 1
            os.write(writer, json.dumps(ended).encode())
            os._exit(0)
        except BaseException:
            print(f"seed {seed}:", file=sys.stderr)
            traceback.print_exc()
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        told = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if status:
        raise RuntimeError(f"seeds {seeds}: the process ended with {status}")
    return Counter(json.loads(told))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    ended: Counter[str] = Counter()
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        intact, want = intact_store(Path(folder))
        first = options.seed * 1_000_003
        for begin in range(first, first + options.calls, CALLS_A_CHILD):
            seeds = range(begin, min(begin + CALLS_A_CHILD, first + options.calls))
            try:
                ended += child(intact, want, seeds)
            except RuntimeError as error:
                print(error, file=sys.stderr)
                failed += 1
    for line, count in sorted(ended.items()):
        print(f"{count:8} {line}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
