"""Which logged passages a language model's answer is made of: queries in, results out."""

import os
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from logra_kernels.attribution import Attributor, PreparedQueries
from logra_kernels.defaults import DAMPING_SCALE, GRADIENT_DOT, MODES, NO_CURVATURE
from logra_kernels.lm.causal_lm import CausalLM
from logra_kernels.lm.corpus import Example, Record, TokenSettings, batches, encode, json_lines
from logra_kernels.lm.gradients import LMGradients, lm_fingerprints
from logra_kernels.report import FORMAT, VERSION
from logra_kernels.store import Store

# Modes whose score is, but for a positive factor per row, the sum of the tokens' contributions.
TOKEN_MODES = tuple(mode for mode in MODES if mode != "l2")
# Token scores of one pass: at most this many padded tokens.
TOKEN_BATCH = 1024


def read_queries(path: str | os.PathLike[str]) -> list[Record]:
    """Queries from a JSONL file: {"text"}, or {"prompt", "completion"}; "id" is optional.

    Raises:
        FileNotFoundError, ValueError: the message names the line and the key.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"queries: no file {path}")
    records: list[Record] = []
    for number, _, row in json_lines(path, "queries"):
        place = f"queries: {path}, line {number}"
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
        id = str(row.get("id", number))
        records.append(Record(id=id, text=text, prompt=row.get("prompt", "")))
    if not records:
        raise ValueError(f"queries: {path} holds no query")
    return records


def chat_prompt(lm: CausalLM, question: str) -> str:
    """The question as the model's chat template puts it, up to where the answer begins.

    Raises:
        ValueError: the tokenizer has no chat template.
    """
    if not getattr(lm.tokenizer, "chat_template", None):
        raise ValueError(f"chat: the tokenizer of {lm.path} has no chat template")
    return str(
        lm.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
    )


def ask(
    store: Store,
    lm: CausalLM,
    queries: Sequence[Record],
    *,
    modes: Sequence[str] = ("l-relatif",),
    top_k: int = 5,
    damping_scale: float | None = None,
    damping: float | None = None,
    token_scores: bool = True,
    expected: Mapping[str, str] | None = None,
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
        damping_scale, damping: λ, as in `Attributor`.
        token_scores: run the top passages through the model again, for their tokens' shares.
        expected: {query id: beginning of a passage's id}: report the rank of the best passage whose
            id begins so. It takes all scores, so the memory grows with the store.
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
    examples = [_query_example(record, lm) for record in queries]
    rows = torch.cat([gradients.rows([example]) for example in examples])  # [Q, D]
    names = [record.id for record in queries]
    found: dict[str, list[dict[str, list[dict[str, Any]]]]] = {}
    directions: dict[str, Tensor] = {}  # mode -> [Q, D], what a passage's row is multiplied with
    ranks: dict[str, dict[str, int | None]] = {name: {} for name in expected or ()}
    curved: tuple[Attributor, PreparedQueries] | None = None  # one solve for all its modes
    for mode in modes:
        progress(f"scan for {mode}")
        if mode == GRADIENT_DOT:
            attributor = Attributor(store, NO_CURVATURE)
            prepared = attributor.prepare(rows, names)
        else:
            if curved is None:
                attributor = Attributor(store, damping_scale=damping_scale, damping=damping)
                curved = attributor, attributor.prepare(rows, names)
            attributor, prepared = curved
        directions[mode] = prepared.solved.to(rows.dtype)
        scan_mode = "dot" if mode == GRADIENT_DOT else mode
        result = attributor.top_k(prepared, top_k, mode=scan_mode)
        found[mode] = [_ends(result.rows(q)) for q in range(len(queries))]
        if expected:
            scores = attributor.scores(prepared, mode=scan_mode).scores
            assert scores is not None
            for q, name in enumerate(names):
                if name in expected:
                    ranks[name][mode] = _best_rank(store, scores[q], expected[name])

    _add_texts(store, found)
    if token_scores:
        progress("token contributions of the top passages")
        _add_token_scores(store, gradients, found, directions)
    return {
        "format": FORMAT,
        "version": VERSION,
        "title": title,
        "created": datetime.now().astimezone().isoformat(timespec="seconds"),
        "model": {"path": lm.name, "dtype": lm.dtype, "fingerprint": lm.fingerprint},
        "store": store_facts(store),
        "curvature": _curvature_facts(curved and curved[0], damping_scale, damping),
        "notes": list(notes),
        "queries": [
            {
                "id": record.id,
                "prompt": record.prompt,
                "text": record.text,
                **_expectation(record.id, expected, ranks),
                "modes": [{"mode": mode, **found[mode][q]} for mode in modes],
            }
            for q, record in enumerate(queries)
        ],
    }


def _best_rank(store: Store, scores: Tensor, beginning: str) -> int | None:
    """The rank of the highest score [N] among rows whose id begins so, from 1."""
    ids = store.ids.to_pylist()
    order = scores.sort(descending=True, stable=True).indices.tolist()
    return next((rank for rank, row in enumerate(order, 1) if ids[row].startswith(beginning)), None)


def _expectation(
    name: str, expected: Mapping[str, str] | None, ranks: dict[str, dict[str, int | None]]
) -> dict[str, Any]:
    if not expected or name not in expected:
        return {}
    return {"expected": {"what": expected[name], "ranks": ranks[name]}}


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


def _query_example(record: Record, lm: CausalLM) -> Example:
    # A query is never cut: what the model read is what is explained.
    settings = TokenSettings(max_tokens=1 << 30)
    examples, _ = encode(record, lm.tokenizer, settings)
    if not examples:
        raise ValueError(
            f"query {record.id!r}: expected text of at least two tokens (or one after a prompt),"
            f" got {record.text!r}"
        )
    return examples[0]


def _ends(ranked: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    return {
        end: [
            {key: item[key] for key in ("rank", "row", "id", "score")}
            for item in ranked
            if item["end"] == end
        ]
        for end in ("top", "bottom")
    }


def _passages(
    found: dict[str, list[dict[str, list[dict[str, Any]]]]], ends: tuple[str, ...]
) -> list[dict[str, Any]]:
    return [
        passage for queries in found.values() for q in queries for end in ends for passage in q[end]
    ]


def _add_texts(store: Store, found: dict[str, list[dict[str, list[dict[str, Any]]]]]) -> None:
    passages = _passages(found, ("top", "bottom"))
    rows = sorted({passage["row"] for passage in passages})
    texts = dict(zip(rows, store.metadata(rows), strict=True))
    for passage in passages:
        kept = texts[passage["row"]] or {}
        passage["text"] = kept.get("text", "")
        for key in ("title", "prompt"):
            if kept.get(key):
                passage[key] = kept[key]


def _add_token_scores(
    store: Store,
    gradients: LMGradients,
    found: dict[str, list[dict[str, list[dict[str, Any]]]]],
    directions: dict[str, Tensor],
) -> None:
    """Give each top passage its `tokens`: pairs [text, contribution] that sum to the score."""
    modes = [mode for mode in found if mode in TOKEN_MODES]
    if not modes:
        return
    stacked = torch.cat([directions[mode] for mode in modes])  # [modes * Q, D]
    num_queries = len(next(iter(found.values())))
    rows = sorted({p["row"] for mode in modes for q in found[mode] for p in q["top"]})
    ids = {str(row): metadata for row, metadata in zip(rows, store.metadata(rows), strict=True)}
    examples = [Example.from_metadata(row, metadata) for row, metadata in ids.items() if metadata]
    contributions: dict[int, Tensor] = {}  # row -> [modes * Q, T]
    for batch in batches(examples, batch_tokens=TOKEN_BATCH):
        scores = gradients.token_scores(batch, stacked)  # [modes * Q, N, T]
        for place, example in enumerate(batch):
            contributions[int(example.id)] = scores[:, place, : len(example.tokens)]
    texts = {int(e.id): gradients.lm.token_texts(e.tokens) for e in examples}
    for m, mode in enumerate(modes):
        for q in range(num_queries):
            for passage in found[mode][q]["top"]:
                row = passage["row"]
                if row not in contributions:
                    continue
                shares = contributions[row][m * num_queries + q].double()
                total = float(shares.sum())
                # The normaliser is a positive factor per passage: score / total, up to the rounding
                # of the stored row. Where rounding is all there is, no shares are shown.
                factor = passage["score"] / total if total else 0.0
                if factor > 0:
                    values = (shares * factor).tolist()
                    passage["tokens"] = [
                        [text, float(f"{value:.4g}")]
                        for text, value in zip(texts[row], values, strict=True)
                    ]


def _curvature_facts(
    curved: Attributor | None, damping_scale: float | None, damping: float | None
) -> dict[str, Any]:
    if curved is None:
        return {"kind": NO_CURVATURE}
    facts: dict[str, Any] = {"kind": curved.preconditioner.kind, "lambdas": curved.dampings}
    if damping is not None:
        return {**facts, "damping": damping}
    return {**facts, "damping_scale": DAMPING_SCALE if damping_scale is None else damping_scale}
