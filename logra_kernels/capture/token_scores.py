"""What each token of a pass contributes to the scores of preconditioned queries."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from logra_kernels.capture.layers import Call, Layer, row_layout


class TokenScores:
    """Σ over modules of (P_o dy_t)ᵀ U_q (P_i x_t), for every query and every token.

    Args:
        queries: [Q, D], preconditioned.
        layers: the watched modules, in the row's order.
    """

    def __init__(self, queries: Tensor, layers: Sequence[Layer]) -> None:
        layout = row_layout(layers)
        if queries.ndim != 2 or queries.shape[1] != layout.dim:
            raise ValueError(
                f"token_queries: expected [Q, {layout.dim}], got {list(queries.shape)}"
            )
        self._queries = {  # {module name: U [Q, Ko, Ki]}
            module.name: part.reshape(-1, module.ko, module.ki)
            for module, part in zip(layout, layout.split(queries), strict=True)
        }
        self.total: Tensor | None = None  # [Q, N, T]

    def add(self, layer: Layer, call: Call, dy: Tensor) -> None:
        """Add the part of one call of a module."""
        scores = layer.token_scores(call, dy, self._queries[layer.name])  # [Q, N, T]
        if self.total is None:
            self.total = scores
            return
        if scores.shape != self.total.shape:
            raise ValueError(
                f"token scores: module {layer.name} has {scores.shape[2]} tokens, another watched "
                f"module has {self.total.shape[2]}; watch modules that see the same tokens"
            )
        self.total = self.total + scores.to(self.total.device)
