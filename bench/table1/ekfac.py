"""kronfluence's side: fitting the factors, and pairwise scores from them.

The labels are the data's, not sampled ones (use_empirical_fisher), as in LoGra's curvature; this
spares EKFAC the sampling. The damping is 0.1 of the mean eigenvalue, as LoGra's is.
"""

import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from bench.harness.memory import PeakMemory, folder_bytes
from bench.harness.models import summed_loss
from bench.table1.setting import DTYPES, Setting

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


def now(device: str) -> float:
    """Seconds, after the device has done what it was told to do."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextmanager
def timed(module: Any, name: str, device: str) -> Iterator[list[float]]:
    """Inside, calls of module.name are timed: the list grows by their seconds."""
    seconds: list[float] = []
    function = getattr(module, name)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        start = now(device)
        try:
            return function(*args, **kwargs)
        finally:
            seconds.append(now(device) - start)

    with patch.object(module, name, wrapper):
        yield seconds


def analyzer_of(setting: Setting, folder: Path) -> Any:
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
            return setting.modules

        def get_attention_mask(self, batch: Tensor) -> None:
            return None

    warnings.filterwarnings("ignore", category=FutureWarning)  # it calls what torch has renamed
    task = SummedLoss()
    return Analyzer(
        analysis_name="table1",
        model=prepare_model(setting.load(), task),
        task=task,
        cpu=torch.device(setting.device).type == "cpu",
        log_level=logging.ERROR,
        disable_tqdm=True,
        output_dir=str(folder),
    )


def fit(
    setting: Setting, folder: Path, name: str, batch: int, amp: str | None, strategy: str = "ekfac"
) -> dict[str, Any]:
    """The factors: covariances, their eigenvectors, the corrected eigenvalues. amp: a dtype."""
    from kronfluence.arguments import FactorArguments

    analyzer = analyzer_of(setting, folder)
    arguments = FactorArguments(strategy=strategy, use_empirical_fisher=True)
    if amp:  # what kronfluence's smart_low_precision_factor_arguments sets
        dtype = DTYPES[amp]
        arguments.amp_dtype = arguments.activation_covariance_dtype = dtype
        arguments.gradient_covariance_dtype = arguments.per_sample_gradient_dtype = dtype
    common = {"factors_name": name, "factor_args": arguments}
    data = {"dataset": Windows(setting.train), "per_device_batch_size": batch}
    memory = PeakMemory(setting.device)
    with timed(analyzer, "perform_eigendecomposition", setting.device) as once:
        start = now(setting.device)
        analyzer.fit_covariance_matrices(**common, **data)
        analyzer.perform_eigendecomposition(**common)
        analyzer.fit_lambda_matrices(**common, **data)
        whole_s = now(setting.device) - start
    return {
        "tokens_per_s": setting.train.numel() / (whole_s - once[0]),
        "once_s": once[0],
        "memory_bytes": memory.stop(),
        "storage_bytes": folder_bytes(analyzer.factors_output_dir(factors_name=name)),
    }


def score(
    setting: Setting, folder: Path, name: str, train_batch: int, test_batch: int, amp: str | None
) -> dict[str, Any]:
    """Scores of all training examples for `test_batch` queries, in one pass over the examples.

    name: of the factors. Raises RuntimeError if kronfluence made more than one pass.
    """
    from kronfluence.arguments import ScoreArguments
    from kronfluence.computer import score_computer
    from kronfluence.score import pairwise

    analyzer = analyzer_of(setting, folder)
    query_batch = min(test_batch, QUERY_BATCH)
    arguments = ScoreArguments(
        damping_factor=None, query_gradient_accumulation_steps=-(-test_batch // query_batch)
    )
    if amp:  # what kronfluence's smart_low_precision_score_arguments sets
        arguments.amp_dtype = arguments.score_dtype = DTYPES[amp]
        arguments.per_sample_gradient_dtype = DTYPES[amp]

    def run(queries: Tensor, train: Tensor) -> None:
        analyzer.compute_pairwise_scores(
            scores_name="scores",
            factors_name=name,
            query_dataset=Windows(queries),
            train_dataset=Windows(train),
            per_device_query_batch_size=query_batch,
            per_device_train_batch_size=train_batch,
            score_args=arguments,
            overwrite_output_dir=True,
        )

    run(setting.queries[:1], setting.train[:train_batch])  # what is set up once is not timed
    memory = PeakMemory(setting.device)
    with (
        timed(score_computer, "compute_pairwise_scores_with_loaders", setting.device) as whole,
        timed(pairwise, "compute_dot_products_with_loader", setting.device) as train_side,
    ):
        run(setting.queries[:test_batch], setting.train)
    scores = analyzer.load_pairwise_scores(scores_name="scores")["all_modules"]
    expected = (test_batch, setting.num_train)
    if len(train_side) != 1 or scores.shape != expected:
        raise RuntimeError(
            f"kronfluence: expected one pass and scores {expected}, got {len(train_side)} passes"
            f" and {tuple(scores.shape)}"
        )
    return {
        "train_s": train_side[0],
        "query_s": whole[0] - train_side[0],
        "num_train": setting.num_train,
        "memory_bytes": memory.stop(),
        "scores": scores.float(),
    }
