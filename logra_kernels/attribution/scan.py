"""The pieces of a scan: queries made ready, norms of rows, and where the scores go."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from logra_kernels import ops
from logra_kernels.attribution.influence_result import TOTAL, InfluenceResult
from logra_kernels.curvature.preconditioner import Preconditioner
from logra_kernels.defaults import SCAN_MODES
from logra_kernels.rows import dtype_name, module_of, split_columns
from logra_kernels.store import Module, Store, StoreError

# What each mode divides by: "sigma" is |W g| = sqrt(sigma), "theta" is |(H + lambda I)^-1 g|.
NORM_OF_MODE = {
    "dot": None,
    "l-relatif": "sigma",
    "l2": "sigma",
    "theta-relatif": "theta",
    "whitened-cosine": "sigma",
}

# Sums of squares outside these have lost bits to float32's range, or are about to.
SMALLEST_SQUARE, LARGEST_SQUARE = 2.0**-90, 2.0**100

Groups = Mapping[str, str | Sequence[str]] | Sequence[str] | None

_warned: set[str] = set()


class ShardNorms:
    """The norms of a whole shard that lie in its cache, and what was made of them for a scan."""

    def __init__(self, load: Callable[[], np.ndarray]) -> None:
        self._load = load
        self._made: dict[Any, tuple[np.ndarray, np.ndarray]] = {}

    @cached_property
    def norms(self) -> np.ndarray:
        """[r, M] float32, mapped."""
        return self._load()

    def per_row(
        self, key: Any, make: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """What `make` gives for all rows of the shard, made once; 5 bytes a row stay in memory."""
        if key not in self._made:
            self._made[key] = make(self.norms)
            del self.norms
        return self._made[key]


@dataclass
class Block:
    """Some rows of a shard on the scan's device, and what is known of them, on the host."""

    first_row: int
    rows: Tensor  # [R, D], as in the file
    row_scale: np.ndarray | None = None  # [R], the pack's powers of two
    norms: np.ndarray | None = None  # [R, M], in units of 2**units[m]
    units: list[int] = field(default_factory=list)
    # Where norms of the whole shard are known and to be remembered: they, and its row scales.
    shard: ShardNorms | None = None
    start: int = 0  # the block's first row in the shard
    shard_scale: np.ndarray | None = None


@dataclass
class Plan:
    """Queries ready for the scan: inverse and module exponents folded in."""

    name: str
    members: list[int]  # module numbers
    columns: slice  # from the group's first to its last column; others inside it are zero
    queries: Tensor  # [Q, columns] float32, largest element of each in [0.5, 1) (not in "l2")
    exponents: Tensor  # [Q]: the true query is 2**exponent times that

    def to(self, device: torch.device) -> Plan:
        return Plan(
            self.name,
            self.members,
            self.columns,
            self.queries.to(device),
            self.exponents.to(device),
        )


class Norms:
    """Per row and module the norm |W g| of the row as it lies in the file, [R, M] float32.

    The row's own scale stays out, for it cancels in a normalised score, and a module's norms are in
    units of 2**units[m], so that they fit float32 whatever the size of the gradients. A norm fits
    where its square would not.
    """

    def __init__(
        self,
        preconditioner: Preconditioner,
        kind: str,
        exponents: Sequence[int],
        device: torch.device,
        store: Store | None = None,
    ) -> None:
        self._preconditioner = preconditioner
        self._kind = kind
        self._device = device
        self._factors: list[Tensor] | None = None
        # W is divided by 2**unit; the file's module exponent is multiplied in afterwards
        self._factor_units = preconditioner.units(kind)
        self.units = [e + u for e, u in zip(exponents, self._factor_units, strict=True)]
        self._memory: dict[int, np.ndarray] = {}
        self._remembered: dict[int, ShardNorms] = {}
        self._cache = None
        if store is not None:
            meta = {
                "quantity": {"sigma": "sqrt(sigma)", "theta": "|(H + lambda I)^-1 g|"}[kind],
                "unit_exponents": self.units,
                "curvature": preconditioner.kind,
                "dampings": preconditioner.dampings,
            }
            self._cache = store.self_influence_cache(f"{kind}-{preconditioner.key}", meta)
            self._missing = set(self._cache.missing())

    def known(self, shard: int) -> bool:
        """Whether an earlier pass left a shard's norms."""
        return shard not in self._missing or shard in self._memory

    def load(self, shard: int) -> np.ndarray:
        """The norms [r, M] of a known shard."""
        assert self._cache is not None
        return self._memory[shard] if shard in self._missing else self._cache.read(shard)

    def remembered(self, shard: int) -> ShardNorms:
        """What scans made of a known shard's norms."""
        if shard not in self._remembered:
            self._remembered[shard] = ShardNorms(lambda: self.load(shard))
        return self._remembered[shard]

    def keep(self, shard: int, norms: np.ndarray) -> None:
        """Commit a shard's norms beside the store, or in memory where that cannot be written."""
        assert self._cache is not None
        if not self._memory:  # one refusal is enough
            try:
                self._cache.write(shard, norms)
                self._missing.remove(shard)
                return
            except (OSError, StoreError) as error:
                warn_once(f"self-influence is not kept beside the store: {error}")
        self._memory[shard] = norms

    def compute(self, rows: Tensor, modules: Sequence[Module]) -> np.ndarray:
        """[R, M] for rows [R, D] as they lie in the file."""
        if self._factors is None:
            factors = self._preconditioner.scaled_factors(self._kind)
            self._factors = [factor.to(self._device) for factor in factors or []]
        out = torch.empty(rows.shape[0], len(modules), device=rows.device)
        for i, columns in enumerate(split_columns(rows, modules)):
            out[:, i] = _norm(columns, self._factors[i] if self._factors else None)
        return out.cpu().numpy()


class Sink:
    """Where one group's scores go: the whole matrix, or a running top k."""

    def __init__(
        self, plan: Plan, num_rows: int, k: int | None, upload: Callable[[np.ndarray], Tensor]
    ) -> None:
        self.plan = plan
        self.zero_rows: int | None = None
        self._k = k
        self._upload = upload
        self._state: Any = None
        self._unit = 0  # row scales are 2**unit too large
        self._factors: list[Tensor] | None = None
        self._scores = torch.empty(plan.queries.shape[0], num_rows) if k is None else None

    def add(self, block: Block, mode: str) -> None:
        scale, bias = self._row_scale(block, mode)
        rows = block.rows
        if self.plan.columns != slice(0, rows.shape[1]):
            rows = rows[:, self.plan.columns]
        if self._scores is None:
            assert self._k is not None
            self._state = ops.topk_scores(
                self.plan.queries, rows, self._k, scale, bias, self._state, block.first_row
            )
            return
        values = ops.scores(self.plan.queries, rows, scale, bias)  # [Q, R]
        for factor in self._true_scale():
            values *= factor
        self._scores[:, block.first_row : block.first_row + rows.shape[0]] = values

    def result(
        self, mode: str, query_ids: list[str], row_ids: Sequence[str], dampings: dict[str, float]
    ) -> InfluenceResult:
        result = InfluenceResult(mode, query_ids, row_ids, dampings, self.zero_rows, self._scores)
        if self._state is not None:
            top, top_rows, bottom, bottom_rows = self._state
            for factor in self._true_scale():
                top, bottom = top * factor, bottom * factor
            result.top_scores, result.top_rows = top.cpu(), top_rows.cpu()
            result.bottom_scores, result.bottom_rows = bottom.cpu(), bottom_rows.cpu()
        return result

    def _row_scale(self, block: Block, mode: str) -> tuple[Tensor | None, Tensor | None]:
        """row_scale and row_bias of the scan, [R] float32 each.

        Computed by NumPy, on one thread: a vector of R is not worth waking the others.
        """
        plain = None if block.row_scale is None else self._upload(block.row_scale)
        if mode == "dot" or not block.units:
            return plain, None
        members = self.plan.members
        if mode != "l2":
            # the scale of the pack is in the score and in the norm, and cancels
            self._unit = max(block.units[i] for i in members)
        if block.shard is None:
            assert block.norms is not None
            values, zero = self._of_norms(block.norms, block.row_scale, block.units, mode)
        else:
            whole = block.shard.per_row(
                (mode == "l2", *members),
                lambda norms: self._of_norms(norms, block.shard_scale, block.units, mode),
            )
            here = slice(block.start, block.start + block.rows.shape[0])
            values, zero = whole[0][here], whole[1][here]
        self.zero_rows = (self.zero_rows or 0) + int(np.count_nonzero(zero))
        ready = self._upload(values)
        return (plain, ready) if mode == "l2" else (ready, None)

    def _of_norms(
        self, norms: np.ndarray, row_scale: np.ndarray | None, units: list[int], mode: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """What a score is multiplied with (in "l2": what is added), and where the norm is zero."""
        if mode == "l2":
            norm = true_norms(norms, row_scale, units, self.plan.members)  # [R] float64
            with np.errstate(over="ignore"):
                return (-0.5 * norm**2).astype(np.float32), norm == 0
        norm = _combine(norms, units, self.plan.members, self._unit)
        zero = norm == 0
        inverse = np.divide(1, norm, out=np.zeros_like(norm), where=~zero)
        return inverse.astype(np.float32), zero

    def _true_scale(self) -> list[Tensor]:
        """Factors [Q, 1] that bring scores to their true scale, each of which float32 can hold."""
        if self._factors is None:
            exponent = self.plan.exponents[:, None] - self._unit
            self._factors = _powers_of_two(exponent) if bool(exponent.any()) else []
        return self._factors


def plan_queries(
    queries: Tensor,
    names: list[str],
    mode: str,
    groups: Groups,
    modules: Sequence[Module],
    exponents: Sequence[int],
    preconditioner: Preconditioner,
) -> list[Plan]:
    check_rows("queries", queries, modules, names)
    raw = queries.detach().cpu().double()
    solved = preconditioner.precondition(raw)  # [Q, D]
    chosen = {TOTAL: list(range(len(modules))), **find_groups(groups, modules)}
    offsets = np.cumsum([0, *(module.size for module in modules)]).tolist()
    plans = []
    for name, members in chosen.items():
        columns = slice(offsets[members[0]], offsets[members[-1] + 1])
        folded = torch.zeros(raw.shape[0], columns.stop - columns.start, dtype=torch.float64)
        sigma = torch.zeros(raw.shape[0], dtype=torch.float64)  # [Q]
        for i in members:
            module = slice(offsets[i], offsets[i + 1])
            place = slice(module.start - columns.start, module.stop - columns.start)
            folded[:, place] = solved[:, module] * 2.0 ** exponents[i]
            sigma += (raw[:, module] * solved[:, module]).sum(dim=1)
        if mode == "whitened-cosine":
            folded *= torch.where(sigma > 0, sigma.clamp(min=0).rsqrt(), 0.0)[:, None]
        unit = torch.zeros(raw.shape[0], dtype=torch.int32)
        if mode != "l2":  # whose bias is one for all queries
            unit = torch.frexp(folded.abs().amax(dim=1)).exponent
            folded = torch.ldexp(folded, -unit[:, None])
        plans.append(Plan(name, members, columns, folded.float(), unit))
    return plans


def collect(
    sinks: list[Sink],
    mode: str,
    query_ids: list[str],
    row_ids: Sequence[str],
    dampings: dict[str, float],
) -> InfluenceResult:
    total, *parts = [sink.result(mode, query_ids, row_ids, dampings) for sink in sinks]
    total.groups = {s.plan.name: part for s, part in zip(sinks[1:], parts, strict=True)}
    return total


def find_groups(groups: Groups, modules: Sequence[Module]) -> dict[str, list[int]]:
    """{group: module numbers}; a module belongs to a group if its name holds a substring."""
    if groups is None:
        return {}
    if isinstance(groups, str):
        raise TypeError(f"groups: expected a list or a mapping of substrings, got '{groups}'")
    named = groups if isinstance(groups, Mapping) else {part: [part] for part in groups}
    found = {}
    for name, parts in named.items():
        if name == TOTAL:
            raise ValueError(f"groups: the name '{TOTAL}' is taken by the sum over all modules")
        parts = [parts] if isinstance(parts, str) else list(parts)
        members = [i for i, m in enumerate(modules) if any(part in m.name for part in parts)]
        if not members:
            raise ValueError(
                f"groups: '{name}' ({', '.join(parts)}) matches none of the modules "
                f"{', '.join(m.name for m in modules)}"
            )
        found[name] = members
    return found


def check_mode(mode: str) -> str:
    if mode == "cosine":
        warn_once(
            "mode 'cosine' is LogIX's name for l-RelatIF: the score is divided by sqrt(sigma) of "
            "the training row only, and is no cosine; 'whitened-cosine' is one"
        )
        return "l-relatif"
    if mode not in SCAN_MODES:
        raise ValueError(f"mode: expected one of {', '.join(SCAN_MODES)} or cosine, got {mode!r}")
    return mode


def check_query_ids(query_ids: Sequence[Any] | None, queries: Tensor) -> list[str]:
    if not isinstance(queries, Tensor):
        raise TypeError(f"queries: expected a tensor [Q, D], got {type(queries).__name__}")
    count = queries.shape[0] if queries.ndim else 0
    names = [str(name) for name in (range(count) if query_ids is None else query_ids)]
    if len(names) != count:
        raise ValueError(f"query_ids: expected {count}, one per query, got {len(names)}")
    return names


def check_rows(
    argument: str, rows: Tensor, modules: Sequence[Module], names: list[str] | None
) -> None:
    dim = sum(module.size for module in modules)
    if rows.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{argument}: expected float32, got {dtype_name(rows.dtype)}")
    if rows.ndim != 2 or rows.shape[1] != dim:
        letter = "Q" if argument == "queries" else "R"
        raise ValueError(f"{argument}: expected [{letter}, {dim}], got {list(rows.shape)}")
    finite = rows.isfinite()
    if not finite.all():
        row, column = (int(v) for v in (~finite).nonzero()[0])
        name = names[row] if names else str(row)
        raise ValueError(
            f"{argument}: '{name}' is not finite in module '{module_of(modules, column).name}'"
        )


def _norm(columns: Tensor, factor: Tensor | None) -> Tensor:
    """|W g| of g = columns [R, K], [R] float32; exact to rounding whatever the size of g."""
    if factor is not None and not factor.any():
        return torch.zeros(columns.shape[0], device=columns.device)
    square = _squares(columns, factor)
    norm = square.sqrt()
    odd = (~((square > SMALLEST_SQUARE) & (square < LARGEST_SQUARE))).nonzero()[:, 0]
    if odd.numel():
        part = columns[odd].float()  # [odd, K]
        largest = part.abs().amax(dim=1)
        part, odd, largest = part[largest > 0], odd[largest > 0], largest[largest > 0]
        unit = torch.frexp(largest).exponent
        part = _scale_exponent(part, -unit[:, None])
        norm[odd] = _scale_exponent(_squares(part, factor).sqrt(), unit)
    return norm


def _squares(columns: Tensor, factor: Tensor | None) -> Tensor:
    if factor is not None:
        return ops.self_influence(columns, factor)
    return _sum_columns(columns.float() * columns.float())


def _sum_columns(values: Tensor) -> Tensor:
    """[R, n] -> [R], halves added to halves: a row's additions are the same in any block."""
    while values.shape[1] > 1:
        half = (values.shape[1] + 1) // 2
        upper = values[:, half:]
        values = values[:, :half].clone()
        values[:, : upper.shape[1]] += upper
    return values[:, 0]


def _combine(
    norms: np.ndarray, units: Sequence[int], members: Sequence[int], unit: int
) -> np.ndarray:
    """The norm over several modules, of the row as in the file, / 2**unit: [R] float64."""
    if len(members) < len(units):
        norms = norms[:, list(members)]
    wide = norms.astype(np.float64)
    wide *= wide
    wide *= np.ldexp(1.0, [2 * (units[i] - unit) for i in members])
    # NumPy adds along a contiguous row by its length alone: the bits do not depend on the block
    return np.sqrt(wide.sum(axis=1))


def true_norms(
    norms: np.ndarray, row_scale: np.ndarray | None, units: Sequence[int], members: Sequence[int]
) -> np.ndarray:
    """sqrt(sigma) over several modules, of the row itself: [R] float64."""
    norm = _combine(norms, units, members, 0)
    return norm if row_scale is None else norm * row_scale


def _scale_exponent(values: Tensor, exponent: Tensor) -> Tensor:
    """values * 2**exponent."""
    for factor in _powers_of_two(exponent):
        values = values * factor
    return values


def _powers_of_two(exponent: Tensor) -> list[Tensor]:
    """Two factors, each of which float32 can hold, whose product is 2**exponent."""
    half = torch.div(exponent, 2, rounding_mode="floor")
    return [
        torch.ldexp(torch.ones_like(step, dtype=torch.float32), step)
        for step in (half, exponent - half)
    ]


def warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=4)
