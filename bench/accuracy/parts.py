"""What is asked of the methods' scores: LDS, brittleness, flipped labels. Each gives a record."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.accuracy.methods import FULL, Found, Rows, Subject
from bench.accuracy.setting import Setting, query_losses, query_outcomes, trained_model
from bench.harness.tables import table
from logra_kernels.evaluation import (
    brittleness,
    half_subsets,
    lds,
    lds_difference,
    mislabelled_auc,
    retrain,
    without_top,
)

FLIPPED = 0.1  # of the labels
RESAMPLES = 400  # of the bootstrap; a second for each method
Record = dict[str, Any]


def lds_part(subject: Subject, found: Sequence[Found], folder: Path) -> Record:
    """The LDS of every method, over the bytes that it keeps."""
    setting, data = subject.setting, subject.data
    subsets = half_subsets(len(data.x), setting.halves)
    outcomes = retrain(
        lambda indices, seeds: query_losses(setting, data, indices, seeds),
        subsets,
        setting.seeds,
        folder,
        name=setting.key(data),
        batch=setting.side_by_side,
        progress=True,
    )
    values = [lds(one.scores, subsets, outcomes, resamples=RESAMPLES) for one in found]
    rows = [
        {
            "method": one.method,
            "D": one.dim,
            "bytes a row": one.size,
            "LDS": value.value,
            "low": value.low,
            "high": value.high,
            "of EKFAC's": value.value / values[0].value,
        }
        for one, value in zip(found, values, strict=True)
    ]
    differences = []
    for one, other in _of_equal_bytes(found):
        less = lds_difference(one.scores, other.scores, subsets, outcomes, resamples=RESAMPLES)
        differences.append(
            {
                "method": one.method,
                "D": one.dim,
                "less": other.method,
                "its D": other.dim,
                "LDS": less.value,
                "low": less.low,
                "high": less.high,
            }
        )
    print(table(rows))
    print("\nThe differences at equal bytes, over the same queries and models\n")
    print(table(differences))
    ceiling = values[0].ceiling
    told = "one seed" if ceiling is None else f"ceiling by the seeds' noise {ceiling:.2f}"
    print(f"{setting.halves} halves, {setting.seeds} seeds each; {told}")
    params = {"halves": setting.halves, "seeds": setting.seeds, "ceiling": ceiling}
    return {**_record(setting, "lds", params, rows), "differences": differences}


def _of_equal_bytes(found: Sequence[Found]) -> list[tuple[Found, Found]]:
    """Eigenbasis rows, each beside every random and PCA row within a tenth of their bytes."""
    stored = [(one, one.size) for one in found if one.size is not None]
    return [
        (one, other)
        for one, size in stored
        for other, its in stored
        if one.method.startswith("eigenbasis")
        and other.method.startswith(("random,", "PCA,"))
        and abs(its - size) <= size / 10
    ]


def brittleness_part(subject: Subject, found: Sequence[Found], folder: Path) -> Record:
    """What the queries lose without the examples that the main methods rank first for them."""
    setting, data = subject.setting, subject.data
    count, images = len(data.x), data.y.dim() == 1
    name = f"{setting.key(data)}, losses and right"

    def outcomes(subsets: np.ndarray, asked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Losses and rightness [S, 1, q] of the queries that are asked."""
        both = retrain(
            lambda indices, seeds: query_outcomes(setting, data, indices, seeds),
            subsets,
            1,
            folder,
            name=name,
            batch=setting.side_by_side,
            progress=True,
        )
        return both[..., asked], both[..., len(data.queries) + asked]

    losses, right = outcomes(np.ones((1, count), bool), np.arange(len(data.queries)))
    if images:  # only what is answered rightly can be answered wrongly for a lack of examples
        asked = np.argsort(-right[0, 0], kind="stable")[: setting.asked]
    else:
        asked = np.linspace(0, len(data.queries) - 1, setting.asked).astype(int)
    chosen = _compared(setting, found)
    places = torch.from_numpy(asked)
    rankings = [one.scores[places].argsort(dim=1, descending=True).numpy() for one in chosen]
    rows = []
    for k in setting.removed:
        kept = np.concatenate([without_top(ranking, count, k) for ranking in rankings])
        after = [part.reshape(len(chosen), len(asked), 1, -1) for part in outcomes(kept, asked)]
        ours = after[0][[one.method for one in chosen].index("eigenbasis")]  # [q, 1, q]
        for one, their_losses, their_right in zip(chosen, *after, strict=True):
            change = brittleness(losses[0][:, asked], their_losses)
            less = brittleness(their_losses[:, 0].diagonal()[None], ours)
            row = {
                "method": one.method,
                "k": k,
                "loss": change.value,
                "low": change.low,
                "high": change.high,
                "eigenbasis less it": less.value,
                "less low": less.low,
                "less high": less.high,
            }
            if images:
                row["flipped"] = -brittleness(right[0][:, asked], their_right).value
            rows.append(row)
    rows.sort(key=lambda row: [one.method for one in chosen].index(row["method"]))
    print(table(rows))
    print(f"change of the loss of {len(asked)} queries, one model each")
    return _record(setting, "brittleness", {"queries": len(asked), "seeds": 1}, rows)


def _compared(setting: Setting, found: Sequence[Found]) -> list[Found]:
    """One of each kind: eigenbasis rows of the middle size, the largest of the others."""
    rank = setting.ranks[-1]
    names = (
        FULL, "eigenbasis", f"random, raw, rank {rank}", "gradient dot",
        "representation similarity", "BM25", "random scores",
    )  # fmt: skip
    return [
        one
        for one in found
        if one.method in names and (one.method != "eigenbasis" or one.dim == setting.coordinates[1])
    ]


def mislabelled_part(subject: Subject) -> Record:
    """Whether flipped labels have the largest self-influence, under the model they taught."""
    setting, data = subject.setting, subject.data
    generator = np.random.default_rng(0)
    flipped = np.zeros(len(data.y), bool)
    flipped[generator.permutation(len(data.y))[: round(FLIPPED * len(data.y))]] = True
    classes = int(data.y.max()) + 1
    moved = torch.from_numpy(generator.integers(1, classes, len(data.y))).to(data.y.device)
    wrong = torch.from_numpy(flipped).to(data.y.device)
    noisy = dataclasses.replace(data, y=torch.where(wrong, (data.y + moved) % classes, data.y))
    rows = Rows("eigenbasis", "diagonal", "eigen", coordinates=setting.coordinates[1])
    with tempfile.TemporaryDirectory() as folder:
        run = rows.logged(Subject(setting, noisy, trained_model(setting, noisy)), folder)
        auc = mislabelled_auc(run.attributor().self_influence(), flipped)
    print(f"AUC of self-influence for {FLIPPED:.0%} flipped labels, {rows}: {auc:.3f}")
    params = {"flipped": FLIPPED}
    return _record(setting, "mislabelled", params, [{"method": str(rows), "AUC": auc}])


def _record(setting: Setting, part: str, params: Record, rows: list[Record]) -> Record:
    return {
        "bench": "accuracy",
        "case": f"{part}, {setting.title}",
        "params": {"part": part, "setting": setting.name, **params},
        "methods": rows,
    }
