"""Labels that a model draws from its own predictions."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from logra_kernels.defaults import SEED
from logra_kernels.run.logged_pass import check_ids


@torch.no_grad()
def sample_labels(
    logits: Tensor, data_id: Any, *, seed: int = SEED, mask: Tensor | None = None
) -> Tensor:
    """One class for each prediction, drawn from softmax(logits).

    An example's draws follow from the seed, its id and the number of its predictions before: not
    from the batch, nor from padding where `mask` says which it is.

    Args:
        logits: [N, C], or [N, T, C] of a model of tokens; float, on any device.
        data_id: N ids, as the pass was given them.
        seed: any integer.
        mask: [N, T] of 0 and 1; a prediction that it leaves out gets the label 0, and uses no
            draw.

    Returns:
        [N] or [N, T] int64, on the logits' device.

    Raises:
        ValueError: other shapes, or ids that are not N different ones.
    """
    ids = check_ids(data_id)
    if logits.ndim < 2 or len(logits) != len(ids):
        raise ValueError(f"logits: expected [{len(ids)}, ..., C], got {list(logits.shape)}")
    shape = logits.shape[:-1]
    if mask is not None and mask.shape != shape:
        raise ValueError(f"mask: expected {list(shape)}, got {list(mask.shape)}")
    labels = torch.zeros(shape, dtype=torch.int64, device=logits.device)
    for n, name in enumerate(ids):
        counts = torch.ones(shape[1:], dtype=torch.bool) if mask is None else mask[n].bool()
        counts = counts.to(logits.device)
        chosen = logits[n][counts].float()  # [t, C]
        # Relative to the last sum, which rounding may leave beside 1.
        sums = chosen.softmax(-1).double().cumsum(-1)
        points = _uniform(seed, name, len(chosen)).to(logits.device)[:, None] * sums[:, -1:]
        places = torch.searchsorted(sums, points, right=True)[:, 0]
        labels[n][counts] = places.clamp(max=logits.shape[-1] - 1)
    return labels


def _uniform(seed: int, name: str, count: int) -> Tensor:
    """`count` numbers in [0, 1), float64: the first of the stream of a seed and an id."""
    key = hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=16).digest()
    raw = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(count)
    return torch.from_numpy((raw >> np.uint64(11)) * 2.0**-53)
