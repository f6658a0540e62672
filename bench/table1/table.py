"""The table of what was measured, its ratios and its JSON record."""

from dataclasses import asdict, dataclass
from typing import Any

TARGET = 6500
FITTED = 100_000  # examples to which kronfluence fits its factors at most, by default
EKFAC, LOGRA = "EKFAC", "LoGra"


@dataclass
class LoggingRow:
    """A line of the table: fitting EKFAC's factors, or logging rows and curvature."""

    system: str  # EKFAC or LOGRA
    variant: str
    batch: int
    tokens_per_s: float
    memory_bytes: int
    storage_bytes: int
    storage_bytes_per_example: float  # the part of `storage_bytes` that grows with N, over N
    once: str  # in words: the work that follows once, and its seconds
    once_s: float


@dataclass
class InfluenceRow:
    """A line of the table: scores of training examples for queries."""

    system: str
    variant: str
    train_batch: int
    test_batch: int
    num_train: int  # examples that were scored
    pairs_per_s: float  # the training side alone
    pairs_per_s_with_queries: float  # with the queries' gradients, over `corpus` examples
    query_s: float  # seconds of the queries' gradients and their preconditioning
    memory_bytes: int

    @property
    def batches(self) -> str:
        """The training batch and the test batch."""
        return f"({self.train_batch}, {self.test_batch})"


@dataclass
class Table:
    """The measured rows, with what the printed table says around them."""

    title: str
    corpus: int
    length: int  # tokens of an example
    check: dict[str, float]
    logging: list[LoggingRow]
    influence: list[InfluenceRow]
    left_out: str | None = None  # why there is no EKFAC

    def ratios(self) -> dict[str, float]:
        """Pairs/s of LoGra over EKFAC's; empty without EKFAC.

        "largest over smallest batch" sets LoGra's largest test batch against EKFAC's smallest;
        "best over best" sets the best row of each against the other, and is the strictest;
        "same batch Q" takes the best rows of each with that test batch. Each is of LoGra's smallest
        rank. "with queries" has the queries' gradients in both.
        """
        ekfac = [row for row in self.influence if row.system == EKFAC]
        ours = [row for row in self.influence if row.system == LOGRA]
        if not ekfac or not ours:
            return {}
        ours = [row for row in ours if row.variant == ours[0].variant]
        smallest = min(ekfac, key=lambda row: (row.test_batch, row.train_batch, -row.pairs_per_s))
        largest = max(ours, key=lambda row: (row.test_batch, row.pairs_per_s))
        found = {
            "largest over smallest batch": largest.pairs_per_s / smallest.pairs_per_s,
            "best over best": _best(ours) / _best(ekfac),
            "best over best, with queries": _best(ours, True) / _best(ekfac, True),
        }
        for test_batch in sorted({row.test_batch for row in ours}):
            theirs = [row for row in ekfac if row.test_batch == test_batch]
            if theirs:
                mine = [row for row in ours if row.test_batch == test_batch]
                found[f"same batch {test_batch}"] = _best(mine) / _best(theirs)
        return found

    def from_nothing(self) -> dict[str, dict[str, float]]:
        """Seconds that each system takes for `queries` queries over `corpus` examples.

        {"once": fitting or logging and what follows it, "each": such a batch of queries}, from the
        fastest rows (of LoGra's smallest rank) with the largest test batch that both have.
        """
        found = {}
        batches = [{r.test_batch for r in self.influence if r.system == s} for s in (EKFAC, LOGRA)]
        common = batches[0] & batches[1] or batches[1]
        for system in (EKFAC, LOGRA):
            rows = [r for r in self.influence if r.system == system and r.test_batch == max(common)]
            if not rows:
                continue
            logged = [row for row in self.logging if row.system == system]
            if system == LOGRA:
                logged = [row for row in logged if row.variant == logged[0].variant]
                rows = [row for row in rows if row.variant == logged[0].variant]
            fastest = max(logged, key=lambda row: row.tokens_per_s)
            examples = min(self.corpus, FITTED) if system == EKFAC else self.corpus
            once_s = examples * self.length / fastest.tokens_per_s + fastest.once_s
            each_s = self.corpus * max(common) / _best(rows, True)
            found[system] = {"queries": max(common), "once": once_s, "each": each_s}
        return found

    def text(self) -> str:
        """The table as it is printed."""
        lines = [self.title, ""]
        for name, value in self.check.items():
            shown = f"{value:.3f}" if "correlation" in name else f"{value:.1e} of the largest score"
            lines.append(f"  check: {name}: {shown}")
        lines += ["", *self._logging_lines(), "", *self._influence_lines()]
        if self.left_out:
            lines += ["", f"  EKFAC left out: {self.left_out}"]
        ratios = self.ratios()
        if ratios:
            lines += ["", f"  LoGra's pairs/s over EKFAC's (target: {TARGET:,}x):"]
            for name, value in ratios.items():
                verdict = "" if value >= TARGET else "  below the target"
                lines.append(f"    {name:<32}{value:>10,.0f}x{verdict}")
        lines += ["", f"  extrapolated to {self.corpus:,} examples:"]
        for system, seconds in self.from_nothing().items():
            lines.append(
                f"    {system:<8}once {duration(seconds['once']):>8}, then"
                f" {duration(seconds['each']):>8} for every {seconds['queries']:.0f} queries"
            )
        return "\n".join(lines)

    def record(self) -> dict[str, Any]:
        """What is appended to bench/results/table1.jsonl."""
        return {
            "case": self.title,
            "corpus": self.corpus,
            "check": self.check,
            "logging": [asdict(row) for row in self.logging],
            "influence": [asdict(row) for row in self.influence],
            "ratios": self.ratios(),
            "from_nothing": self.from_nothing(),
            "left_out": self.left_out,
        }

    def _logging_lines(self) -> list[str]:
        lines = [
            f"  {'logging':<30}{'batch':>6}{'tokens/s':>10}{'memory':>10}{'storage':>10}"
            f"{'of it/example':>15}  then once"
        ]
        for row in self.logging:
            lines.append(
                f"  {row.system + ' ' + row.variant:<30}{row.batch:>6}{row.tokens_per_s:>10,.0f}"
                f"{size(row.memory_bytes):>10}{size(row.storage_bytes):>10}"
                f"{size(row.storage_bytes_per_example):>15}  {row.once}"
            )
        return lines

    def _influence_lines(self) -> list[str]:
        with_queries = f"with queries, N={self.corpus:,}"
        lines = [
            f"  {'influence':<30}{'(train, test)':>14}{'pairs/s':>14}{with_queries:>28}"
            f"{'queries s':>11}{'memory':>10}"
        ]
        for row in self.influence:
            lines.append(
                f"  {row.system + ' ' + row.variant:<30}{row.batches:>14}{row.pairs_per_s:>14,.0f}"
                f"{row.pairs_per_s_with_queries:>28,.0f}{row.query_s:>11.2f}"
                f"{size(row.memory_bytes):>10}"
            )
        return lines


def pairs_per_s(measured: dict[str, Any]) -> float:
    """All training examples times all queries, over the time of the training side."""
    return float(measured["num_train"] * measured["num_queries"] / measured["train_s"])


def pairs_per_s_with_queries(measured: dict[str, Any], corpus: int) -> float:
    """The same over `corpus` examples, with the time of the queries' gradients.

    The training side is as long as the examples are many, for either system; the queries' is not.
    """
    train_s = measured["train_s"] * corpus / measured["num_train"]
    return float(corpus * measured["num_queries"] / (train_s + measured["query_s"]))


def memory_bytes(measured: dict[str, Any]) -> int:
    """The peak above the loaded model, of the device's memory or of what the process allocated."""
    memory = measured["memory"]
    return int(memory["device"] or memory["anonymous"] or memory["resident"])


def size(num_bytes: float) -> str:
    """1536 -> 1.5 KB, in powers of 1024."""
    for unit in ("B", "KB", "MB", "GB"):
        if num_bytes < 999.5:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.3g} TB"


def duration(seconds: float) -> str:
    """90 -> 1.5 min"""
    for unit, length in (("s", 60), ("min", 60), ("h", 24)):
        if seconds < length:
            return f"{seconds:.2g} {unit}"
        seconds /= length
    return f"{seconds:.3g} d"


def _best(rows: list[InfluenceRow], with_queries: bool = False) -> float:
    if with_queries:
        return max(row.pairs_per_s_with_queries for row in rows)
    return max(row.pairs_per_s for row in rows)
