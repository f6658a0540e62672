"""Before a scan: queries checked and preconditioned once, then folded for a mode and its groups."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from logra_kernels._checks import dtype_name
from logra_kernels.attribution.influence_result import TOTAL
from logra_kernels.curvature import Preconditioner
from logra_kernels.defaults import SCAN_MODES
from logra_kernels.rows import share
from logra_kernels.store import Module, RowLayout
from logra_kernels.store.basis import Basis

L2_EXPONENTS = 64  # queries of that many powers of two share a bias that float32 can hold

Groups = Mapping[str, str | Sequence[str]] | Sequence[str] | None


@dataclass(frozen=True)
class PreparedQueries:
    """Checked queries and their (H + λI)⁻¹ g, from which every mode's scan starts."""

    names: list[str]
    gradients: Tensor  # g, [Q, D] float64 on the CPU
    solved: Tensor  # (H + λI)⁻¹ g, [Q, D] float64 on the CPU
    key: str  # the preconditioner's

    @classmethod
    def of(
        cls,
        queries: Tensor | PreparedQueries,
        query_ids: Sequence[Any] | None,
        preconditioner: Preconditioner,
    ) -> PreparedQueries:
        """Check queries [Q, D] float32 or float64 and precondition them, unless they are already.

        Raises:
            TypeError, ValueError: no such tensor, a value that is not finite, or another number
                of ids than of queries; queries prepared for another curvature or damping, or
                given ids beside their own.
        """
        if isinstance(queries, PreparedQueries):
            if query_ids is not None:
                raise ValueError(
                    "query_ids: expected none with prepared queries, which have their own"
                )
            if queries.key != preconditioner.key:
                raise ValueError("queries: were prepared for another curvature or damping")
            return queries
        if not isinstance(queries, Tensor):
            raise TypeError(f"queries: expected a tensor [Q, D], got {type(queries).__name__}")
        count = queries.shape[0] if queries.ndim else 0
        names = [str(name) for name in (range(count) if query_ids is None else query_ids)]
        if len(names) != count:
            raise ValueError(f"query_ids: expected {count}, one per query, got {len(names)}")
        check_rows("queries", queries, preconditioner.layout, names)
        gradients = queries.detach().cpu().double()
        return cls(names, gradients, preconditioner.precondition(gradients), preconditioner.key)

    @classmethod
    def joined(cls, parts: Sequence[PreparedQueries]) -> PreparedQueries:
        """The queries of all parts, one part after the other, for a mode without norms."""
        names = [name for part in parts for name in part.names]
        gradients = torch.cat([part.gradients for part in parts])
        solved = torch.cat([part.solved for part in parts])
        return cls(names, gradients, solved, " ".join(part.key for part in parts))

    def some(self, which: Sequence[int]) -> PreparedQueries:
        """Some of the queries, by their numbers."""
        rows = list(which)
        names = [self.names[row] for row in rows]
        return PreparedQueries(names, self.gradients[rows], self.solved[rows], self.key)


@dataclass(frozen=True)
class Plan:
    """One group's queries for a scan in one mode: inverse and modules' exponents folded in."""

    name: str
    mode: str
    members: list[int]  # module numbers
    columns: slice  # from the group's first to its last column
    queries: Tensor  # [Q, columns] float32; zero in modules between that are not members
    # The true query is 2**exponents[q] times queries[q], whose largest element lies in [0.5, 1).
    # In mode "l2", whose bias is one for all queries, the exponents are multiples of L2_EXPONENTS,
    # 0 for most queries, and the largest element is smaller than 2**L2_EXPONENTS.
    exponents: Tensor  # [Q] int32

    def bands(self) -> list[tuple[Any, int]]:
        """Which queries one call of an op may score: an index into them, and their exponent.

        All may without a bias; with it those of one exponent.
        """
        found = self.exponents.unique().tolist() if self.mode == "l2" else []
        if len(found) < 2:
            return [(slice(None), *(found or [0]))]
        return [
            ((self.exponents == exponent).nonzero()[:, 0].cpu(), exponent) for exponent in found
        ]


def plan_scan(
    prepared: PreparedQueries,
    mode: str,
    groups: Groups,
    basis: Basis,
    device: torch.device,
) -> list[Plan]:
    """The plan of all modules, and after it one per group.

    Args:
        prepared: the queries.
        mode: one of SCAN_MODES.
        groups: as `find_groups` takes them.
        basis: the store's, into which the queries are folded. Where it rotates rows, every column
            of a row depends on every module, so a group's queries have all columns too.
        device: where the plans' tensors shall be.
    """
    count, layout = len(prepared.names), basis.layout
    plans = []
    for name, members in chosen_modules(groups, layout).items():
        whole = prepared.solved.clone()
        if len(members) < len(layout):
            whole.zero_()
            for i in members:
                whole[:, layout.columns[i]] = prepared.solved[:, layout.columns[i]]
        columns = slice(0, layout.dim) if basis.rotation else layout.span(members)
        folded = share(basis.fold(whole.numpy()))[:, columns]
        if mode == "whitened-cosine":
            sigma = torch.zeros(count, dtype=torch.float64)  # gᵀ(H + λI)⁻¹g, [Q]
            for i in members:
                module = layout.columns[i]
                sigma += (prepared.gradients[:, module] * whole[:, module]).sum(dim=1)
            folded *= torch.where(sigma > 0, sigma.clamp(min=0).rsqrt(), 0.0)[:, None]
        exponents = torch.frexp(folded.abs().amax(dim=1)).exponent
        if mode == "l2":
            exponents = exponents.div(L2_EXPONENTS, rounding_mode="floor").clamp(min=0)
            exponents *= L2_EXPONENTS
        queries = torch.ldexp(folded, -exponents[:, None]).float().to(device)
        plans.append(Plan(name, mode, members, columns, queries, exponents.to(device)))
    return plans


def chosen_modules(groups: Groups, modules: Sequence[Module]) -> dict[str, list[int]]:
    """{group: module numbers}, and before them all modules under the name "total"."""
    return {TOTAL: list(range(len(modules))), **find_groups(groups, modules)}


def find_groups(groups: Groups, modules: Sequence[Module]) -> dict[str, list[int]]:
    """{group: module numbers}; a module belongs to a group if its name holds a substring of it.

    Args:
        groups: {name: one or more substrings}; a list of substrings, each a group of its own; or
            None for no groups.
        modules: the row's layout.

    Raises:
        TypeError: a string, which could be either.
        ValueError: a group without modules, or one called "total".
    """
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
    """The mode itself; for LogIX's "cosine" it is "l-relatif", with one warning.

    Raises:
        ValueError: an unknown mode.
    """
    if mode == "cosine":
        _warn_of_cosine()
        return "l-relatif"
    if mode not in SCAN_MODES:
        raise ValueError(f"mode: expected one of {', '.join(SCAN_MODES)} or cosine, got {mode!r}")
    return mode


def check_top_k(argument: str, value: Any) -> None:
    """Refuse what is no whole number of at least 1.

    Raises:
        ValueError: names the argument.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{argument}: expected a whole number of at least 1, got {value!r}")


def check_rows(argument: str, rows: Tensor, layout: RowLayout, names: Sequence[str] | None) -> None:
    """Refuse rows that are not finite [R, D] float32 or float64; `names` are theirs.

    Raises:
        TypeError, ValueError: names the argument, or the row and the module.
    """
    if rows.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{argument}: expected float32, got {dtype_name(rows.dtype)}")
    if rows.ndim != 2 or rows.shape[1] != layout.dim:
        letter = "Q" if argument == "queries" else "R"
        raise ValueError(f"{argument}: expected [{letter}, {layout.dim}], got {list(rows.shape)}")
    finite = rows.isfinite()
    if not finite.all():
        row, column = (int(v) for v in (~finite).nonzero()[0])
        name = names[row] if names else str(row)
        module = layout.module_of(column).name
        raise ValueError(f"{argument}: '{name}' is not finite in module '{module}'")


@functools.cache
def _warn_of_cosine() -> None:
    warnings.warn(
        "mode 'cosine' is LogIX's name for l-RelatIF: the score is divided by sqrt(sigma) of "
        "the training row only, and is no cosine; 'whitened-cosine' is one",
        stacklevel=5,
    )
