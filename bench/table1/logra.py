"""Our side: logging into a store, and scans of it."""

import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import logra_kernels
from bench.harness.memory import PeakMemory, folder_bytes
from bench.harness.models import summed_loss
from bench.table1.ekfac import now
from bench.table1.setting import Setting
from logra_kernels.attribution import Attributor
from logra_kernels.curvature import RawCurvature
from logra_kernels.run import Run
from logra_kernels.store import Store, StoreWriter


def watched_run(
    setting: Setting, store: Path, rank: int | None, dtype: str = "float16"
) -> tuple[Run, nn.Module]:
    """A run that watches the setting's modules; rank None leaves the projection to the store."""
    model = setting.load()
    run = logra_kernels.init(project=store.name, root_dir=str(store.parent), dtype=dtype)
    run.watch(model, name_filter=setting.modules)
    if rank is not None:
        run.add_lora(rank=rank)
    found = [module.name for module in run.modules]
    if sorted(found) != sorted(setting.modules):
        raise RuntimeError(f"modules: expected {setting.modules}, got {found}")
    return run, model


def log(
    setting: Setting, path: Path, rank: int, batch: int, dtype: str = "float16"
) -> dict[str, Any]:
    """One pass over the training examples: rows and the raw curvature, into a finished store."""
    run, model = watched_run(setting, path, rank, dtype)
    tokens = setting.train.to(setting.device)
    rows_of_queries(run, model, tokens[:1], 1)  # the first pass sets things up; it is not stored
    run.setup({"save": "grad", "statistic": "raw"})
    memory = PeakMemory(setting.device)
    start = now(setting.device)
    for first in range(0, len(tokens), batch):
        part = tokens[first : first + batch]
        with run(data_id=list(range(first, first + len(part)))):
            summed_loss(model, part).backward()
    run.finalize()
    taken_s = now(setting.device) - start
    return {
        "tokens_per_s": tokens.numel() / taken_s,
        "memory_bytes": memory.stop(),
        "storage_bytes": folder_bytes(run.path),
    }


def enlarge(path: Path, large: Path, num_bytes: int) -> int:
    """Write the store's rows several times into a copy, until it is as large; how many rows it has.

    So that a scan meets rows that are not in the CPU's caches, without hours of logging.
    """
    store = Store.open(path)
    copies = -(-num_bytes // (store.dim * np.dtype(store.dtype).itemsize * store.num_rows))
    with StoreWriter.create(
        large,
        modules=store.modules,
        dtype=store.dtype,
        projection=store.projection,
        fingerprints=store.fingerprints,
    ) as writer:
        if store.module_exponents is not None:
            writer.set_module_exponents(store.module_exponents)
        for copy in range(copies):
            for first, rows, row_scale, own in store.blocks(1024):
                ids = [f"{copy}:{first + index}" for index in range(len(rows))]
                scale = None if store.dtype == "float32" else row_scale
                writer.append(ids, rows, scale, row_exponents=own)
    return copies * store.num_rows


def query(
    setting: Setting, path: Path, large: Path, test_batch: int, query_batch: int, rounds: int
) -> dict[str, Any]:
    """Scores of all rows of the large store for `test_batch` queries, `query_batch` at a time."""
    run, model = watched_run(setting, path, None)
    run.initialize_from_log()
    tokens = setting.queries[:test_batch].to(setting.device)
    rows_of_queries(run, model, tokens[:1], 1)
    memory = PeakMemory(setting.device)
    times = [now(setting.device)]
    queries = rows_of_queries(run, model, tokens, query_batch)  # [Q, D]
    times.append(now(setting.device))
    store = Store.open(path)
    known = Attributor(store, RawCurvature.load(store), device=setting.device)
    times.append(now(setting.device))
    ready = known.precondition(queries)
    times.append(now(setting.device))

    scan = Attributor(large, "none", device=setting.device)
    result = scan.scores(ready, "dot").scores
    assert result is not None
    check_scores(known, queries, result)
    del result
    train_s = []
    for _ in range(rounds):
        start = now(setting.device)
        scan.scores(ready, "dot")
        train_s.append(now(setting.device) - start)
    return {
        "train_s": statistics.median(train_s),
        "query_s": times[1] - times[0] + times[3] - times[2],
        "once_s": times[2] - times[1],  # the factorisation
        "num_train": scan.store.num_rows,
        "block_rows": scan.block_rows,
        "memory_bytes": memory.stop(),
    }


def rows_of_queries(run: Run, model: nn.Module, tokens: Tensor, batch: int) -> Tensor:
    """[Q, D]: each query's row, as a user's code would log it; nothing is stored."""
    run.eval()
    rows = []
    for first in range(0, len(tokens), batch):
        part = tokens[first : first + batch]
        with run(data_id=list(range(first, first + len(part)))):
            summed_loss(model, part).backward()
        rows.append(run.last_rows()[1])
    return torch.cat(rows).float().cpu()


def check_scores(known: Attributor, queries: Tensor, result: Tensor) -> None:
    """Check that the timed scores repeat those of the store itself, by the public call.

    Raises: RuntimeError if not.
    """
    wanted = known.scores(queries, "dot").scores  # [Q, N]
    assert wanted is not None
    largest = max(
        float((copies.unflatten(0, (-1, len(one))) - one).abs().max())  # [copies, N] - [N]
        for copies, one in zip(result, wanted, strict=True)
    )
    error = largest / float(wanted.abs().max())
    # each of D products has an error of 2**-24: the preconditioned queries are rounded to float32
    if not error <= 1e-5:
        raise RuntimeError(f"scan: off by {error:.1e} of the largest score")
