"""The two systems' scores compared, before they are timed, on a tiny model trained for a while.

With no curvature and no projection both give plain products of whole gradients, and both must equal
those of autograd. EKFAC's scores and LoGra's are of different curvatures: how far their rankings
agree is reported, not required.
"""

from pathlib import Path

import torch
from torch import Tensor

from bench.harness.models import summed_loss
from bench.table1 import ekfac, logra
from bench.table1.setting import Setting, module_names, random_llama, windows
from logra_kernels.attribution import Attributor
from logra_kernels.curvature import RawCurvature
from logra_kernels.store import Store

# kronfluence and this package add up in float32, in different orders.
TOLERANCE = 1e-4
WHOLE = 1 << 30  # a rank that no width exceeds: no projection
RANK = 8


def tiny(folder: Path, num_train: int, num_queries: int, steps: int) -> Setting:
    """A tiny model, trained on its own training examples."""
    model = random_llama(folder / "model", width=32, inner=48, blocks=2)
    tokens = windows(None, model, num_train + num_queries, 24)
    setting = Setting(model, tokens, num_train, module_names(model))
    trained = setting.load().train()
    optimizer = torch.optim.AdamW(trained.parameters(), lr=3e-3)
    for _ in range(steps):
        batch = setting.train[torch.randint(num_train, (16,))]
        optimizer.zero_grad()
        (summed_loss(trained, batch) / batch[:, 1:].numel()).backward()
        optimizer.step()
    trained.eval().save_pretrained(model)  # type: ignore[operator]
    return setting


def our_scores(setting: Setting, folder: Path) -> dict[str, Tensor]:
    """Scores [Q, N] of autograd, and ours by whole and by projected gradients."""
    found = {"autograd": dense_products(setting)}
    for name, rank in (("whole", WHOLE), ("projected", RANK)):
        logra.log(setting, folder / name, rank, batch=8, dtype="float32")
        run, model = logra.watched_run(setting, folder / name, None, "float32")
        run.initialize_from_log()
        rows = logra.rows_of_queries(run, model, setting.queries, 1)
        store = Store.open(folder / name)
        for curvature in ("none", RawCurvature.load(store)):
            result = Attributor(store, curvature).scores(rows, "dot").scores
            assert result is not None
            kind = curvature if isinstance(curvature, str) else "raw"
            found[f"{name}, {kind}"] = result.float()
    return found


def their_scores(setting: Setting, folder: Path) -> dict[str, Tensor]:
    """{"identity", "ekfac"}: kronfluence's scores [Q, N], without and with its curvature."""
    found = {}
    for strategy in ("identity", "ekfac"):
        ekfac.fit(setting, folder, strategy, 16, None, strategy)
        count = len(setting.queries)
        found[strategy] = ekfac.score(setting, folder, strategy, 16, count, None)["scores"]
    return found


def dense_products(setting: Setting) -> Tensor:
    """[Q, N]: products of whole weight gradients, one example at a time, by autograd alone."""
    model = setting.load()
    weights = [model.get_parameter(f"{name}.weight") for name in setting.modules]

    def gradient(tokens: Tensor) -> Tensor:
        parts = torch.autograd.grad(summed_loss(model, tokens[None]), weights)
        return torch.cat([part.flatten() for part in parts]).double()

    train = torch.stack([gradient(tokens) for tokens in setting.train])  # [N, D]
    return torch.stack([gradient(tokens) @ train.T for tokens in setting.queries]).float()


def compare(ours: dict[str, Tensor], theirs: dict[str, Tensor] | None) -> dict[str, float]:
    """Largest differences over the largest score, and mean rank correlations over the queries.

    Raises: RuntimeError for a difference above the tolerance.
    """
    wanted = ours["autograd"]
    found = {"ours - autograd": _difference(ours["whole, none"], wanted)}
    if theirs:
        found["kronfluence - autograd"] = _difference(theirs["identity"], wanted)
        found["kronfluence - ours"] = _difference(theirs["identity"], ours["whole, none"])
    for name, difference in found.items():
        if not difference <= TOLERANCE:
            raise RuntimeError(
                f"{name}: plain products of gradients differ by {difference:.1e} of the largest,"
                f" more than {TOLERANCE:.0e}"
            )
    first = theirs["ekfac"] if theirs else ours["whole, raw"]
    for name in ("whole, raw", "projected, raw", "whole, none"):
        key = f"rank correlation of {'EKFAC' if theirs else 'whole, raw'} and {name}"
        found[key] = rank_correlation(first, ours[name])
    return found


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's correlation of two [Q, N] scores without ties, the mean over Q."""
    ranks = [scores.argsort(dim=1).argsort(dim=1).double() for scores in (a, b)]
    x, y = (r - r.mean(dim=1, keepdim=True) for r in ranks)
    return float(torch.cosine_similarity(x, y, dim=1).mean())


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())
