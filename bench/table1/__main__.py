r"""The paper's Table 1 on this machine: EKFAC (kronfluence) against LoGra (this package).

Run by the interpreter of `make peers-env`, as `python -m bench table1` does; without kronfluence it
has our rows only. Both are given the same model, modules, windows of tokens, device, threads and
dtype. Every step runs in a process of its own, whose peak memory above the loaded model is
reported. EKFAC has no store: it computes the training gradients again for every batch of queries;
that is its pairs/s. with_queries adds the time of the queries' gradients, over 10^6 examples: the
training side is as long as the examples are many, for either system; the queries' is not.

By default a small Llama over bytes with random weights is measured, whose speed is that of a
trained one. The paper's setting, on a GPU that has the memory:

    python -m bench.table1 --device cuda --dtype bfloat16 --model LLAMA3_8B --text corpus.jsonl \\
        --length 512 --ranks 64 --ekfac 4x4 --logra 4 256

An EKFAC row is written TRAINxTEST, the examples at a time and the queries of one pass over them,
with :bf16 for kronfluence's mixed precision ("16x256:bf16").
"""

import argparse
import importlib.util
import re
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from bench.harness import results
from bench.harness.cases import options, prepare
from bench.harness.tables import table
from bench.table1 import check, ekfac, logra
from bench.table1.setting import DTYPES, Setting, module_names, random_llama, windows

TARGET = 6500
CORPUS = 1_000_000  # examples of the column with_queries
LOG_BATCHES = (1, 8)
EKFAC, LOGRA = "EKFAC", "LoGra"

Row = dict[str, Any]


def step(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns, called in a process of its own."""
    print(f"  {function.__module__.rpartition('.')[2]}.{function.__name__} …", flush=True)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def ekfac_row(text: str) -> tuple[int, int, str | None]:
    """Training batch, test batch and precision, from a text such as "16x256:bf16"."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)(:bf16)?", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"expected TRAINxTEST or TRAINxTEST:bf16, got {text!r}")
    return int(found[1]), int(found[2]), "bfloat16" if found[3] else None


def pairs(found: Row, test_batch: int) -> Row:
    """All training examples times all queries, over the time of the training side; and with it."""
    train_s = found["train_s"] * CORPUS / found["num_train"]
    return {
        "pairs_per_s": found["num_train"] * test_batch / found["train_s"],
        "with_queries": CORPUS * test_batch / (train_s + found["query_s"]),
        "query_s": found["query_s"],
        "memory_mib": found["memory_bytes"] / 2**20,
    }


def logging_row(system: str, variant: str, batch: int, found: Row) -> Row:
    return {
        "system": system,
        "variant": variant,
        "batch": batch,
        "tokens_per_s": found["tokens_per_s"],
        "memory_mib": found["memory_bytes"] / 2**20,
        "storage_mib": found["storage_bytes"] / 2**20,
        "once_s": found.get("once_s"),
    }


def ratios(rows: list[Row]) -> dict[str, float]:
    """Pairs/s of LoGra at its smallest rank over EKFAC's; {} without EKFAC.

    "largest over smallest batch" sets LoGra's largest test batch against EKFAC's smallest; "best
    over best" the best row of each against the other, and is the strictest.
    """
    theirs = [row for row in rows if row["system"] == EKFAC]
    ours = [row for row in rows if row["system"] == LOGRA]
    if not theirs or not ours:
        return {}
    ours = [row for row in ours if row["variant"] == ours[0]["variant"]]

    def best(some: list[Row], column: str) -> float:
        return float(max(row[column] for row in some))

    smallest = min(theirs, key=lambda row: (row["test_batch"], row["train_batch"]))
    largest = max(ours, key=lambda row: row["test_batch"])
    columns = {"best over best": "pairs_per_s", "best over best, with queries": "with_queries"}
    return {
        "largest over smallest batch": largest["pairs_per_s"] / smallest["pairs_per_s"],
        **{name: best(ours, column) / best(theirs, column) for name, column in columns.items()},
    }


def of_ekfac(setting: Setting, args: argparse.Namespace, work: Path) -> Iterator[tuple[str, Row]]:
    """("logging" or "influence", a row of EKFAC's) of everything that is measured."""
    for name, amp in (("fp32", None), ("bf16", "bfloat16"))[: 1 if args.quick else 2]:
        found = step(ekfac.fit, setting, work, name, 8, amp)
        yield "logging", logging_row(EKFAC, name, 8, found)
    for train_batch, test_batch, amp in args.ekfac:
        found = step(ekfac.score, setting, work, "fp32", train_batch, test_batch, amp)
        row = {"system": EKFAC, "variant": "bf16" if amp else "fp32", "train_batch": train_batch}
        yield "influence", {**row, "test_batch": test_batch, **pairs(found, test_batch)}


def of_logra(setting: Setting, args: argparse.Namespace, work: Path) -> Iterator[tuple[str, Row]]:
    """The same of LoGra's."""
    for rank in args.ranks:
        variant, large = f"rank {rank}", work / f"rank-{rank}-large"
        for batch in LOG_BATCHES:
            store = work / f"rank-{rank}-batch-{batch}"
            found = step(logra.log, setting, store, rank, batch)
            yield "logging", logging_row(LOGRA, variant, batch, found)
        logra.enlarge(store, large, (64 if args.quick else 512) << 20)
        for test_batch in args.logra:
            found = step(logra.query, setting, store, large, test_batch, batch, args.rounds or 7)
            row = {"system": LOGRA, "variant": variant, "train_batch": found["block_rows"]}
            yield "influence", {**row, "test_batch": test_batch, **pairs(found, test_batch)}


def run(args: argparse.Namespace, work: Path) -> None:
    """Check both systems, measure them, and print the table."""
    sides = [of_ekfac, of_logra] if importlib.util.find_spec("kronfluence") else [of_logra]
    tiny = step(check.tiny, work / "tiny", *((64, 8, 100) if args.quick else (256, 8, 300)))
    theirs = step(check.their_scores, tiny, work / "tiny") if of_ekfac in sides else None
    checked = check.compare(step(check.our_scores, tiny, work / "tiny"), theirs)
    sizes = {"width": 128, "inner": 352, "blocks": 2}
    sizes = sizes if args.quick else {"width": 384, "inner": 1024, "blocks": 4}
    folder = work / "llama-{width}-{inner}-{blocks}".format(**sizes)
    model = args.model or random_llama(folder, **sizes)
    count = args.num_train + max([row[1] for row in args.ekfac] + args.logra)
    tokens = windows(args.text, model, count, args.length)
    setting = Setting(
        *(model, tokens, args.num_train, module_names(model), args.device, args.dtype),
        threads=torch.get_num_threads(),
    )
    found: dict[str, list[Row]] = {"logging": [], "influence": []}
    for side in sides:
        for kind, row in side(setting, args, work):
            found[kind].append(row)
    record = {"case": setting.title, "check": checked, **found}
    record["ratios"] = ratios(found["influence"])
    print(show(record))
    if args.json:
        results.append("table1", record)


def show(record: Row) -> str:
    """The tables as they are printed."""
    lines = [record["case"], "", *(f"  {n}: {value:.2g}" for n, value in record["check"].items())]
    lines += ["", table(record["logging"]), "", table(record["influence"]), ""]
    if not record["ratios"]:
        lines.append("EKFAC is left out: kronfluence is not installed (make peers-env)")
    for name, value in record["ratios"].items():
        verdict = "" if value >= TARGET else f", below the target of {TARGET:,}"
        lines.append(f"LoGra's pairs/s over EKFAC's, {name}: {value:,.0f}{verdict}")
    return "\n".join(lines)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line's options, completed."""
    known = options(__doc__)
    known.add_argument("--model", type=Path, help="a Hugging Face folder")
    known.add_argument("--text", type=Path, help=".txt, .jsonl (default: the Python reference)")
    known.add_argument("--device", default="cpu", help="as torch names it")
    known.add_argument("--dtype", default="float32", choices=sorted(DTYPES), help="of the model")
    known.add_argument("--num-train", type=int, help="training examples")
    known.add_argument("--length", type=int, help="tokens of an example")
    known.add_argument("--ranks", type=int, nargs="+", help="LoGra's ranks")
    known.add_argument("--ekfac", type=ekfac_row, nargs="+", metavar="ROW", help="EKFAC's rows")
    known.add_argument("--logra", type=int, nargs="+", metavar="TEST", help="LoGra's queries")
    args = known.parse_args(argv)
    rows = ["4x4", "16x16"] if args.quick else ["4x4", "16x64", "16x256", "16x256:bf16"]
    defaults = {
        "num_train": 32 if args.quick else 64,
        "length": 32 if args.quick else 128,
        "ranks": [16] if args.quick else [16, 32],
        "ekfac": [ekfac_row(row) for row in rows],
        "logra": [4, 16] if args.quick else [4, 64, 256],
    }
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    prepare(args.threads)
    with tempfile.TemporaryDirectory(prefix="logra-table1-") as folder:
        run(args, Path(folder))


if __name__ == "__main__":
    main()
