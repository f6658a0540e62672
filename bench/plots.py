"""Pictures of the stored results, into docs/images/: python -m bench.plots [--out FOLDER]

scan.png      time of a scan over the number of queries, with the least that the machine allows
logging.png   time of logging beside the passes that no logging can do without
pairs.png     influence scores a second beside the libraries' that do the same
accuracy.png  LDS over the bytes of a row, for each setting
codecs.png    recall@20 over the bytes of a row, for each setting, kind of rows and codec
brittleness.png  what queries lose without their most valuable examples

A picture without results is left out, with a line that says so. The pictures have a light
background, so that they read alike on light and dark pages.
"""

import argparse
import io
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bench.harness import results
from bench.harness.cases import is_ours
from bench.harness.tables import cell

GREY, PALE = "#6b7280", "#d5d9e0"
OUR_COLOUR, OUR_NAME = "#c2410c", "logra_kernels"
# The lines of scan.png: how their providers' names begin, and a colour.
LINES = {
    "faiss flat": "#c084fc",
    "faiss SQfp16": "#7e22ce",
    "numpy": "#0f766e",
    "torch fp32": "#60a5fa",
    "torch fp16": "#1d4ed8",
    "logra": OUR_COLOUR,
}
# The bars of logging.png: providers, and what they are called there.
PASSES = {
    "floor": "forward and activation gradients alone",
    "logra": f"{OUR_NAME}: with every row",
    "torch hooks, einsum": "hooks and einsum in torch",
    "full backward": "training's full backward, no rows",
}
PEERS = {"l-relatif": "l-RelatIF", "influence": "Influence (Eq. 3)"}  # the parts that are drawn

# The lines of accuracy.png and brittleness.png.
METHODS = {
    "eigenbasis": OUR_COLOUR,
    "eigenbasis, shrunk": "#166534",
    "eigenbasis, sequence moments": "#fb7185",
    "eigenbasis, pilot of 10%": "#f59e0b",
    "full EKFAC": "#111827",
    "PCA, EKFAC": "#1d4ed8",
    "PCA, raw": "#60a5fa",
    "random, EKFAC": "#7e22ce",
    "random, raw": "#c084fc",
    "TRAK, one model": "#0f766e",
    "gradient dot": "#6b7280",
    "gradient cosine": "#9ca3af",
    "representation similarity": "#84cc16",
    "BM25": "#0891b2",
    "random scores": "#d5d9e0",
}

# The lines of codecs.png: kinds of rows and modes.
CODED = {
    "eigenbasis, l-relatif": OUR_COLOUR,
    "eigenbasis, dot": "#f59e0b",
    "random, raw, l-relatif": "#7e22ce",
    "random, raw, dot": "#c084fc",
}
KINDS = {"eigen": "eigenbasis", "random": "random, raw"}

Group = tuple[str, dict[str, float]]  # a heading, and the bars below it


def scan() -> Any:
    """Lines over Q; what the machine does not allow is shaded."""
    records = [r for r in results.latest("scores") if r["params"].get("rows") == "float16"]
    if not records:
        return None
    largest = max(r["params"]["R"] * r["params"]["D"] for r in records)
    records = [r for r in records if r["params"]["R"] * r["params"]["D"] == largest]
    records.sort(key=lambda r: int(r["params"]["Q"]))
    limits = [r["limits"] for r in records]
    read = sorted(2e-6 * largest / one["read_gb_per_s"] for one in limits)[len(limits) // 2]
    floor = [
        max(read, 2e-6 * r["params"]["Q"] * largest / one["fma_gflop_per_s"])
        for r, one in zip(records, limits, strict=True)
    ]
    counts = [str(r["params"]["Q"]) for r in records]
    shape = f"{records[0]['params']['R']:,} rows of {records[0]['params']['D']:,}"
    title = f"A scan of {shape} in fp16, milliseconds"
    figure, axis = _figure(title, records[0], 7.6, 4.6)
    lines = {begins: [_least(record, begins) for record in records] for begins in LINES}
    lines = {begins: ms for begins, ms in lines.items() if all(ms)}
    for begins, ms in sorted(lines.items(), key=lambda line: -line[1][-1]):
        label = f"{begins.replace('logra', OUR_NAME)}  {cell(ms[-1])} ms"
        width = 3.0 if is_ours(begins) else 1.6
        axis.plot(counts, ms, color=LINES[begins], linewidth=width, marker="o", label=label)
    bottom = min(min(ms) for ms in lines.values()) / 2.5
    axis.fill_between(counts, floor, bottom, color="#f1f2f5", linewidth=0, zorder=0,
                      label="less than reading\nand multiplying take")  # fmt: skip
    axis.set(yscale="log", ylim=(bottom, None), xlabel="queries in one scan")
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.6g}")
    axis.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    figure.subplots_adjust(left=0.08, right=0.7, top=0.84, bottom=0.12)
    return figure


def logging() -> Any:
    """Bars of the newest logging case, in units of the floor."""
    for record in results.latest("logging"):
        ms = results.medians_ms(record)
        if record["params"].get("model") == "llama" and "floor" in ms:
            bars = {name: ms[provider] for provider, name in PASSES.items() if provider in ms}
            title = f"Logging: {record['case'].rsplit(', ', 1)[0]}"
            ratios = {name: one / ms["floor"] for name, one in bars.items()}
            return _bars(title, record, [("", ratios)], "{:.2f}".format)
    return None


def pairs() -> Any:
    """Bars of pairs a second on a logarithmic axis, grouped by what is computed."""
    groups: list[Group] = []
    record: dict[str, Any] = {}
    for record in results.latest("peers"):
        title = PEERS.get(record["params"]["part"])
        numbers = re.search(r"Q=16, N=(\d+)", record["case"])
        if title and numbers:
            heading = f"{title}, 16 queries, {int(numbers[1]):,} rows"
            groups.append((heading, results.rates(record)))
    for record in results.latest("table1")[-1:]:
        best: dict[str, float] = {}
        for row in record["influence"]:
            key = "logra" if is_ours(row["system"].lower()) else "kronfluence EKFAC"
            best[key] = max(best.get(key, 0.0), row["pairs_per_s"])
        groups.append(("A small language model, each at its best batch", best))
    groups = [(heading, rates) for heading, rates in groups if len(rates) > 1]
    if not groups:
        return None
    title = "Pairs of training example and query scored a second (logarithmic)"
    return _bars(title, record, groups, _count, log=True)


def accuracy() -> Any:
    """LDS over bytes a row, a panel for each setting, a line for each kind of rows."""
    records = _accuracy_records("lds")
    if not records:
        return None
    title = "LDS over the bytes that are kept of an example"
    figure, axes = _figure(title, records[0], 3.5 * len(records) + 3.0, 4.4, len(records))
    for axis, record in zip(axes, records, strict=True):
        lines: dict[str, list[dict[str, Any]]] = {}
        for row in record["methods"]:
            kind = re.sub(r", rank \d+", "", row["method"])
            if row["bytes a row"] and kind in METHODS:
                lines.setdefault(kind, []).append(row)
        whole = lines["full EKFAC"][0]
        axis.axhspan(whole["low"], whole["high"], color="#f1f2f5", linewidth=0, zorder=0)
        axis.axhline(whole["LDS"], color=GREY, linewidth=1.0, linestyle="--", zorder=1)
        for kind, rows in lines.items():
            x, y = [row["bytes a row"] for row in rows], [row["LDS"] for row in rows]
            spread = [
                [row["LDS"] - row["low"] for row in rows],
                [row["high"] - row["LDS"] for row in rows],
            ]
            ours = kind == "eigenbasis"
            axis.errorbar(x, y, yerr=spread, marker="o", markersize=5, capsize=2, elinewidth=0.8,
                          color=METHODS[kind], linewidth=2.8 if ours else 1.4, label=kind,
                          zorder=3 if ours else 2)  # fmt: skip
        axis.axhline(0, color="#9ca3af", linewidth=0.8, zorder=0)
        axis.set(xscale="log", xlabel="bytes")
        axis.set_title(_panel_title(record), fontsize=10)
        axis.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    _legend(figure, axes)
    return figure


def codecs() -> Any:
    """Recall over bytes a row, a panel for each setting, a line for each kind of rows and mode."""
    records = [one for one in results.latest("codecs") if "Spearman" in one["rows"][0]]
    if not records:
        return None
    title = "The 20 best of float32 rows that a scan of coded rows finds, nothing re-ranked"
    figure, axes = _figure(title, records[0], 3.5 * len(records) + 2.6, 4.4, len(records))
    for axis, record in zip(axes, records, strict=True):
        lines: dict[str, list[dict[str, Any]]] = {}
        for row in record["rows"]:
            lines.setdefault(f"{KINDS[row['rows']]}, {row['mode']}", []).append(row)
        for name, rows in lines.items():
            rows.sort(key=lambda row: int(row["bytes a row"]))
            x, y = [row["bytes a row"] for row in rows], [row["recall@20"] for row in rows]
            width = 2.8 if name == next(iter(CODED)) else 1.4
            axis.plot(x, y, marker="o", markersize=5, color=CODED[name], linewidth=width,
                      label=name)  # fmt: skip
        names = {row["bytes a row"]: row["codec"] for row in lines[next(iter(CODED))]}
        axis.set(xscale="log", xlabel="bytes", ylim=(None, 1.005))
        axis.yaxis.set_major_formatter("{x:.3g}")
        axis.minorticks_off()
        axis.set_xticks(list(names), [f"{size:,}\n{codec}" for size, codec in names.items()])
        axis.tick_params(axis="x", labelsize=8)
        axis.set_title(record["case"], fontsize=10)
        axis.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    _legend(figure, axes, CODED)
    figure.subplots_adjust(bottom=0.16)
    return figure


def brittleness() -> Any:
    """How much the queries' losses rise over the number of examples that were left out."""
    records = _accuracy_records("brittleness")
    if not records:
        return None
    title = "Rise of the loss without what a method ranks first"
    figure, axes = _figure(title, records[0], 3.5 * len(records) + 3.0, 4.4, len(records))
    for axis, record in zip(axes, records, strict=True):
        lines: dict[str, list[dict[str, Any]]] = {}
        for row in record["methods"]:
            lines.setdefault(re.sub(r", rank \d+", "", row["method"]), []).append(row)
        shift = 1.0
        for kind, rows in lines.items():
            x = [row["k"] * shift for row in rows]
            shift *= 1.03  # so that the intervals stand beside each other
            spread = [
                [row["loss"] - row["low"] for row in rows],
                [row["high"] - row["loss"] for row in rows],
            ]
            ours = kind == "eigenbasis"
            axis.errorbar(x, [row["loss"] for row in rows], yerr=spread, marker="o", markersize=5,
                          capsize=2, elinewidth=0.8, color=METHODS.get(kind, PALE), label=kind,
                          linewidth=2.8 if ours else 1.4, zorder=3 if ours else 2)  # fmt: skip
        counts = sorted({row["k"] for row in record["methods"]})
        axis.axhline(0, color="#9ca3af", linewidth=0.8, zorder=0)
        axis.set(xscale="log", xlabel="examples left out")
        axis.set_xticks(counts, [str(count) for count in counts])
        axis.minorticks_off()
        axis.set_title(_panel_title(record), fontsize=10)
        axis.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    _legend(figure, axes)
    return figure


def _accuracy_records(part: str) -> list[dict[str, Any]]:
    return [one for one in results.latest("accuracy") if one["params"].get("part") == part]


def _panel_title(record: dict[str, Any]) -> str:
    return str(record["case"].split(", ", 1)[1])


def _legend(figure: Any, axes: Any, names: Iterable[str] = METHODS) -> None:
    """One for all panels, in the order of the names; room for it at the right."""
    handles: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    order = sorted(handles, key=[*names, *handles].index)
    width = figure.get_size_inches()[0]
    figure.subplots_adjust(
        left=0.45 / width, right=1 - 2.7 / width, top=0.78, bottom=0.12, wspace=0.22
    )
    figure.legend(
        [handles[label] for label in order],
        order,
        loc="upper left",
        bbox_to_anchor=(1 - 2.65 / width, 0.82),
        frameon=False,
        fontsize=9,
    )


def _least(record: dict[str, Any], begins: str) -> float:
    """Of the providers whose names begin so; rows kept in bf16 are another store."""
    found = results.medians_ms(record).items()
    return min((ms for n, ms in found if n.startswith(begins) and "bf16 rows" not in n), default=0)


def _bars(
    title: str,
    record: dict[str, Any],
    groups: list[Group],
    text: Callable[[float], str],
    log: bool = False,
) -> Any:
    lines = sum(len(bars) + bool(heading) for heading, bars in groups)
    figure, axis = _figure(title, record, 7.6, 1.0 + 0.3 * lines)
    values = [value for _, bars in groups for value in bars.values()]
    left = min(values) / 3 if log else 0.0
    names: list[str] = []
    for heading, bars in groups:
        if heading:
            axis.text(left, len(names), heading, fontweight="bold", va="center")
            names.append("")
        for name, value in sorted(bars.items(), key=lambda bar: -bar[1] if log else 0):
            ours = name.startswith((OUR_NAME, "logra"))
            colour = OUR_COLOUR if ours else PALE
            axis.barh(len(names), value - left, left=left, height=0.7, color=colour)
            axis.text(value, len(names), f" {text(value)}", va="center", fontsize=9.5)
            names.append(name.replace("logra", OUR_NAME) if log else name)
    axis.set(xscale="log" if log else "linear", ylim=(len(names) - 0.4, -0.6))
    axis.set_xlim(left, (14 if log else 1.2) * max(values))
    axis.set_yticks(range(len(names)), names)
    axis.tick_params(axis="both", which="both", length=0, labelbottom=False)
    axis.spines["bottom"].set_visible(False)
    height = figure.get_size_inches()[1]
    figure.subplots_adjust(left=0.39, right=0.98, top=1 - 0.72 / height, bottom=0.03)
    return figure


def _figure(
    title: str, record: dict[str, Any], width: float, height: float, panels: int | None = None
) -> tuple[Any, Any]:
    """A figure and its axis; with panels, a list of so many axes."""
    from matplotlib import pyplot

    machine = record["machine"]
    have = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "BF16", "amx_bf16": "AMX"}
    flags = ", ".join(text for flag, text in have.items() if flag in machine["flags"])
    figure, drawn = pyplot.subplots(
        1, panels or 1, figsize=(width, height), facecolor="white", squeeze=False
    )
    axes = list(drawn[0])
    for axis in axes:
        axis.spines[["top", "right", "left"]].set_visible(False)
    figure.text(0.02, 1 - 0.14 / height, title, fontsize=12.5, fontweight="bold", va="top")
    where = f"{machine['cpu']} ({flags}), {machine['threads']} threads, torch {machine['torch']}"
    figure.text(0.02, 1 - 0.42 / height, where, fontsize=9, color=GREY, va="top")
    return figure, axes[0] if panels is None else axes


def _count(value: float) -> str:
    return f"{value / 1e6:.3g} million" if value >= 1e6 else f"{value:,.0f}"


PICTURES: dict[str, Callable[[], Any]] = {
    "scan": scan,
    "logging": logging,
    "pairs": pairs,
    "accuracy": accuracy,
    "codecs": codecs,
    "brittleness": brittleness,
}


def main(argv: list[str] | None = None) -> None:
    """Draw the pictures of the stored results, as PNG with a palette: a third of the size."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=results.ROOT / "docs" / "images")
    args = parser.parse_args(argv)
    import matplotlib
    from PIL import Image

    matplotlib.use("Agg")
    for name, draw in PICTURES.items():
        figure = draw()
        if figure is None:
            print(f"{name}.png is left out: there are no results for it")
            continue
        data = io.BytesIO()
        figure.savefig(data, dpi=150, metadata={"Software": None})
        matplotlib.pyplot.close(figure)
        with Image.open(data) as image:
            small = image.convert("RGB").quantize(128, dither=Image.Dither.NONE)
        args.out.mkdir(parents=True, exist_ok=True)
        small.save(args.out / f"{name}.png", optimize=True)
        print(f"{name}.png: {(args.out / f'{name}.png').stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
