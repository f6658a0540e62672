"""kronfluence's side: fitting the factors, and pairwise scores from them.

The labels are the data's, not sampled ones (use_empirical_fisher), as in LoGra's curvature; this
spares EKFAC the sampling. The damping is 0.1 of the mean eigenvalue, as LoGra's is.
"""

from __future__ import annotations

import itertools
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from bench.harness.memory import PeakMemory, folder_bytes, now, timed
from bench.harness.models import summed_loss
from bench.table1.setting import DTYPES, Setting

NAME = "table1"
# Queries that are differentiated at a time. More would only take memory for whole gradients.
QUERY_BATCH = 16


class Windows(Dataset[Tensor]):
    """[N, T] tokens as kronfluence reads them."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> Tensor:
        return self.tokens[index]


def analyzer_of(setting: Setting, folder: Path, modules: list[str]) -> Any:
    """kronfluence's Analyzer of the model, silent, with the summed loss."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.task import Task

    class SummedLoss(Task):
        def compute_train_loss(
            self, batch: Tensor, model: nn.Module, sample: bool = False
        ) -> Tensor:
            if sample:
                raise NotImplementedError("only the data's own labels are used")
            return summed_loss(model, batch)

        def compute_measurement(self, batch: Tensor, model: nn.Module) -> Tensor:
            return summed_loss(model, batch)

        def get_influence_tracked_modules(self) -> list[str]:
            return modules

        def get_attention_mask(self, batch: Tensor) -> None:
            return None

    task = SummedLoss()
    model = prepare_model(setting.load(), task)
    return Analyzer(
        analysis_name=NAME,
        model=model,
        task=task,
        cpu=torch.device(setting.device).type == "cpu",
        log_level=logging.ERROR,
        disable_tqdm=True,
        output_dir=str(folder),
    )


def fit(setting: Setting, folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """The factors: covariances, their eigenvectors, the corrected eigenvalues.

    options: batch, strategy ("ekfac" or "identity"), amp (None or a dtype's name).
    """
    analyzer = analyzer_of(setting, folder, setting.modules)
    factor_args = _factor_args(options)
    data = Windows(setting.train)
    memory = PeakMemory(setting.device)
    times = [now(setting.device)]
    common = {"factors_name": options["name"], "factor_args": factor_args}
    batch = {"dataset": data, "per_device_batch_size": options["batch"]}
    analyzer.fit_covariance_matrices(**common, **batch)
    times.append(now(setting.device))
    analyzer.perform_eigendecomposition(**common)
    times.append(now(setting.device))
    analyzer.fit_lambda_matrices(**common, **batch)
    times.append(now(setting.device))
    covariance_s, eigen_s, lambda_s = (b - a for a, b in itertools.pairwise(times))
    stored = analyzer.factors_output_dir(factors_name=options["name"])
    # Scoring reads these; a user could remove the covariances by hand.
    needed = [f for f in stored.glob("*.safetensors") if "covariance" not in f.name]
    return {
        "covariance_s": covariance_s,
        "eigendecomposition_s": eigen_s,
        "lambda_s": lambda_s,
        "tokens": setting.train.numel(),
        "memory": memory.stop(),
        "storage_bytes": folder_bytes(stored),
        "storage_needed_bytes": sum(map(folder_bytes, needed)),
    }


def score(setting: Setting, folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Scores of all training examples for `test_batch` queries, in one pass over the examples.

    options: train_batch, test_batch, low_rank (None or the rank), amp, name (of the factors), save
    (a path for the scores, or None).
    """
    from kronfluence.arguments import ScoreArguments
    from kronfluence.computer import score_computer
    from kronfluence.score import pairwise

    analyzer = analyzer_of(setting, folder, setting.modules)
    num_queries = options["test_batch"]
    query_batch = min(num_queries, QUERY_BATCH)
    score_args = ScoreArguments(
        damping_factor=None,
        query_gradient_low_rank=options.get("low_rank"),
        query_gradient_accumulation_steps=-(-num_queries // query_batch),
    )
    if options.get("amp"):
        # what kronfluence's smart_low_precision_score_arguments sets
        dtype = DTYPES[options["amp"]]
        score_args.amp_dtype = score_args.score_dtype = dtype
        score_args.per_sample_gradient_dtype = dtype

    def run(name: str, queries: Tensor, train: Tensor) -> None:
        analyzer.compute_pairwise_scores(
            scores_name=name,
            factors_name=options["name"],
            query_dataset=Windows(queries),
            train_dataset=Windows(train),
            per_device_query_batch_size=query_batch,
            per_device_train_batch_size=options["train_batch"],
            score_args=score_args,
            overwrite_output_dir=True,
        )

    run("warm-up", setting.queries[:1], setting.train[: options["train_batch"]])
    name = f"scores_{options['train_batch']}_{num_queries}"
    memory = PeakMemory(setting.device)
    with (
        timed(score_computer, "compute_pairwise_scores_with_loaders", setting.device) as whole,
        timed(pairwise, "compute_dot_products_with_loader", setting.device) as train_side,
    ):
        start = now(setting.device)
        run(name, setting.queries[:num_queries], setting.train)
        wall_s = now(setting.device) - start
    peak = memory.stop()
    scores = analyzer.load_pairwise_scores(scores_name=name)["all_modules"]
    expected = (num_queries, setting.num_train)
    if len(train_side) != 1 or scores.shape != expected:
        raise RuntimeError(
            f"kronfluence: expected one pass and scores {expected}, got {len(train_side)} passes"
            f" and {tuple(scores.shape)}"
        )
    if options.get("save"):
        torch.save(scores.float(), options["save"])
    return {
        "train_s": train_side[0],
        "query_s": whole[0] - train_side[0],
        "wall_s": wall_s,  # includes reading factors and writing scores
        "num_train": setting.num_train,
        "num_queries": num_queries,
        "memory": peak,
    }


def _factor_args(options: dict[str, Any]) -> Any:
    from kronfluence.arguments import FactorArguments

    args = FactorArguments(strategy=options["strategy"], use_empirical_fisher=True)
    if options.get("amp"):
        # what kronfluence's smart_low_precision_factor_arguments sets
        dtype = DTYPES[options["amp"]]
        args.amp_dtype = args.activation_covariance_dtype = dtype
        args.gradient_covariance_dtype = args.per_sample_gradient_dtype = dtype
    return args
