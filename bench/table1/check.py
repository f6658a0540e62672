"""The two systems' scores compared, before they are timed, on a tiny model trained for a while.

With no curvature and no projection both give plain products of whole gradients, and both must equal
those of autograd. EKFAC's scores and LoGra's are of different curvatures: how far their rankings
agree is reported, not required.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.harness.models import summed_loss
from bench.table1 import logra
from bench.table1.setting import Setting
from logra_kernels.attribution import Attributor
from logra_kernels.curvature import RawCurvature
from logra_kernels.store import Store

# kronfluence and this package add up in float32, in different orders.
TOLERANCE = 1e-4
RANK = 8


def scores(setting: Setting, folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Scores [Q, N] of autograd, and ours by whole and by projected gradients, saved in a file.

    options: save (the path).
    """
    every = 1 << 30  # a rank that no width exceeds: no projection
    logra.log(setting, folder, _log_options("whole", every))
    logra.log(setting, folder, _log_options("projected", RANK))
    found = {"autograd": dense_products(setting)}
    for project in ("whole", "projected"):
        run, model = logra.watched_run(setting, folder, project, None, "float32")
        run.initialize_from_log()
        rows = logra.rows_of_queries(run, model, setting.queries.to(setting.device), 1)
        store = Store.open(folder / project)
        for curvature in ("none", RawCurvature.load(store)):
            name = f"{project}, {curvature if isinstance(curvature, str) else 'raw'}"
            result = Attributor(store, curvature, device=setting.device).scores(rows, "dot").scores
            assert result is not None
            found[name] = result.float()
    torch.save(found, options["save"])
    return {"scores": sorted(found)}


def dense_products(setting: Setting) -> Tensor:
    """[Q, N]: products of whole weight gradients, one example at a time, by autograd alone."""
    model = setting.load()
    weights = [model.get_parameter(f"{name}.weight") for name in setting.modules]

    def gradient(tokens: Tensor) -> Tensor:
        parts = torch.autograd.grad(summed_loss(model, tokens[None].to(setting.device)), weights)
        return torch.cat([part.flatten() for part in parts]).double().cpu()

    train = torch.stack([gradient(tokens) for tokens in setting.train])  # [N, D]
    return torch.stack([gradient(tokens) @ train.T for tokens in setting.queries]).float()


def compare(ours: dict[str, Tensor], ekfac: dict[str, Tensor] | None) -> dict[str, float]:
    """Largest differences over the largest score, and mean rank correlations over the queries.

    Args:
        ours: what `scores` saved.
        ekfac: {"identity", "ekfac"}: kronfluence's scores [Q, N], or None where it is not there.
    Raises:
        RuntimeError: a difference above the tolerance.
    """
    wanted = ours["autograd"]
    found = {"ours - autograd": _difference(ours["whole, none"], wanted)}
    if ekfac:
        found["kronfluence - autograd"] = _difference(ekfac["identity"], wanted)
        found["kronfluence - ours"] = _difference(ekfac["identity"], ours["whole, none"])
    for name, difference in found.items():
        if not difference <= TOLERANCE:
            raise RuntimeError(
                f"{name}: plain products of gradients differ by {difference:.1e} of the largest,"
                f" more than {TOLERANCE:.0e}"
            )
    if ekfac:
        for name, meaning in (
            ("whole, raw", "the raw curvature of whole gradients"),
            ("projected, raw", f"LoGra of rank {RANK}"),
            ("whole, none", "no curvature"),
        ):
            correlation = rank_correlation(ekfac["ekfac"], ours[name])
            found[f"rank correlation of EKFAC and {meaning}"] = correlation
    else:
        correlation = rank_correlation(ours["whole, raw"], ours["projected, raw"])
        found[f"rank correlation of LoGra of rank {RANK} and whole gradients"] = correlation
    return found


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's correlation of two [Q, N] scores without ties, the mean over Q."""
    ranks = [scores.argsort(dim=1).argsort(dim=1).double() for scores in (a, b)]
    x, y = (r - r.mean(dim=1, keepdim=True) for r in ranks)
    return float(torch.cosine_similarity(x, y, dim=1).mean())


def train(setting: Setting, folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Train the setting's model on its own tokens, in its folder.

    options: steps, batch, learning_rate.
    """
    torch.manual_seed(0)
    model: Any = setting.load().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=options["learning_rate"])
    losses = []
    for _ in range(options["steps"]):
        chosen = torch.randint(len(setting.train), (options["batch"],))
        tokens = setting.train[chosen].to(setting.device)
        loss = summed_loss(model, tokens) / tokens[:, 1:].numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    model.eval().cpu().save_pretrained(setting.model)
    return {"first_loss": losses[0], "last_loss": losses[-1]}


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def _log_options(project: str, rank: int) -> dict[str, Any]:
    return {"batch": 8, "rank": rank, "project": project, "dtype": "float32"}
