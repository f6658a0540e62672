"""Are the values right? LDS of every method by retraining: an MLP on Fashion-MNIST.

The model is retrained on random halves of its 5,000 training images, three times each; a method's
LDS says how well its sums of scores rank those models by the losses of 200 test images. Retrained
models are kept in --folder, so that a run goes on after a kill. Halves are trained side by side,
fifty at a time.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.accuracy import mlp
from bench.accuracy.methods import METHODS, Method
from bench.harness import results
from bench.harness.cases import options, prepare
from bench.harness.tables import table
from logra_kernels.evaluation import half_subsets, lds, mislabelled_auc, retrain

SIDE_BY_SIDE = 50
FLIPPED = 0.1  # of the labels, for the AUC of self-influence


def main() -> int:
    parser = options(__doc__, "quick", "threads", "json")
    parser.add_argument(
        "--folder", type=Path, default=results.ROOT / "build" / "accuracy", help="of the models"
    )
    args = parser.parse_args()
    prepare(args.threads)
    halves, seeds = (40, 1) if args.quick else (100, 3)
    data = mlp.load()
    subsets = half_subsets(len(data.x), halves)
    losses = retrain(
        lambda indices, each: mlp.query_losses(data, indices, each),
        subsets,
        seeds,
        args.folder,
        name=mlp.NAME,
        batch=SIDE_BY_SIDE,
        progress=True,
    )
    model = mlp.model_of(data)
    rows = []
    for method in METHODS[:: 3 if args.quick else 1]:
        print(f"  {method.label} …", flush=True)
        rows.append(_row(method, model, data, subsets, losses))
    best = rows[0]["LDS"]  # full EKFAC's
    for row in rows:
        row["of EKFAC's"] = row["LDS"] / best
    ceiling = lds(np.zeros((len(data.queries), len(data.x))), subsets, losses, resamples=0).ceiling
    print(table(rows))
    told = "one seed" if ceiling is None else f"ceiling by the seeds' noise {ceiling:.2f}"
    print(f"{halves} halves, {seeds} seeds each; {told}")
    auc = flipped_auc(data)
    print(f"AUC of self-influence for {FLIPPED:.0%} flipped labels, eigenbasis rows: {auc:.3f}")
    if args.json:
        results.append(
            "accuracy",
            {
                "bench": "accuracy",
                "case": "mlp on Fashion-MNIST",
                "params": {"halves": halves, "seeds": seeds, "ceiling": ceiling, "auc": auc},
                "methods": rows,
            },
        )
    return 0


def _row(
    method: Method,
    model: torch.nn.Module,
    data: mlp.Data,
    subsets: np.ndarray,
    losses: np.ndarray,
) -> dict[str, Any]:
    scores, dim, size = method.scores(model, data)
    found = lds(scores, subsets, losses)
    return {
        "method": method.label,
        "D": dim,
        "bytes a row": size,
        "LDS": found.value,
        "low": found.low,
        "high": found.high,
    }


def flipped_auc(data: mlp.Data) -> float:
    """Whether mislabelled examples have the largest self-influence, under the model they taught."""
    generator = np.random.default_rng(0)
    flipped = np.zeros(len(data.y), bool)
    flipped[generator.permutation(len(data.y))[: round(FLIPPED * len(data.y))]] = True
    moved = torch.from_numpy(generator.integers(1, 10, len(data.y)))
    y = torch.where(torch.from_numpy(flipped), (data.y + moved) % 10, data.y)
    noisy = mlp.Data(data.x, y, data.queries, data.answers)
    method = Method("eigenbasis", "diagonal", coordinates=min(8192, 20 * len(y)))
    with tempfile.TemporaryDirectory() as folder:
        run = method.logged(mlp.model_of(noisy), noisy, folder)
        return mislabelled_auc(run.attributor().self_influence(), flipped)


if __name__ == "__main__":
    raise SystemExit(main())
