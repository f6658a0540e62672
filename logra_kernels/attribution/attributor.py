"""From a store and queries to influence: precondition the queries, stream the rows, keep scores.

score = g_te^T (H + lambda I)^-1 g_tr (Eq. 3). The inverse is folded into the query once, so that a
row costs one dot product; a normaliser such as l-RelatIF's 1 / sqrt(sigma) is a scale per row.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from os import PathLike
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from logra_kernels.attribution.influence_result import TOTAL, InfluenceResult, StoredIds
from logra_kernels.attribution.memory import SHARE_FOR_ROWS, available_bytes
from logra_kernels.attribution.pipeline import HostLanes, Lanes, feed, lanes_of
from logra_kernels.attribution.scan import (
    NORM_OF_MODE,
    Block,
    Groups,
    Norms,
    ShardNorms,
    Sink,
    check_mode,
    check_query_ids,
    check_rows,
    collect,
    find_groups,
    plan_queries,
    true_norms,
)
from logra_kernels.curvature import RawCurvature
from logra_kernels.curvature.preconditioner import IdentityPreconditioner, Preconditioner
from logra_kernels.progress import Progress, track
from logra_kernels.rows import layout, scanned, share
from logra_kernels.store import BlockReader, Module, RowBlock, Store, huge_buffer

__all__ = ["Attributor", "Groups", "InfluenceResult", "find_groups", "influence_between"]

# A block this large outweighs a call, and still leaves the shard hot between sigma and the scores.
BLOCK_BYTES = 32 << 20
SMALLEST_BLOCK_ROWS, LARGEST_BLOCK_ROWS = 256, 1 << 16
# Streamed blocks are held in memory, four of them at a time.
STREAMED_BYTES, SMALLEST_STREAMED_ROWS = 8 << 20, 16
# A query is packed for every block: with this many rows to a query that is little of the work.
ROWS_PER_QUERY = 4

READINGS = ("auto", "mapped", "streamed", "resident")


class Attributor:
    """Influence of every row of a store on queries.

    Args:
        store: a Store, or the path of one.
        curvature: a RawCurvature, a Preconditioner, "raw" or None (the store's own), or "none"
            for plain dot products of gradients.
        damping_scale: lambda relative to the mean eigenvalue; 0.1 where neither is given.
        damping: lambda itself; only one of the two.
        solver: "cholesky" or "eigh" (pseudo-inverse), see RawCurvature.damped.
        device: where the scan runs; the CPU by default, which reads the mapped file in place.
        block_rows: rows per step of the scan; None for about 32 MiB, or, if streamed on the CPU,
            8 MiB (up to 32 MiB for many queries), but at least 16 rows.
        reading: how the rows come from the disk.
            "mapped": through the page cache, where they stay for the next query; on the CPU they
            are used in place.
            "streamed": around the page cache, through a ring of four blocks, so that memory does
            not grow with the store; what the page cache has already is used from there.
            "auto": mapped if the rows take at most `memory_bytes`, else streamed.
            "resident": the first scan copies the rows to the device's memory (on the CPU: to this
            process's), where they stay as long as the Attributor does.
        memory_bytes: what the rows may take, in "auto" and "resident"; by default 0.7 of what the
            machine (and the control group) has left, or the GPU.

    Raises:
        ValueError: an empty store, no curvature, a damping that is not a number >= 0, an unknown
            reading, a resident store that does not fit.
    """

    def __init__(
        self,
        store: Store | str | PathLike[str],
        curvature: RawCurvature | Preconditioner | str | None = None,
        *,
        damping_scale: float | None = None,
        damping: float | None = None,
        solver: str = "cholesky",
        device: torch.device | str | None = None,
        block_rows: int | None = None,
        reading: str = "auto",
        memory_bytes: int | None = None,
    ) -> None:
        self.store = store if isinstance(store, Store) else Store.open(Path(store))
        if self.store.num_rows == 0:
            raise ValueError(f"{self.store.path}: the store holds no rows; log some first")
        if block_rows is not None and block_rows < 1:
            raise ValueError(f"block_rows: expected at least 1, got {block_rows}")
        self.modules: list[Module] = list(self.store.modules)
        self.device = torch.device(device or "cpu")
        self._row_bytes = self.store.row_bytes
        self.reading = self._choose(reading, memory_bytes)
        self._most_rows = 0  # where many queries want larger blocks
        if block_rows is not None:
            self.block_rows = block_rows
        elif self.device.type == "cuda":
            self.block_rows = _block_rows(BLOCK_BYTES, self._row_bytes, SMALLEST_STREAMED_ROWS)
        elif self.reading == "streamed":
            self.block_rows = _block_rows(STREAMED_BYTES, self._row_bytes, SMALLEST_STREAMED_ROWS)
            self._most_rows = BLOCK_BYTES // self._row_bytes
        else:
            self.block_rows = _block_rows(BLOCK_BYTES, self._row_bytes, SMALLEST_BLOCK_ROWS)
        self.preconditioner = self._preconditioner(curvature, damping_scale, damping, solver)
        self.dampings = self.preconditioner.dampings
        self._exponents = self.store.module_exponents
        self._norms: dict[str, Norms] = {}
        self._held: dict[int, Tensor] = {}  # shard -> [r, D] on the device, if resident

    def precondition(self, queries: Tensor) -> Tensor:
        """(H + lambda I)^-1 g for queries [Q, D]; [Q, D] of the same dtype."""
        check_rows("queries", queries, self.modules, None)
        return self.preconditioner.precondition(queries)

    def scores(
        self,
        queries: Tensor,
        mode: str = "l-relatif",
        groups: Groups = None,
        query_ids: Sequence[Any] | None = None,
        progress: Progress = None,
    ) -> InfluenceResult:
        """The scores of all rows, [Q, N].

        Args:
            queries: projected gradients of what is to be explained, [Q, D] float32 or float64.
            mode: "dot" (Eq. 3), "l-relatif" (/ sqrt(sigma) of the row; LogIX calls it "cosine"),
                "l2" (score - sigma / 2), "theta-relatif" (/ |(H + lambda I)^-1 g|),
                "whitened-cosine" (/ sqrt(sigma) of the row and of the query).
            groups: {name: substrings of module names}, or a list of substrings; each group is
                scored, and normalised, by its own modules.
            query_ids: names for the queries; their numbers by default.
            progress: True for a bar, or a callback (rows done, rows in all).

        Raises:
            ValueError: an unknown mode, a group without modules, a query that is not finite or
                has another D than the store.
        """
        return self._run(queries, None, mode, groups, query_ids, progress)

    def top_k(
        self,
        queries: Tensor,
        k: int = 10,
        mode: str = "l-relatif",
        groups: Groups = None,
        query_ids: Sequence[Any] | None = None,
        progress: Progress = None,
    ) -> InfluenceResult:
        """The k most and the k least influential rows; memory does not grow with the store.

        Ties go to the lower row. Arguments as in `scores`.

        Raises:
            ValueError: k < 1, k above the number of rows, or as in `scores`.
        """
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ValueError(f"k: expected a whole number of at least 1, got {k!r}")
        if k > self.store.num_rows:
            raise ValueError(
                f"k: expected at most {self.store.num_rows}, the rows in the store, got {k}"
            )
        return self._run(queries, k, mode, groups, query_ids, progress)

    @overload
    def self_influence(self, groups: None = None, progress: Progress = None) -> Tensor: ...
    @overload
    def self_influence(
        self, groups: Mapping[str, str | Sequence[str]] | Sequence[str], progress: Progress = None
    ) -> dict[str, Tensor]: ...

    def self_influence(
        self, groups: Groups = None, progress: Progress = None
    ) -> Tensor | dict[str, Tensor]:
        """sigma = g^T (H + lambda I)^-1 g of every row, [N] float64; with groups {name: [N]}.

        float64 holds the square of what float32 gradients can be; the accuracy is float32's.
        """
        chosen = {TOTAL: list(range(len(self.modules))), **find_groups(groups, self.modules)}
        out = {name: torch.empty(self.store.num_rows, dtype=torch.float64) for name in chosen}

        def use(first_row: int, norms: np.ndarray, row_scale: np.ndarray | None) -> None:
            for name, members in chosen.items():
                sigma = true_norms(norms, row_scale, kept.units, members) ** 2
                out[name][first_row : first_row + len(sigma)] = share(sigma)

        kept = self._norms_of("sigma")
        done = track(progress, self.store.num_rows, "scan")
        shards = self.store.shards
        missing = [index for index in range(len(shards)) if not kept.known(index)]
        for index in sorted(set(range(len(shards))).difference(missing)):
            use(shards[index].first_row, kept.load(index), self._row_scale(index))
            done(shards[index].num_rows)
        with closing(lanes_of(self.device)) as lanes:
            self._scan(
                lambda block: use(block.first_row, _known(block.norms), block.row_scale),
                "sigma",
                lanes,
                done,
                missing,
                self.block_rows,
            )
        return out if groups else out[TOTAL]

    def _preconditioner(
        self,
        curvature: RawCurvature | Preconditioner | str | None,
        damping_scale: float | None,
        damping: float | None,
        solver: str,
    ) -> Preconditioner:
        fixed = isinstance(curvature, Preconditioner) or curvature == "none"
        if fixed and (damping_scale is not None or damping is not None):
            what = "no curvature" if curvature == "none" else "a preconditioner, which has its own"
            raise ValueError(f"damping: expected none with {what}, got one")
        if curvature == "none":
            return IdentityPreconditioner(self.modules)
        if curvature is None or curvature == "raw":
            curvature = RawCurvature.load(self.store)
        if not isinstance(curvature, (RawCurvature, Preconditioner)):
            raise ValueError(
                "curvature: expected 'raw', 'none', a RawCurvature or a Preconditioner, "
                f"got {curvature!r}"
            )
        theirs = layout(curvature.modules)
        if theirs != layout(self.modules):
            raise ValueError(
                f"curvature: expected the store's modules {[m.name for m in self.modules]}, "
                f"got {[name for name, _ in theirs]} (names or sizes differ)"
            )
        if isinstance(curvature, Preconditioner):
            return curvature
        if curvature.count != self.store.num_rows:
            warnings.warn(
                f"the curvature is of {curvature.count} rows, the store has {self.store.num_rows}; "
                "RawCurvature.rebuild(store).save(store) brings it up to date",
                stacklevel=3,
            )
        return curvature.damped(damping_scale, damping, solver)

    def _run(
        self,
        queries: Tensor,
        k: int | None,
        mode: str,
        groups: Groups,
        query_ids: Sequence[Any] | None,
        progress: Progress,
    ) -> InfluenceResult:
        mode = check_mode(mode)
        names = check_query_ids(query_ids, queries)
        plans = plan_queries(
            queries, names, mode, groups, self.modules, self._exponents, self.preconditioner
        )
        with closing(lanes_of(self.device)) as lanes:
            sinks = [
                Sink(plan.to(self.device), self.store.num_rows, k, lanes.upload) for plan in plans
            ]

            def use(block: Block) -> None:
                for sink in sinks:
                    sink.add(block, mode)

            done = track(progress, self.store.num_rows, "scan")
            self._scan(
                use,
                NORM_OF_MODE[mode],
                lanes,
                done,
                range(len(self.store.shards)),
                max(self.block_rows, min(self._most_rows, ROWS_PER_QUERY * queries.shape[0])),
            )
            return collect(sinks, mode, names, StoredIds(self.store), self.dampings)

    def _scan(
        self,
        use: Callable[[Block], None],
        kind: str | None,
        lanes: Lanes | HostLanes,
        done: Callable[[int], None],
        shards: Sequence[int],
        block_rows: int,
    ) -> None:
        """use(block) for all rows of the shards, in order, with the norms of that kind.

        Norms that no earlier pass left are computed here, while the block is in cache, and
        committed shard by shard: an interrupted pass keeps the shards it finished.
        """
        norms = self._norms_of(kind) if kind else None
        current: _ShardPass | None = None

        def work(rows_of: RowBlock, rows: Tensor) -> None:
            nonlocal current
            if current is None or current.index != rows_of.shard:
                current = _ShardPass(self, rows_of.shard, norms)
            block = current.block(rows_of.start, rows)
            use(block)
            done(rows.shape[0])
            if rows_of.start + rows.shape[0] == current.num_rows:
                current.finish()

        for index in shards:
            if index in self._held:
                held = self._held[index]
                for start in range(0, len(held), block_rows):
                    rows = held[start : start + block_rows]
                    work(RowBlock(index, start, np.empty(0), lambda: None), rows)
        away = [index for index in shards if index not in self._held]
        on_host = isinstance(lanes, HostLanes)
        if away:
            with BlockReader(
                self.store,
                block_rows,
                shards=away,
                keep=self.reading == "mapped",
                in_place=on_host,
                allocate=None if isinstance(lanes, HostLanes) else lanes.host_buffer,
            ) as blocks:
                feed(blocks, lanes, work, block_rows * self._row_bytes)

    def _choose(self, reading: str, memory_bytes: int | None) -> str:
        """How rows are read: what was asked for, or, for "auto", what fits."""
        if reading not in READINGS:
            raise ValueError(f"reading: expected one of {', '.join(READINGS)}, got {reading!r}")
        if memory_bytes is not None and memory_bytes < 0:
            raise ValueError(f"memory_bytes: expected at least 0, got {memory_bytes}")
        if reading in ("mapped", "streamed"):
            if memory_bytes is not None:
                raise ValueError(f"memory_bytes: expected none with reading='{reading}', got one")
            return reading
        needed = self.store.num_rows * self._row_bytes
        if memory_bytes is None:
            on_gpu = reading == "resident" and self.device.type == "cuda"
            left = torch.cuda.mem_get_info(self.device)[0] if on_gpu else available_bytes()
            memory_bytes = int(SHARE_FOR_ROWS * left)
        if needed <= memory_bytes:
            return "mapped" if reading == "auto" else "resident"
        if reading == "resident":
            raise ValueError(
                f"reading: 'resident' needs {needed / 1e9:.2f} GB for the rows of "
                f"{self.store.path}, and may take {memory_bytes / 1e9:.2f} GB of the memory of "
                f"'{self.device}'; 'auto' streams what does not fit"
            )
        return "streamed"

    def _row_scale(self, index: int) -> np.ndarray | None:
        """[r] float32 of a shard; None where its codec has no row scales."""
        if not self.store.codec.scaled:
            return None
        shard = self.store.shards[index]
        return shard.read_row_scale() if self.reading == "streamed" else shard.row_scale

    def _norms_of(self, kind: str) -> Norms:
        if kind not in self._norms:
            self._norms[kind] = Norms(
                self.preconditioner, kind, self._exponents, self.device, self.store
            )
        return self._norms[kind]

    def _check_norms(self, norms: np.ndarray, first_row: int) -> None:
        finite = np.isfinite(norms)
        if finite.all():
            return
        row, module = (int(v) for v in np.argwhere(~finite)[0])
        raise ValueError(
            f"row '{self.store.ids[first_row + row].as_py()}': its self-influence in module "
            f"'{self.modules[module].name}' is not finite"
        )


class _ShardPass:
    """A shard's part of a scan: its norms, found or computed, and its rows if they are to stay."""

    def __init__(self, attributor: Attributor, index: int, norms: Norms | None) -> None:
        self.index = index
        self.num_rows = attributor.store.shards[index].num_rows
        self._attributor = attributor
        self._norms = norms
        self._row_scale = attributor._row_scale(index)
        self._first_row = attributor.store.shards[index].first_row
        self._remembered: ShardNorms | None = None
        self._known: np.ndarray | None = None
        self._fresh: np.ndarray | None = None
        self._held: Tensor | None = None
        if norms is not None and not norms.known(index):
            self._fresh = np.empty((self.num_rows, len(attributor.modules)), np.float32)
        elif norms is not None and attributor.reading == "streamed":
            self._known = norms.load(index)
        elif norms is not None:
            self._remembered = norms.remembered(index)
        if attributor.reading == "resident" and index not in attributor._held:
            shard = attributor.store.shards[index]
            self._held = _room((self.num_rows, shard.columns), shard.dtype, attributor.device)

    def block(self, start: int, rows: Tensor) -> Block:
        here = slice(start, start + rows.shape[0])
        if self._held is not None:
            rows = self._held[here].copy_(rows)
        rows = scanned(self._attributor.store.codec, rows, self._attributor.store.layout)
        block = Block(self._first_row + start, rows, start=start)
        if self._row_scale is not None:
            block.row_scale = self._row_scale[here]
        if self._norms is None:
            return block
        block.units = self._norms.units
        if self._fresh is not None:
            block.norms = self._norms.compute(rows, self._attributor.modules)
            self._attributor._check_norms(block.norms, block.first_row)
            self._fresh[here] = block.norms
        elif self._known is not None:
            block.norms = self._known[here]
        else:
            block.shard, block.shard_scale = self._remembered, self._row_scale
        return block

    def finish(self) -> None:
        if self._norms is not None and self._fresh is not None:
            self._norms.keep(self.index, self._fresh)
        if self._held is not None:
            self._attributor._held[self.index] = self._held


def influence_between(
    queries: Tensor,
    rows: Tensor,
    preconditioner: Preconditioner,
    mode: str = "l-relatif",
    groups: Groups = None,
    query_ids: Sequence[Any] | None = None,
    row_ids: Sequence[Any] | None = None,
) -> InfluenceResult:
    """Scores [Q, R] of rows in memory, without a store.

    Args:
        queries: [Q, D] float32 or float64.
        rows: [R, D] float32.
        preconditioner: what RawCurvature.damped gives, or an IdentityPreconditioner.
        mode, groups, query_ids: as in Attributor.scores.
        row_ids: names for the rows; their numbers by default.
    """
    modules = preconditioner.modules
    mode = check_mode(mode)
    check_rows("rows", rows, modules, None)
    rows = rows.detach().float()
    ids = [str(i) for i in (range(rows.shape[0]) if row_ids is None else row_ids)]
    if len(ids) != rows.shape[0]:
        raise ValueError(f"row_ids: expected {rows.shape[0]}, got {len(ids)}")
    names = check_query_ids(query_ids, queries)
    exponents = [0] * len(modules)
    plans = plan_queries(queries, names, mode, groups, modules, exponents, preconditioner)
    lanes = HostLanes(rows.device)
    sinks = [Sink(plan.to(rows.device), rows.shape[0], None, lanes.upload) for plan in plans]
    kind = NORM_OF_MODE[mode]
    norms = Norms(preconditioner, kind, exponents, rows.device) if kind else None
    block_rows = _block_rows(BLOCK_BYTES, 4 * rows.shape[1], SMALLEST_BLOCK_ROWS)
    for first_row in range(0, rows.shape[0], block_rows):
        part = rows[first_row : first_row + block_rows]
        block = Block(first_row, part)
        if norms:
            block.norms, block.units = norms.compute(part, modules), norms.units
        for sink in sinks:
            sink.add(block, mode)
    return collect(sinks, mode, names, ids, preconditioner.dampings)


def _block_rows(num_bytes: int, row_bytes: int, least: int) -> int:
    return max(least, min(LARGEST_BLOCK_ROWS, num_bytes // row_bytes))


def _room(shape: tuple[int, int], dtype: np.dtype, device: torch.device) -> Tensor:
    """Memory for a resident shard; on the CPU in huge pages."""
    if device.type != "cpu":
        return torch.empty(shape, dtype=getattr(torch, dtype.name), device=device)
    num_bytes = shape[0] * shape[1] * dtype.itemsize
    return share(huge_buffer(num_bytes).view(dtype).reshape(shape))


def _known(norms: np.ndarray | None) -> np.ndarray:
    assert norms is not None
    return norms
