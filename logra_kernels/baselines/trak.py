"""TRAK (Park et al. 2023, https://arxiv.org/abs/2303.14186): a kernel machine of gradients.

The output function is the margin f = ln(p / (1 - p)) of the right class. For each of M models,

    Φ [N, k]: the gradients ∇f of the training examples, projected; φ: a query's
    scores = (1/M Σ φᵀ (ΦᵀΦ + λI)⁻¹ Φᵀ) · (1/M Σ diag(1 - p))                        (Eq. 13, 17)

    for model in models:
        run.watch(model, bias=True)                      # no add_lora: whole gradients
        with run(data_id=ids):
            f = margin(model(x), y)                      # [N]
            f.sum().backward()
        features.append(projection(run.last_rows()[1]))
        weights.append(torch.sigmoid(-f.detach()))       # 1 - p
    Trak(features, weights).scores(query_features)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from logra_kernels._checks import expect_shape
from logra_kernels.projection import ProjectionSpec
from logra_kernels.projection.random import RandomKind, normal, rademacher

_KINDS = {
    "normal": RandomKind("normal", normal),
    "rademacher": RandomKind("rademacher", rademacher),
}
BLOCK_ELEMENTS = 1 << 24  # of the projection that are in memory at a time, 64 MiB


class RowProjection:
    """Rows [n, P] of whole gradients -> [n, k], by one random matrix over all modules together.

    E⟨Pa, Pb⟩ = ⟨a, b⟩ (Johnson-Lindenstrauss). The matrix follows from the seed and P. It is
    drawn in blocks of columns, the first of which are kept; the others are drawn at each call, so
    that the matrix need not fit the memory: give many rows at a time then.

    Args:
        dim: k.
        seed: any integer; each of several models has one of its own.
        kind: "rademacher" or "normal" entries.
        kept_bytes: what kept blocks may take.

    Raises:
        ValueError: another kind, or k below 1.
    """

    def __init__(
        self, dim: int, seed: int = 0, kind: str = "rademacher", *, kept_bytes: int = 1 << 30
    ) -> None:
        if kind not in _KINDS:
            raise ValueError(f"kind: expected one of {', '.join(_KINDS)}, got {kind!r}")
        self._spec = ProjectionSpec(kind, dim, seed)
        self._dim = dim
        self._kept: dict[tuple[int, int, torch.device], Tensor] = {}
        self._left = kept_bytes

    def __call__(self, rows: Tensor) -> Tensor:
        """[n, k] float32 of rows [n, P], on their device."""
        expect_shape("rows", rows, N=None, P=None)
        rows = rows.detach().float()
        width = max(1, BLOCK_ELEMENTS // self._dim)
        projected = rows.new_zeros(len(rows), self._dim)
        for first in range(0, rows.shape[1], width):
            part = rows[:, first : first + width]
            projected += part @ self._block_on(rows.device, first // width, part.shape[1]).T
        return projected

    def _block_on(self, device: torch.device, number: int, width: int) -> Tensor:
        """A block on a device, kept there if there is room."""
        key = number, width, device
        block = self._kept.get(key)
        if block is None:
            block = self.block(number, width).to(device)
            if block.nbytes <= self._left:
                self._kept[key] = block
                self._left -= block.nbytes
        return block

    def block(self, number: int, width: int) -> Tensor:
        """Columns [k, width] float32 of the matrix, the block `number` of that width."""
        kind = _KINDS[self._spec.kind]
        return kind.matrix(self._spec, f"row block {number}", "in", (self._dim, width))


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """f = ln(p / (1 - p)) for the probability p of the label; 1 - p = sigmoid(-f).

    Args:
        logits: [..., C]; labels: [...] int64.

    Returns: [...], the logit of the label less the logarithm of the others' summed exponentials.
    """
    places = labels[..., None]
    others = logits.scatter(-1, places, -math.inf).logsumexp(-1)
    return logits.gather(-1, places)[..., 0] - others


class Trak:
    """TRAK's scores from projected gradients of the margin under M models.

    Args:
        features: Φ [N, k] of each model; k may differ between them.
        weights: 1 - p [N] of each model.
        damping_scale: λ relative to the mean eigenvalue of ΦᵀΦ; at least 0. The paper has 0, which
            needs k below N.

    Raises:
        ValueError: no model, shapes that do not fit, a ΦᵀΦ + λI that cannot be inverted.
    """

    def __init__(
        self, features: Sequence[Tensor], weights: Sequence[Tensor], damping_scale: float = 0.0
    ) -> None:
        if not features or len(features) != len(weights):
            raise ValueError(
                "features, weights: expected one of each for every model, "
                f"got {len(features)} and {len(weights)}"
            )
        if not 0 <= damping_scale < math.inf:
            raise ValueError(f"damping_scale: expected a number >= 0, got {damping_scale!r}")
        self._count = len(features[0])
        for one, weight in zip(features, weights, strict=True):
            expect_shape("features", one, N=self._count, k=None)
            expect_shape("weights", weight, N=self._count)
        self._features = [one.detach().cpu().float() for one in features]
        self._weights = torch.stack([one.detach().cpu().double() for one in weights]).mean(dim=0)
        self._factors = [_factor(m, one, damping_scale) for m, one in enumerate(self._features)]

    def scores(self, queries: Sequence[Tensor], /) -> Tensor:
        """[Q, N] float32 for queries [Q, k] of each model.

        Raises:
            ValueError: another number of models, or shapes that do not fit.
        """
        if len(queries) != len(self._features):
            raise ValueError(
                f"queries: expected one of each of {len(self._features)} models, got {len(queries)}"
            )
        total = torch.zeros(len(queries[0]), self._count, dtype=torch.float64)
        for query, features, factor in zip(queries, self._features, self._factors, strict=True):
            expect_shape("queries", query, Q=len(total), k=features.shape[1])
            solved = torch.cholesky_solve(query.detach().cpu().double().T, factor)  # [k, Q]
            total += (features @ solved.float()).T
        return (total / len(queries) * self._weights).float()


def _factor(model: int, features: Tensor, damping_scale: float) -> Tensor:
    """L of ΦᵀΦ + λI = L Lᵀ, [k, k] float64.

    Raises: ValueError if there is none.
    """
    wide = features.double()
    kernel = wide.T @ wide
    kernel.diagonal().add_(damping_scale * float(kernel.diagonal().mean()))
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(kernel)
    # A pivot that is rounding alone passes the decomposition.
    smallest = factor.diagonal().square().min() if len(factor) else torch.tensor(1.0)
    if failed or not smallest > len(kernel) * 2.0**-52 * kernel.diagonal().max():
        count, dim = features.shape
        raise ValueError(
            f"features: model {model}: ΦᵀΦ [{dim}, {dim}] of {count} examples cannot be inverted; "
            "give a damping_scale, or project to fewer dimensions"
        )
    return factor
