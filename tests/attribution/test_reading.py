"""The ways from a store to scores: equal bits, bounded memory, errors that say which file."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from dense_influence import DIM, assert_same, gradients, make_store
from system_state import evict, left_behind
from test_pipeline import LateLanes
from tree import environment, output

from logra_kernels.attribution import Attributor, memory
from logra_kernels.attribution import attributor as attributor_module
from logra_kernels.attribution import reading as reading_module
from logra_kernels.curvature import RawCurvature
from logra_kernels.defaults import SCAN_MODES
from logra_kernels.store import (
    BlockReader,
    Module,
    RowBlock,
    Store,
    StoreFormatError,
    StoreWriter,
    codec_names,
)

QUERIES = gradients(3, seed=7)
GROUPS = {"up": "up", "down": ["down"]}


@pytest.fixture
def blocks_read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(shard, start) of each block that was read, whichever way."""
    read = []

    class Spy(BlockReader):
        def __iter__(self) -> Iterator[RowBlock]:
            for block in super().__iter__():
                read.append((block.shard, block.start))
                yield block

    monkeypatch.setattr(reading_module, "BlockReader", Spy)
    return read


def results(attributor: Attributor, mode: str) -> list[torch.Tensor]:
    top = attributor.top_k(QUERIES, 7, mode, groups=GROUPS)
    full = attributor.scores(QUERIES, mode, groups=GROUPS)
    out = [full.scores, top.top_scores, top.top_rows, top.bottom_scores, top.bottom_rows]
    out += [full.groups[name].scores for name in GROUPS]
    out += [top.groups[name].top_rows for name in GROUPS]
    zeros = [r.zero_rows for r in (full, top, *full.groups.values(), *top.groups.values())]
    out.append(torch.tensor([-1 if z is None else z for z in zeros]))
    return [*out, attributor.self_influence()]


@pytest.mark.parametrize("mode", SCAN_MODES)
@pytest.mark.parametrize("dtype", codec_names())
def test_every_reading_gives_the_same_bits(
    tmp_path: Path, mode: str, dtype: str, set_threads: None
) -> None:
    """Also blocks that a shard cuts short, cold or cached, sigma computed, found or remembered,
    and on one thread or two."""
    rows = gradients(90)
    rows[[3, 44]] = 0
    want = None
    for number, (shard_rows, block_rows) in enumerate([(90, None), (90, 7), (25, 16), (6, 6)]):
        store = make_store(tmp_path / f"s{number}", rows, dtype, shard_rows)
        curvature = RawCurvature.rebuild(store)
        for reading in ("mapped", "streamed", "resident"):
            shutil.rmtree(store.path / "self_influence", ignore_errors=True)
            for threads in (1, 2):
                torch.set_num_threads(threads)
                if threads == 1:
                    evict(store)
                attributor = Attributor(store, curvature, reading=reading, block_rows=block_rows)
                got = results(attributor, mode)
                want = want or got
                for one, other, again in zip(want, got, results(attributor, mode), strict=True):
                    assert_same(one, other)
                    assert_same(one, again)


@pytest.mark.parametrize("reading", ["mapped", "streamed", "resident"])
@pytest.mark.parametrize("policy", ["copies late", "work first", 1])
def test_a_device_with_lanes_gives_the_same_bits(
    store: Store, monkeypatch: pytest.MonkeyPatch, reading: str, policy: str | int, native: None
) -> None:
    """The pipeline of a GPU, on a device that does everything as late as it may."""
    curvature = RawCurvature.rebuild(store)
    want = results(Attributor(store, curvature), "l-relatif")
    shutil.rmtree(store.path / "self_influence")
    made = []

    def late(device: torch.device) -> LateLanes:
        made.append(LateLanes(policy))
        return made[-1]

    monkeypatch.setattr(attributor_module, "lanes_of", late)
    attributor = Attributor(store, curvature, reading=reading, block_rows=16)
    for _ in range(2):
        for one, other in zip(want, results(attributor, "l-relatif"), strict=True):
            assert torch.equal(one, other)
    assert len(made) == 6
    assert all(lanes.closed for lanes in made)


def test_what_fits_is_mapped_and_what_does_not_is_streamed(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 150 * DIM * 2
    curvature = RawCurvature.rebuild(store)
    assert Attributor(store, curvature).reading == "mapped"
    assert Attributor(store, curvature, memory_bytes=size).reading == "mapped"
    assert Attributor(store, curvature, memory_bytes=size - 1).reading == "streamed"
    monkeypatch.setattr(reading_module, "available_bytes", lambda: size)
    assert Attributor(store, curvature).reading == "streamed"
    with pytest.raises(ValueError, match=re.escape("reading: expected one of auto, mapped,")):
        Attributor(store, curvature, reading="fast")
    with pytest.raises(ValueError, match="memory_bytes: expected at least 0, got -1"):
        Attributor(store, curvature, memory_bytes=-1)
    with pytest.raises(ValueError, match="memory_bytes: expected none with reading='mapped'"):
        Attributor(store, curvature, reading="mapped", memory_bytes=1)


def test_streamed_blocks_have_rows_for_their_queries(
    store: Store, blocks_read: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packing queries is work per block: many queries want more rows of it."""
    monkeypatch.setattr(reading_module, "STREAMED_BYTES", 1)
    curvature = RawCurvature.rebuild(store)
    attributor = Attributor(store, curvature, reading="streamed")
    want = Attributor(store, curvature).scores(gradients(6), "l-relatif").scores
    blocks_read.clear()
    attributor.scores(QUERIES, "l-relatif")
    assert [start for shard, start in blocks_read if shard == 0] == [0, 16, 32]
    blocks_read.clear()
    assert_same(attributor.scores(gradients(6), "l-relatif").scores, want)
    assert [start for shard, start in blocks_read if shard == 0] == [0, 24]


def test_resident_rows_are_read_once_and_must_fit(
    store: Store, blocks_read: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    curvature = RawCurvature.rebuild(store)
    message = (
        f"reading: 'resident' needs 0.00 GB for the rows of {store.path}, and may take 0.00 GB of "
        "the memory of 'cpu'; 'auto' streams what does not fit"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        Attributor(store, curvature, reading="resident", memory_bytes=150 * DIM * 2 - 1)
    attributor = Attributor(store, curvature, reading="resident", block_rows=16)
    want = attributor.scores(QUERIES, "l-relatif").scores
    assert len(blocks_read) == 3 * 3 + 2  # 40 rows in blocks of 16, 30 rows
    for shard in store.shards:
        shard.path.unlink()
        for file in shard.files:
            file.__dict__.pop("_rows", None)
    assert torch.equal(attributor.scores(QUERIES, "l-relatif").scores, want)
    assert torch.equal(attributor.top_k(QUERIES, 1).top_scores[:, 0], want.amax(dim=1))
    assert len(blocks_read) == 3 * 3 + 2


def test_an_interrupted_pass_keeps_the_shards_it_finished(
    store: Store, blocks_read: list[tuple[int, int]]
) -> None:
    def interrupt(done: int, total: int) -> None:
        if done > 80:
            raise KeyboardInterrupt

    curvature = RawCurvature.rebuild(store)
    before = left_behind()
    attributor = Attributor(store, curvature, reading="resident")
    with pytest.raises(KeyboardInterrupt):
        attributor.top_k(QUERIES, 2, progress=interrupt)
    evict(store)
    streamed = Attributor(store, curvature, reading="streamed")
    with pytest.raises(KeyboardInterrupt):
        streamed.top_k(QUERIES, 2, progress=interrupt)
    evict(store)
    assert left_behind() == before
    blocks_read.clear()
    got = attributor.scores(QUERIES, "l-relatif").scores
    assert blocks_read == [(2, 0), (3, 0)]  # the others were resident by then
    assert torch.equal(got, Attributor(store, curvature).scores(QUERIES, "l-relatif").scores)


def test_sigma_that_is_missing_is_computed_on_the_blocks_that_are_scored(
    store: Store, blocks_read: list[tuple[int, int]]
) -> None:
    attributor = Attributor(store, RawCurvature.rebuild(store), reading="streamed", block_rows=25)
    attributor.top_k(QUERIES, 3, groups=GROUPS)
    once = [(shard, start) for shard in range(4) for start in (0, 25)]
    assert blocks_read == once
    attributor.self_influence()
    assert blocks_read == once  # it is known now


@pytest.mark.parametrize("reading", ["mapped", "streamed", "resident"])
def test_a_file_cut_short_is_an_error_that_names_it(store: Store, reading: str) -> None:
    attributor = Attributor(store, RawCurvature.rebuild(store), reading=reading)
    evict(store)
    path = store.shards[2].path
    os.truncate(path, 4100)
    message = f"{path}: expected {4096 + 40 * DIM * 2} bytes, got 4100"
    with pytest.raises(StoreFormatError, match=re.escape(message)):
        attributor.scores(QUERIES, "l-relatif")


CUT = """
import itertools, os, shutil, sys
from pathlib import Path
import torch
from logra_kernels import Attributor, StoreError, ops
from dense_influence import gradients

torch.set_num_threads(1)  # so that no thread of OpenMP is lost in a fork
intact, scores = Path(sys.argv[1]), ops.scores

def ask(path, reading, when, norms):
    if norms == "found":
        Attributor(path, reading=reading).self_influence()
    done = []

    def cut(*_):
        done.append(1)
        if len(done) == 2:
            for file in path.rglob("*.npy"):
                os.truncate(file, 4096)

    def cut_then_score(*arguments):
        cut()
        return scores(*arguments)

    if when == "under a block":
        ops.scores = cut_then_score
    progress = cut if when == "between blocks" else None
    try:
        attributor = Attributor(path, reading=reading, block_rows=16)
        attributor.scores(gradients(3), "l-relatif", progress=progress)
    except StoreError as error:
        return str(error)

cases = itertools.product(
    ("mapped", "streamed", "resident"), ("between blocks", "under a block"), ("found", "computed")
)
for number, case in enumerate(cases):
    if case[:2] == ("mapped", "under a block"):
        continue
    path = shutil.copytree(intact, intact.with_name(f"cut-{number}"))
    child = os.fork()
    if not child:
        print(*case, ask(path, *case), sep=": ", flush=True)
        os._exit(0)
    if status := os.waitpid(child, 0)[1]:
        print(*case, f"ended with {status}", sep=": ", flush=True)
"""


def test_a_file_cut_short_between_blocks_or_under_one_ends_no_process(store: Store) -> None:
    """Of a mapped store alone a block in use would end it; rows and norms are in the page cache."""
    RawCurvature.rebuild(store).save(store)
    lines = output(sys.executable, "-c", CUT, store.path).splitlines()
    assert len(lines) == 10
    for line in lines:
        assert re.search(r"/shard-0000\d[^/]*\.npy: expected \d+ (bytes|values), got \d+", line)


MEASURE = """
import os, sys
import torch
from pathlib import Path
from logra_kernels.attribution import Attributor
from logra_kernels.store import Store
from logra_kernels.store.maps import cached_bytes

def status(key):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) << 10

def growth(store, reading):
    for shard in store.shards:
        for file in shard.files:
            file.__dict__.pop("_rows", None)
        descriptor = os.open(shard.path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    attributor = Attributor(store, "none", reading=reading, block_rows=512)  # 4 MiB
    queries = torch.ones(2, 4096)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status("RssAnon") + status("RssFile")
    attributor.top_k(queries, 5, "l-relatif")
    peak = status("VmHWM") - before
    cached = sum(cached_bytes(shard.path) for shard in store.shards)
    return peak >> 10, cached >> 10

small, large = (Store.open(Path(sys.argv[1]) / name) for name in ("small", "large"))
growth(small, "streamed")  # what is allocated once
for store, reading in ((small, "streamed"), (large, "streamed"), (large, "mapped")):
    print(*min(growth(store, reading) for _ in range(3)))
"""


def make_wide(path: Path, num_rows: int) -> None:
    rows = np.random.default_rng(0).integers(-99, 99, (500, 4096)).astype(np.float16)
    with StoreWriter.create(path, modules=[Module("m", 64, 64)], shard_rows=4000) as writer:
        writer.set_module_exponents([0])
        for first in range(0, num_rows, 500):
            writer.append(range(first, first + 500), rows, np.ones(500, np.float32))


def test_memory_does_not_grow_with_the_store(tmp_path: Path) -> None:
    """Peak of anonymous and mapped memory together, over what was there before the scan.

    The bound: four buffers of 4 MiB, each rounded up to huge pages of 2 MiB, and 6 MiB for the
    rest of a pass. The mapped way goes beyond it, so the measure would see a leak. The least of
    three passes: allocators keep memory, and give it back, at times of their own.
    """
    make_wide(tmp_path / "small", 2000)
    make_wide(tmp_path / "large", 20000)
    env = {**environment(), "OMP_NUM_THREADS": "1"}
    out = output(sys.executable, "-c", MEASURE, tmp_path, env=env)
    (small, _), (large, left), (mapped, kept) = (
        tuple(int(number) for number in line.split()) for line in out.splitlines()
    )
    assert mapped > 100 << 10
    if kept and left == kept:
        pytest.skip("this file system keeps its files in memory")
    bound = 4 * (6 << 10) + (6 << 10)
    assert small <= bound
    assert large <= bound
    assert left == 0
    assert kept > 150 << 10


def write_group(folder: Path, limit: str, used: int, cache: int, version: int) -> None:
    folder.mkdir(parents=True)
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
    names = names if version == 1 else ("memory.max", "memory.current", "")
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(
        f"anon {used - cache}\n{names[2]}active_file {cache - 1}\n{names[2]}inactive_file 1\n"
    )


def test_limits_of_control_groups(tmp_path: Path) -> None:
    proc, root = tmp_path / "cgroup", tmp_path / "sys"
    proc.write_text("0::/a/b\n")
    write_group(root / "a", "1000", 600, 100, 2)
    write_group(root / "a/b", "max", 600, 100, 2)
    assert memory._groups(proc, root) == [500]
    proc.write_text("3:cpu:/x\n4:memory,hugetlb:/y\n")
    write_group(root / "memory/y", "700", 650, 50, 1)
    assert memory._groups(proc, root) == [100]
    proc.write_text("4:memory:/seen/from/the/host\n")
    for name in ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat"):
        (root / "memory" / name).write_text((root / "memory/y" / name).read_text())
    assert memory._groups(proc, root) == [100]
    assert memory._groups(tmp_path / "none", root) == []
    assert 0 < memory.available_bytes() < 1 << 50


def test_the_least_limit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_groups", lambda: [5, 3])
    assert memory.available_bytes() == 3
