"""The paper's Lemma 1 on real gradients: what the directions of a gradient hold, and what is kept.

In the eigenbasis of H, g = Σ_i c_i √λ_i e_i, and a score is Σ_i c_i c'_i λ_i / (λ_i + λ). Where
queries are like the examples, E[c_i²] = 1 for every i, and a direction counts by λ_i / (λ_i + λ).
Here H is EKFAC's; λ_i are over the training examples, c_i those of the queries.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from typing import Any

import torch
from torch import Tensor

from bench.accuracy.methods import Subject
from bench.harness.tables import table
from logra_kernels.projection.spec import rank_pair

BINS = 12  # of the directions in their order, each twice as wide as the one before


def lemma_part(subject: Subject) -> dict[str, Any]:
    """E[c²] over directions of falling λ_i / (λ_i + λ), and what rows of equal sizes keep."""
    setting = subject.setting
    with tempfile.TemporaryDirectory() as folder:
        run = subject.run(folder)
        sizes = {module.name: (module.ko, module.ki) for module in run.modules}
        dim = sum(ko * ki for ko, ki in sizes.values())
        with run.pilot("eigen", coordinates=dim):
            for ids, x, y in subject.batches():
                with run(ids):
                    subject.loss(x, y).backward()
        run.setup({"statistic": "diagonal"})
        for _ in run.curvature_passes():
            for ids, x, y in subject.batches():
                with run(ids):
                    subject.loss(x, y).backward()
        queries = subject.query_rows(run).square()  # [Q, D]
        means = torch.cat(list(run.curvature.eigenvalues.values()))  # type: ignore[attr-defined]
        inverse = run.preconditioner().precondition(torch.ones(1, dim))[0].double()
    weights = means * inverse  # λ_i / (λ_i + λ), whatever the rows are scaled by
    kept = _kept(weights, sizes, setting.ranks, setting.coordinates)
    rows = _directions(queries, means, weights)
    print(table(rows))
    print(f"c² of {len(queries)} queries, ± standard error, over {dim:,} directions of EKFAC\n")
    print(table(kept))
    print("share of Σ λ_i / (λ_i + λ) that rows keep; random: in expectation")
    return {
        "bench": "accuracy",
        "case": f"lemma, {setting.title}",
        "params": {"part": "lemma", "setting": setting.name, "directions": dim},
        "methods": kept,
        "bins": rows,
    }


def _directions(queries: Tensor, means: Tensor, weights: Tensor) -> list[dict[str, Any]]:
    """E[c²] in bins of the directions, the heaviest first, over queries [Q, D] squared."""
    order = weights.argsort(descending=True, stable=True)
    order = order[means[order] > 0]  # a direction that no example has is none of the lemma's
    share = len(order) / (2**BINS - 1)
    ends = [0] + [math.ceil(share * (2 ** (n + 1) - 1)) for n in range(BINS)]
    rows = []
    for first, last in itertools.pairwise(ends):
        chosen = order[first : min(last, len(order))]
        if not len(chosen):
            continue
        each = (queries[:, chosen].double() / means[chosen]).mean(dim=1)  # [Q]
        rows.append(
            {
                "directions": f"{first + 1} to {first + len(chosen)}",
                "E[c²]": float(each.mean()),
                "±": float(each.std() / math.sqrt(len(each))),
                "λ_i/(λ_i+λ)": float(weights[chosen].mean()),
            }
        )
    return rows


def _kept(
    weights: Tensor,
    sizes: dict[str, tuple[int, int]],
    ranks: tuple[int, ...],
    coordinates: tuple[int, ...],
) -> list[dict[str, Any]]:
    """What rows keep of Σ λ_i / (λ_i + λ): eigenbasis, PCA, random subspaces of its size."""
    total = float(weights.sum())
    parts = weights.split([ko * ki for ko, ki in sizes.values()])
    rows = [
        {"rows": "eigenbasis", "D": dim, "kept": float(weights.topk(dim).values.sum()) / total}
        for dim in coordinates
    ]
    for rank in ranks:
        first_out, first_in = rank_pair(rank)
        pca, random, dim = 0.0, 0.0, 0
        for part, (ko, ki) in zip(parts, sizes.values(), strict=True):
            corner = part.view(ko, ki)[:first_out, :first_in]
            pca += float(corner.sum())
            random += float(part.sum()) * corner.numel() / part.numel()
            dim += corner.numel()
        rows.append({"rows": f"PCA, rank {rank}", "D": dim, "kept": pca / total})
        rows.append({"rows": f"random, rank {rank}", "D": dim, "kept": random / total})
    return rows
