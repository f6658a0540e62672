"""`logra query`: a store's passages, ranked for an answer."""

import argparse
import sys
from pathlib import Path

from logra_kernels.defaults import RANKING_MODE
from logra_kernels.lm.corpus import Record
from logra_kernels.report import write_report, write_results
from logra_kernels.report.render import snippet
from logra_kernels.report.terminal import print_query
from logra_kernels.store import Store


def run(arguments: argparse.Namespace) -> int:
    """Rank, print, and write what was asked for."""
    from logra_kernels.lm.causal_lm import CausalLM
    from logra_kernels.lm.gradients import lm_fingerprints
    from logra_kernels.lm.query import ask, chat_prompt

    records = _records(arguments)
    _check_outputs(arguments)
    store = Store.open(arguments.store)
    dtype = lm_fingerprints(store)["model"]["dtype"]
    _check_rows(store, arguments)
    lm = CausalLM.load(arguments.model, dtype=dtype, device=arguments.device)
    asked = records
    if arguments.chat:
        asked = [Record(r.id, r.text, chat_prompt(lm, r.prompt)) for r in records]
    results = ask(
        store,
        lm,
        asked,
        modes=list(dict.fromkeys(arguments.mode or [RANKING_MODE])),
        top_k=arguments.top_k,
        damping_scale=arguments.damping_scale,
        damping=arguments.damping,
        token_scores=bool(arguments.json or arguments.html),
        notes=["The passages are ranked by influence, which is not the same as being about it."],
        progress=lambda step: print(f"… {step}", file=sys.stderr),
    )
    for query, record in zip(results["queries"], records, strict=True):
        query["prompt"] = record.prompt  # without the chat template
        print_query(query, least=arguments.least)
    if arguments.json:
        write_results(results, arguments.json)
        print(f"results: {arguments.json}")
    if arguments.html:
        write_report(results, arguments.html)
        print(f"report: {arguments.html}")
    return 0


def _check_outputs(arguments: argparse.Namespace) -> None:
    """Refuse files that cannot be written, before any work is done for them."""
    for option in ("json", "html"):
        path = getattr(arguments, option)
        if path and not Path(path).absolute().parent.is_dir():
            raise FileNotFoundError(f"{option}: no folder {Path(path).absolute().parent}")


def _check_rows(store: Store, arguments: argparse.Namespace) -> None:
    """Refuse a store without rows to rank, before the model is loaded, which may take long."""
    if store.num_rows == 0:
        raise ValueError(f"store: {arguments.store} holds no rows; log some first")
    if arguments.top_k > store.num_rows:
        raise ValueError(
            f"top_k: expected at most {store.num_rows}, the rows in the store,"
            f" got {arguments.top_k}"
        )
    if not store.finalized:
        print(
            f"logra: warning: {arguments.store} is not finished; its {store.num_rows} rows so far"
            " are ranked",
            file=sys.stderr,
        )


def _records(arguments: argparse.Namespace) -> list[Record]:
    """What --text, --completion or --queries asks."""
    from logra_kernels.lm.query import read_queries

    texts = ("text", "completion")
    empty = [name for name in texts if getattr(arguments, name) == ""]
    if empty:
        raise ValueError(f"--{empty[0]}: expected some text, got an empty string")
    kinds = [name for name in (*texts, "queries") if getattr(arguments, name) is not None]
    if len(kinds) != 1:
        got = " and ".join(f"--{name}" for name in kinds) or "none"
        raise ValueError(f"expected one of --text, --completion, --queries, got {got}")
    if arguments.prompt is not None and kinds != ["completion"]:
        raise ValueError("--prompt goes with --completion")
    if arguments.chat and kinds == ["text"]:
        raise ValueError("--chat goes with --completion or --queries")
    if kinds == ["queries"]:
        records = read_queries(arguments.queries)
        if arguments.chat and not all(record.prompt for record in records):
            raise ValueError("--chat needs a prompt in every query")
        return records
    text = arguments.text or arguments.completion
    prompt = arguments.prompt or ""
    if arguments.chat and not prompt:
        raise ValueError("--chat needs a --prompt")
    return [Record(id=snippet(prompt or text, 60), text=text, prompt=prompt)]
