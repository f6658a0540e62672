"""Our side: logging into a store, and scans of it."""

from __future__ import annotations

import shutil
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import logra_kernels
from bench.harness.memory import PeakMemory, folder_bytes, now
from bench.harness.models import summed_loss
from bench.table1.setting import Setting
from logra_kernels.attribution import Attributor
from logra_kernels.curvature import RawCurvature
from logra_kernels.run import Run
from logra_kernels.store import Store, StoreWriter


def watched_run(
    setting: Setting, folder: Path, project: str, rank: int | None, dtype: str = "float16"
) -> tuple[Run, nn.Module]:
    """A run that watches the setting's modules; rank None leaves the projection to the store."""
    model = setting.load()
    run = logra_kernels.init(project=project, root_dir=str(folder), dtype=dtype)
    run.watch(model, name_filter=setting.modules)
    if rank is not None:
        run.add_lora(rank=rank)
    found = [module.name for module in run.modules]
    if sorted(found) != sorted(setting.modules):
        raise RuntimeError(f"modules: expected {setting.modules}, got {found}")
    return run, model


def log(setting: Setting, folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """One pass over the training examples: rows and the raw curvature, into a finished store.

    options: batch, rank, project, dtype (of the store).
    """
    dtype = options.get("dtype", "float16")
    project = options["project"]
    shutil.rmtree(folder / project, ignore_errors=True)
    run, model = watched_run(setting, folder, project, options["rank"], dtype)
    tokens = setting.train.to(setting.device)
    rows_of_queries(run, model, tokens[:1], 1)  # the first pass sets things up; it is not stored
    run.setup({"save": "grad", "statistic": "raw"})
    memory = PeakMemory(setting.device)
    start = now(setting.device)
    for first in range(0, len(tokens), options["batch"]):
        batch = tokens[first : first + options["batch"]]
        with run(data_id=list(range(first, first + len(batch)))):
            summed_loss(model, batch).backward()
    run.finalize()
    log_s = now(setting.device) - start
    store = Store.open(run.path)
    rows_bytes = sum(folder_bytes(file) for file in run.path.glob("shard-*"))
    return {
        "log_s": log_s,
        "tokens": tokens.numel(),
        "memory": memory.stop(),
        "dim": store.dim,
        "storage_bytes": folder_bytes(run.path),
        "rows_bytes": rows_bytes,  # they grow with N; the curvature and the projection do not
    }


def enlarge(setting: Setting, folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Write the store's rows several times into a copy, until it is as large as asked.

    So that a scan meets rows that are not in the CPU's caches, without hours of logging.

    options: project, large (the copy's name), num_bytes.
    """
    store = Store.open(folder / options["project"])
    shutil.rmtree(folder / options["large"], ignore_errors=True)
    row_bytes = store.dim * np.dtype(store.dtype).itemsize
    copies = max(1, -(-options["num_bytes"] // (row_bytes * store.num_rows)))
    names = store.ids.to_pylist()
    with StoreWriter.create(
        folder / options["large"],
        modules=store.modules,
        dtype=store.dtype,
        projection=store.projection,
        fingerprints=store.fingerprints,
    ) as writer:
        if store.module_exponents is not None:
            writer.set_module_exponents(store.module_exponents)
        for copy in range(copies):
            for first_row, rows, row_scale, own in store.blocks(1024):
                ids = [f"{copy}:{name}" for name in names[first_row : first_row + len(rows)]]
                scale = None if store.dtype == "float32" else row_scale
                writer.append(ids, rows, scale, row_exponents=own)
    return {"rows": copies * store.num_rows, "num_bytes": copies * store.num_rows * row_bytes}


def query(setting: Setting, folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Scores of all rows of the large store for `test_batch` queries.

    options: project, large, rank, train_batch (rows at a time; None: the package's choice),
    test_batch, query_batch (queries differentiated at a time), repeats.
    """
    model_run, model = watched_run(setting, folder, options["project"], None)
    model_run.initialize_from_log()
    num_queries = options["test_batch"]
    tokens = setting.queries[:num_queries].to(setting.device)
    rows_of_queries(model_run, model, tokens[:1], 1)
    memory = PeakMemory(setting.device)
    start = now(setting.device)
    queries = rows_of_queries(model_run, model, tokens, options["query_batch"])  # [Q, D]
    query_s = now(setting.device) - start

    small = Store.open(folder / options["project"])
    large = Store.open(folder / options["large"])
    start = now(setting.device)
    with torch.no_grad():
        curvature = RawCurvature.load(small)
        known = Attributor(small, curvature, device=setting.device)
    factorise_s = now(setting.device) - start
    start = now(setting.device)
    ready = known.precondition(queries)
    precondition_s = now(setting.device) - start

    block_rows = options.get("train_batch")
    scan = Attributor(large, "none", device=setting.device, block_rows=block_rows)
    result = scan.scores(ready, "dot").scores
    assert result is not None
    check_scores(known, queries, result)
    del result
    times = []
    for _ in range(options["repeats"]):
        start = now(setting.device)
        scan.scores(ready, "dot")
        times.append(now(setting.device) - start)
    measured: dict[str, Any] = {
        "train_s": statistics.median(times),
        "train_times_s": times,
        "query_s": query_s + precondition_s,
        "precondition_s": precondition_s,
        "factorise_s": factorise_s,
        "num_train": large.num_rows,
        "num_queries": num_queries,
        "block_rows": scan.block_rows,
        "memory": memory.stop(),
    }
    return measured


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
