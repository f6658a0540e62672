"""Which logged passages a language model's answer is made of: queries in, results out."""

import os
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from logra_kernels.attribution.finer import ComputeRows
from logra_kernels.curvature import DampingScale
from logra_kernels.defaults import MODES, RANKING_MODE
from logra_kernels.lm import chat
from logra_kernels.lm.causal_lm import CausalLM
from logra_kernels.lm.corpus import Example, Record, TokenSettings, batches, encode
from logra_kernels.lm.gradients import LMGradients, lm_fingerprints
from logra_kernels.lm.ranking import Ranking, Scans, Scores, SecondLook, scale_facts
from logra_kernels.lm.sources import json_lines
from logra_kernels.lm.token_shares import BATCH_TOKENS, add_query_shares, add_token_shares
from logra_kernels.report import FORMAT, VERSION
from logra_kernels.store import Store


def read_queries(path: str | os.PathLike[str]) -> list[Record]:
    """Queries from a JSONL file: {"text"}, or {"prompt", "completion"}; "id" is optional.

    Raises:
        FileNotFoundError, ValueError: the message names the line and the key.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"queries: no file {path}")
    with path.open("rb") as lines:
        records = [
            _record(row, number, f"queries: {path}, line {number}")
            for number, row in json_lines(lines, f"queries: {path}")
        ]
    if not records:
        raise ValueError(f"queries: {path} holds no query")
    return records


def _record(row: dict[str, Any], number: int, place: str) -> Record:
    if ("text" in row) == ("completion" in row):
        raise ValueError(f'{place}: expected "text", or "prompt" and "completion"')
    unknown = set(row) - {"id", "text", "prompt", "completion"}
    if unknown or ("text" in row and "prompt" in row):
        what = min(unknown) if unknown else "prompt"
        raise ValueError(f'{place}: key "{what}" does not belong in a query of this kind')
    for key, value in row.items():
        if not isinstance(value, str) and not (key == "id" and isinstance(value, int)):
            raise ValueError(f"{place}: {key}: expected a string, got {type(value).__name__}")
    text = row["text"] if "text" in row else row["completion"]
    return Record(id=str(row.get("id", number)), text=text, prompt=row.get("prompt", ""))


def chat_prompt(lm: CausalLM, question: str) -> str:
    """The question as the model's chat template puts it, up to where the answer begins.

    Raises:
        ValueError: the tokenizer has no chat template.
    """
    if not chat.has_template(lm.tokenizer):
        raise ValueError(f"chat: the tokenizer of {lm.path} has no chat template")
    return chat.ask(question, lm.tokenizer, "chat")


def ask(
    store: Store,
    lm: CausalLM,
    queries: Sequence[Record],
    *,
    modes: Sequence[str] = (RANKING_MODE,),
    top_k: int = 5,
    damping_scale: DampingScale | Sequence[DampingScale] | None = None,
    damping: float | None = None,
    token_scores: bool = True,
    query_tokens: bool = False,
    expected: Mapping[str, str] | None = None,
    second: SecondLook | None = None,
    every_score: Callable[[Scores], None] | None = None,
    title: str = "Most influential passages",
    notes: Sequence[str] = (),
    progress: Callable[[str], None] = lambda step: None,
) -> dict[str, Any]:
    """Rank a store's passages for queries, and say which of their tokens make the score.

    Args:
        store: written by `log_corpus`.
        lm: the model it was logged with.
        queries: the loss is on their text; their prompt stands before it.
        modes: of `MODES`, each ranked by itself.
        top_k: how many of the most and of the least influential passages are kept.
        damping_scale, damping: λ, as in `Attributor`. Of several scales each gives rankings of its
            own; a mode's scan is one for all.
        token_scores: run the top passages through the model again, for their tokens' shares.
        query_tokens: run the queries again, for the shares of their tokens in each top passage's
            score.
        expected: {query id: beginning of a passage's id}: report the rank of the best passage
            whose id begins so. It takes all scores, so the memory grows with the store.
        second: rank by finer rows, which a scan of the store chooses.
        every_score: given the scores of all the store's rows in each mode, as columns query, mode,
            row, id and score of up to 65,536 rows, and damping_scale if there are several. Beside
            them the matrix of one mode is in memory, [Q, N] float32 for each damping.
        title, notes: for the report.
        progress: told what is being done.
    Returns:
        results, as `logra_kernels.report` describes them.
    Raises:
        StoreMismatchError: another model than the store's.
        ValueError: an unknown mode, k beyond the store's rows, a query with nothing to predict.
    """
    for mode in modes:
        if mode not in MODES:
            raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    gradients = LMGradients.of_store(store, lm)
    progress("gradients of the queries")
    examples = [query_example(record, lm) for record in queries]
    rows = torch.cat([gradients.rows([example]) for example in examples])  # [Q, D]
    names = [record.id for record in queries]
    scans = Scans(store, rows, names, damping_scale=damping_scale, damping=damping, second=second)
    rankings = []
    for mode in modes:
        progress(f"scan for {mode}")
        rankings += scans.rank(mode, top_k, expected or {}, every_score)
    _add_texts(store, rankings)
    if token_scores:
        progress("token contributions of the top passages")
        add_token_shares(store, gradients, rankings)
    if query_tokens:
        progress("token contributions of the queries")
        add_query_shares(store, gradients, rankings, examples)
    return {
        "format": FORMAT,
        "version": VERSION,
        "title": title,
        "created": datetime.now().astimezone().isoformat(timespec="seconds"),
        "model": {"path": lm.name, "dtype": lm.dtype, "fingerprint": lm.fingerprint},
        "store": store_facts(store),
        "curvature": scans.curvature_facts(rankings),
        "answers": [{**_mode_facts(ranking), **ranking.answer} for ranking in rankings],
        "notes": list(notes),
        "queries": [
            _query_result(q, record, rankings, (expected or {}).get(record.id))
            for q, record in enumerate(queries)
        ],
    }


def store_facts(store: Store) -> dict[str, Any]:
    """What a report says of a store."""
    size_bytes = sum(file.stat().st_size for file in store.path.rglob("*") if file.is_file())
    return {
        "path": store.path.name,
        "rows": store.num_rows,
        "dim": store.dim,
        "bytes": size_bytes,
        "dtype": store.dtype,
        "modules": [module.name for module in store.modules],
        "projection": store.projection,
        "finalized": store.finalized,
        "data": lm_fingerprints(store)["data"],
        "tokens": lm_fingerprints(store)["tokens"],
    }


def gradients_again(store: Store, gradients: LMGradients) -> ComputeRows:
    """What makes the gradients of a store's rows again, from the texts that it keeps.

    Of row numbers [n] int64 it gives [n, D] float32. It raises a ValueError for a row whose text
    the store does not keep.
    """

    def rows_of(numbers: np.ndarray) -> Tensor:
        examples = []
        for row, kept in zip(numbers.tolist(), store.metadata(numbers), strict=True):
            if not kept:
                raise ValueError(f"rerank: {store.path} keeps no text of '{store.id_of(row)}'")
            examples.append(Example.from_metadata(str(row), kept))
        places = {str(row): place for place, row in enumerate(numbers.tolist())}
        rows = torch.empty(len(numbers), store.dim)
        for batch in batches(examples, batch_tokens=BATCH_TOKENS):
            rows[[places[example.id] for example in batch]] = gradients.rows(batch)
        return rows

    return rows_of


def query_example(record: Record, lm: CausalLM) -> Example:
    """A query's tokens. It is never cut: what the model read is what is explained.

    Raises:
        ValueError: it holds nothing to predict.
    """
    settings = TokenSettings(max_tokens=1 << 30)
    examples, _ = encode(record, lm.tokenizer, settings)
    if not examples:
        raise ValueError(
            f"query {record.id!r}: expected text of at least two tokens (or one after a prompt),"
            f" got {record.text!r}"
        )
    return examples[0]


def _add_texts(store: Store, rankings: Sequence[Ranking]) -> None:
    """Give each passage its text, and its title and prompt where the store has them."""
    passages = [p for r in rankings for of_query in r.top + r.bottom for p in of_query]
    rows = sorted({passage["row"] for passage in passages})
    texts = dict(zip(rows, store.metadata(rows), strict=True))
    for passage in passages:
        kept = texts[passage["row"]] or {}
        passage["text"] = kept.get("text", "")
        passage.update({key: kept[key] for key in ("title", "prompt") if kept.get(key)})


def _query_result(
    q: int, record: Record, rankings: Sequence[Ranking], expected: str | None
) -> dict[str, Any]:
    """One query and its rankings, as a results file holds them."""
    result: dict[str, Any] = {"id": record.id, "prompt": record.prompt, "text": record.text}
    if expected is not None:
        ranks = {ranking.name: ranking.expected_ranks[record.id] for ranking in rankings}
        result["expected"] = {"what": expected, "ranks": ranks}
    result["modes"] = [
        {**_mode_facts(ranking), "top": ranking.top[q], "bottom": ranking.bottom[q]}
        for ranking in rankings
    ]
    return result


def _mode_facts(ranking: Ranking) -> dict[str, Any]:
    """The mode, and of several dampings its own."""
    scale = {} if ranking.scale is None else scale_facts(ranking.scale)
    return {"mode": ranking.mode, **scale}
