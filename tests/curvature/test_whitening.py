"""The factors by which norms of rows are found."""

import pytest
import torch

from logra_kernels.curvature.whitening import Dense, Plain, Rotated, Scaled, Whitening

INS, OUTS = 5, 3


def orthogonal(size: int) -> torch.Tensor:
    found: torch.Tensor = torch.linalg.qr(torch.randn(size, size)).Q
    return found


@pytest.mark.parametrize("kind", ["plain", "scaled", "dense", "rotated"])
def test_tokens_give_the_norms_of_their_rows(kind: str) -> None:
    torch.manual_seed(0)
    made: dict[str, Whitening] = {
        "plain": Plain(),
        "scaled": Scaled(torch.rand(OUTS * INS)),
        "dense": Dense(torch.randn(OUTS * INS, OUTS * INS).tril()),
        "rotated": Rotated(orthogonal(INS), orthogonal(OUTS), torch.rand(OUTS, INS)),
    }
    inputs, outputs = torch.randn(9, INS), torch.randn(9, OUTS)
    ends = torch.tensor([0, 4, 5, 9])
    rows = torch.stack(
        [(outputs[a:b].T @ inputs[a:b]).flatten() for a, b in ((0, 4), (4, 5), (5, 9))]
    )
    found = made[kind].squares_of_tokens(inputs, outputs, ends)
    # Sums of some 60 products in float32, in another order.
    torch.testing.assert_close(found, made[kind].squares(rows), rtol=1e-5, atol=1e-6)
