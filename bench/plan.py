"""What `logra plan` says beside what comes: three settings, each planned, logged and asked in turn.

The models are Llamas with random weights, the texts random words. Every step is a process of its
own, as a user would run it; the plan and what it is compared with run back to back, for a machine
that others use is not as fast in the next minute.
"""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.harness import results
from bench.harness.cases import options
from bench.harness.models import llama
from bench.harness.results import ROOT
from bench.harness.tables import table

WIDEST = 1.5  # a time that is more than that many times another is not right


@dataclass(frozen=True)
class Setting:
    """A model, a corpus, and the options of `logra log`."""

    title: str
    model: dict[str, int]
    texts: int
    options: str


SMALL = {"blocks": 4, "width": 128, "vocabulary": 384}
LARGE = {"blocks": 8, "width": 384, "vocabulary": 384}
SETTINGS = (
    Setting("random rank 16, float16", SMALL, 1500, "--rank 16"),
    Setting("eigen D = 8,192, int8", SMALL, 1500, "--init eigen --coordinates 8192 --codec int8"),
    Setting("random rank 32, float16, 13M weights", LARGE, 500, "--rank 32"),
)


def main(argv: list[str] | None = None) -> int:
    args = options(__doc__, "quick", "threads", "json").parse_args(argv)
    good = True
    for setting in SETTINGS:
        with tempfile.TemporaryDirectory() as name:
            rows = measured(setting, Path(name), 10 if args.quick else 1, args.threads)
        print(f"\n{setting.title}")
        print(table(rows))
        good &= all(row["right"] for row in rows)
        if args.json:
            results.append("plan", {"bench": "plan", "case": setting.title, "rows": rows})
    return 0 if good else 1


def measured(
    setting: Setting, folder: Path, part: int, threads: int | None
) -> list[dict[str, Any]]:
    """What `logra info` says after a plan, the logging, and two queries."""
    make_model(setting, folder / "model")
    make_texts(folder / "texts.jsonl", setting.texts // part)
    given = ["--model", "model", "--data", "texts.jsonl", *setting.options.split()]
    logra(folder, threads, "plan", *given, "--out", "store", "--json", "plan.json")
    logra(folder, threads, "log", *given, "--out", "store", "--plan", "plan.json")
    for _ in range(2):
        logra(
            folder, threads, "query", "--model", "model", "--store", "store", "--text", "word " * 9
        )
    found = json.loads(logra(folder, threads, "info", "store", "--json", "-"))["plan"]
    return [{**line, "measured / planned": ratio(line), "right": is_right(line)} for line in found]


def ratio(line: dict[str, Any]) -> float:
    return line["measured"] / line["planned"] if line["planned"] else math.nan


def is_right(line: dict[str, Any]) -> bool:
    """Bytes of files are exact; the manifest's, a projection's and memory are estimates."""
    if line["unit"] == "s":
        return 1 / WIDEST <= ratio(line) <= WIDEST
    return line["what"] not in ("rows", "ids", "norms", "curvature") or ratio(line) in (1, math.nan)


def make_model(setting: Setting, folder: Path) -> None:
    """A Llama and a tokenizer with a token a byte, as a Hugging Face folder."""
    import tokenizers
    import transformers

    torch.manual_seed(0)
    llama(**setting.model, max_position_embeddings=1024).save_pretrained(folder)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"</s>": 0, **{letter: n for n, letter in enumerate(alphabet, 1)}}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    made.save_pretrained(folder)


def make_texts(path: Path, count: int) -> None:
    """Texts of 4 to 60 random words."""
    random.seed(0)
    words = ["".join(random.choices("etaoinshrdlu", k=random.randint(2, 7))) for _ in range(500)]
    lines = (" ".join(random.choices(words, k=random.randint(4, 60))) for _ in range(count))
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), encoding="utf-8")


def logra(folder: Path, threads: int | None, *words: str) -> str:
    """Run the command in a folder; what it prints."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    command = [sys.executable, "-m", "logra_kernels.cli", *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
