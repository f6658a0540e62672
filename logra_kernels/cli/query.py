"""`logra query`: a store's passages, ranked for an answer."""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from logra_kernels.cli.kept_plan import add_query
from logra_kernels.cli.outputs import check_outputs
from logra_kernels.defaults import RANKING_MODE
from logra_kernels.lm.corpus import Record
from logra_kernels.report import write_report, write_results
from logra_kernels.report.console import say, warn
from logra_kernels.report.render import snippet
from logra_kernels.report.results import STANDARD_OUTPUT
from logra_kernels.report.scores import score_table, write_ranked_scores
from logra_kernels.report.terminal import print_answers, print_query
from logra_kernels.store import Store
from logra_kernels.store.residuals import check_finer

if TYPE_CHECKING:
    from logra_kernels.lm.ranking import Scores

MODEL = "model"  # what --rerank takes beside a store's folder
# A query that has one of these is another than a plan is of.
UNPLANNED = ("json", "html", "scores", "mode", "rerank", "planes", "damping_scale", "damping")
NOTE = "The passages are ranked by influence, which is not the same as being about it."


def run(arguments: argparse.Namespace) -> int:
    """Rank, print, and write what was asked for."""
    from logra_kernels.attribution.memory import peak_bytes
    from logra_kernels.lm.causal_lm import CausalLM
    from logra_kernels.lm.gradients import LMGradients, lm_fingerprints
    from logra_kernels.lm.query import ask, chat_prompt, gradients_again
    from logra_kernels.lm.ranking import SecondLook

    records = _records(arguments)
    check_outputs(arguments)
    if arguments.scores_of is not None and not arguments.scores:
        raise ValueError("--scores-of goes with --scores")
    _check_rerank(arguments)
    store = Store.open(arguments.store)
    if arguments.planes is not None:
        store = store.first_planes(arguments.planes)
    dtype = lm_fingerprints(store)["model"]["dtype"]
    _check_rows(store, arguments)
    lm = CausalLM.load(arguments.model, dtype=dtype, device=arguments.device)
    finer = None if arguments.rerank in (None, MODEL) else Store.open(arguments.rerank)
    if finer is not None:
        check_finer(store, finer)
    shown = bool(arguments.json or arguments.html)
    # Before: a first query computes the norms of the rows.
    first = not any((store.path / "self_influence").glob("*/*.npy"))
    started = time.perf_counter()
    asked = records
    if arguments.chat:
        asked = [Record(r.id, r.text, chat_prompt(lm, r.prompt), templated=True) for r in records]
    second = None
    if arguments.rerank is not None:
        gradients = LMGradients.of_store(store, lm)
        second = SecondLook(
            gradients_again(store, gradients) if finer is None else finer,
            arguments.candidates,
            arguments.recall,
            arguments.certified,
        )
    with _every_score(arguments) as every_score:
        results = ask(
            store,
            lm,
            asked,
            modes=list(dict.fromkeys(arguments.mode or [RANKING_MODE])),
            top_k=arguments.top_k,
            damping_scale=arguments.damping_scale,
            damping=arguments.damping,
            token_scores=shown and arguments.tokens != "none",
            query_tokens=shown and arguments.tokens == "both",
            second=second,
            every_score=every_score,
            notes=[NOTE],
            progress=lambda step: warn(f"… {step}"),
        )
    if all(getattr(arguments, option) is None for option in UNPLANNED):
        seconds = time.perf_counter() - started
        add_query(store, len(records), first, seconds, peak_bytes())
    for query, record in zip(results["queries"], records, strict=True):
        query["prompt"] = record.prompt  # without the chat template
    _write(results, arguments)
    return 0


@contextmanager
def _every_score(arguments: argparse.Namespace) -> Iterator[Callable[["Scores"], None] | None]:
    """What writes the scores of all rows, if that is asked for."""
    if not arguments.scores or arguments.scores_of == "ranked":
        yield None
        return
    with score_table(arguments.scores) as add, tqdm(desc="scores", unit="row", delay=1) as bar:

        def write(block: "Scores") -> None:
            add(block)
            bar.update(len(block["score"]))

        yield write


def _write(results: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Print the rankings, and write the files that were asked for."""
    tell: Callable[[str], None] = say
    if arguments.json == STANDARD_OUTPUT:
        tell = warn  # on stdout is JSON alone
    else:
        for query in results["queries"]:
            print_query(query, least=arguments.least)
        if arguments.rerank is not None:
            print_answers(results)
    if arguments.json:
        write_results(results, arguments.json)
    if arguments.html:
        write_report(results, arguments.html)
    if arguments.scores and arguments.scores_of == "ranked":
        write_ranked_scores(results, arguments.scores)
    for label, path in (
        ("results", arguments.json),
        ("report", arguments.html),
        ("scores", arguments.scores),
    ):
        if path and path != STANDARD_OUTPUT:
            tell(f"{label}: {path}")


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
        warn(
            f"logra: warning: {arguments.store} is not finished; its {store.num_rows} rows so far"
            " are ranked"
        )


def _check_rerank(arguments: argparse.Namespace) -> None:
    """Refuse options of a second look that do not go together, before anything is loaded."""
    if arguments.rerank is None:
        for name in ("candidates", "recall", "certified"):
            if getattr(arguments, name):
                raise ValueError(f"--{name} goes with --rerank")
        return
    if arguments.certified and arguments.rerank == MODEL:
        raise ValueError("--certified: expected --rerank with a finer store, got the model")
    if arguments.candidates is not None and arguments.candidates < arguments.top_k:
        raise ValueError(
            f"--candidates: expected at least --top-k, {arguments.top_k}, "
            f"got {arguments.candidates}"
        )
    if arguments.scores and arguments.scores_of != "ranked":
        raise ValueError(
            "--rerank scores some rows exactly, not all: --scores goes with --scores-of ranked"
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
