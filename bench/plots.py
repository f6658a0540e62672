"""Pictures of the stored results: python -m bench.plots [--results FOLDER] [--out FOLDER]

scan.png      time of a scan over the number of queries, with the least that the machine allows
logging.png   time of logging beside the passes that no logging can do without
pairs.png     influence scores a second beside the libraries' that do the same

A picture without results is left out, with a line that says so. The pictures have a light
background, so that they read alike on light and dark pages.
"""

import argparse
import io
import re
from collections.abc import Callable
from math import log
from pathlib import Path
from typing import Any

from bench.harness import results
from bench.harness.cases import is_ours

INK, GREY, PALE = "#1f2430", "#6b7280", "#d5d9e0"
OUR_COLOUR, OUR_NAME = "#c2410c", "logra_kernels"
# The lines of scan.png: a name, how its providers' names begin, and a colour.
LINES = (
    ("faiss flat", "faiss flat", "#c084fc"),
    ("faiss SQfp16", "faiss SQfp16", "#7e22ce"),
    ("numpy", "numpy", "#0f766e"),
    ("torch fp32", "torch fp32", "#60a5fa"),
    ("torch fp16 mm", "torch fp16", "#1d4ed8"),
    (OUR_NAME, "logra", OUR_COLOUR),
)
# The bars of logging.png: providers, and what they are called there.
BARS = {
    "floor": "forward and activation gradients alone",
    "logra": f"{OUR_NAME}: with every row",
    "torch hooks, einsum": "hooks and einsum in torch",
    "full backward": "training's full backward, no rows",
}
# Of the peers' parts, the cases that are drawn, and their titles; "influence" has another case too.
PEERS_CASES = {
    "l-relatif": ("l-RelatIF", "l-RelatIF"),
    "influence": ("influence", "Influence (Eq. 3)"),
}
IMAGES = Path(__file__).parents[1] / "docs" / "images"
MOST_BYTES = 80_000


def scan(folder: Path) -> Any:
    """Lines over Q, labelled at their ends; what the machine does not allow is shaded."""
    records = [r for r in results.latest("scores", folder) if r["params"].get("rows") == "float16"]
    if not records:
        return None
    largest = max(r["params"]["R"] * r["params"]["D"] for r in records)
    records = [r for r in records if r["params"]["R"] * r["params"]["D"] == largest]
    records.sort(key=lambda r: int(r["params"]["Q"]))
    first = records[0]["params"]
    lines = {name: [_best(record, begins) for record in records] for name, begins, _ in LINES}
    lines = {name: values for name, values in lines.items() if any(values)}
    reads = sorted(2e-6 * largest / r["limits"]["read_gb_per_s"] for r in records)
    read = reads[len(reads) // 2]
    floor = [
        max(read, 2e-6 * r["params"]["Q"] * largest / r["limits"]["fma_gflop_per_s"])
        for r in records
    ]

    figure, axis = _figure(7.6, 4.6)
    at = list(range(len(records)))
    bottom = min(min(v for v in values if v) for values in lines.values()) / 2.5
    axis.fill_between(at, floor, bottom, color="#f1f2f5", zorder=0, linewidth=0)
    axis.plot(at, floor, color=GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axis.text(0.05, read / 1.12, "memory read once", color=GREY, fontsize=9, va="top")
    axis.text(at[-1], floor[-1] / 5.5, "fp32 multiply-adds ", color=GREY, fontsize=9, ha="right")
    ends = []
    colours = {name: colour for name, _, colour in LINES}
    for name, values in lines.items():
        points = [(x, y) for x, y in zip(at, values, strict=True) if y is not None]
        xs, ys = zip(*points, strict=True)
        width, size = (3.0, 7) if name == OUR_NAME else (1.6, 4)
        axis.plot(xs, ys, color=colours[name], linewidth=width, marker="o", markersize=size,
                  zorder=3)  # fmt: skip
        ends.append((ys[-1], f"{name}  {_ms(ys[-1])}", colours[name], name == OUR_NAME))
    axis.set_yscale("log")
    axis.set_ylim(bottom=bottom)
    axis.set_xlim(-0.15, at[-1] + 0.08)
    axis.set_xticks(at, [str(r["params"]["Q"]) for r in records])
    axis.set_xlabel("queries in one scan", color=INK)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.6g}")
    axis.yaxis.set_minor_locator(_no_ticks())
    axis.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(axis="y", length=0)
    _label_ends(axis, ends)
    title = f"A scan of {first['R']:,} rows of {first['D']:,} in fp16, milliseconds"
    _title(figure, title, f"{_where(records[0]['machine'])}; faiss: the ten best rows only")
    figure.subplots_adjust(left=0.08, right=0.74, top=0.84, bottom=0.12)
    return figure


def logging(folder: Path) -> Any:
    """Bars of the newest logging case, in units of the floor."""
    records = results.latest("logging", folder)
    if not records:
        return None
    record = next((r for r in records if r["params"].get("model") == "llama"), records[0])
    found = {name: results.median_ms(record, name) for name in BARS}
    values = {name: value for name, value in found.items() if value is not None}
    if "floor" not in values:
        return None
    figure, axis = _figure(7.6, 2.5)
    for place, (name, value) in enumerate(values.items()):
        ratio = value / values["floor"]
        _bar(axis, place, ratio, f" {ratio:.2f}   {_ms(value)}", ours=name == "logra", height=0.62)
    axis.axvline(1.0, color=GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=3)
    axis.set_yticks(range(len(values)), [BARS[name] for name in values])
    axis.invert_yaxis()
    axis.set_xlim(0, 1.25 * max(values.values()) / values["floor"])
    _no_axes(axis)
    case = record["case"].rsplit(", ", 1)[0]
    _title(figure, f"Logging: {case}", _where(record["machine"]))
    figure.subplots_adjust(left=0.385, right=0.98, top=0.72, bottom=0.04)
    return figure


def pairs(folder: Path) -> Any:
    """Bars of pairs a second on a logarithmic axis, grouped by what is computed."""
    groups: list[tuple[str, dict[str, float]]] = []
    machine: dict[str, Any] = {}
    for record in results.latest("peers", folder):
        numbers = re.search(r"Q=16, N=(\d+)", record["case"])
        begins, title = PEERS_CASES.get(record["params"].get("part"), ("none of these", ""))
        if numbers is None or not record["case"].startswith(begins):
            continue
        machine = record["machine"]
        rates = {n: rate for n, rate in results.rates(record).items() if "logra's ops" not in n}
        groups.append((f"{title}, 16 queries, {int(numbers[1]):,} rows", rates))
    for record in results.latest("table1", folder)[-1:]:
        machine = record["machine"]
        best: dict[str, float] = {}
        for row in record["influence"]:
            key = "logra" if is_ours(row["system"].lower()) else "kronfluence EKFAC"
            best[key] = max(best.get(key, 0.0), row["pairs_per_s"])
        groups.append(("A small language model, each at its best batch", best))
    groups = [(title, rates) for title, rates in groups if len(rates) > 1]
    if not groups:
        return None

    bars = sum(len(rates) for _, rates in groups)
    figure, axis = _figure(7.6, 1.3 + 0.29 * bars + 0.42 * len(groups))
    place, ticks = 0.0, {}
    least = min(min(rates.values()) for _, rates in groups) / 3
    for title, rates in groups:
        axis.text(least, place + 0.05, title, fontsize=10, fontweight="bold", color=INK,
                  va="center")  # fmt: skip
        place += 1.0
        for name, rate in sorted(rates.items(), key=lambda item: -item[1]):
            ours = is_ours(name)
            _bar(axis, place, rate, f" {_count(rate)}", ours=ours, left=least)
            ticks[place] = name.replace("logra", OUR_NAME, 1) if ours else name
            place += 1.0
        place += 0.45
    axis.set_xscale("log")
    axis.set_xlim(least, 12 * max(max(rates.values()) for _, rates in groups))
    axis.set_ylim(place - 0.6, -0.6)
    axis.set_yticks(list(ticks), list(ticks.values()))
    _no_axes(axis)
    title = "Pairs of training example and query scored a second (logarithmic)"
    _title(figure, title, _where(machine))
    height = figure.get_size_inches()[1]
    figure.subplots_adjust(left=0.30, right=0.98, top=1 - 0.72 / height, bottom=0.03)
    return figure


def _best(record: dict[str, Any], begins: str) -> float | None:
    """Least median of the providers whose names begin so; rows kept in bf16 are another store."""
    found: list[float] = [
        row["median_ms"]
        for row in record["providers"]
        if row["provider"].startswith(begins) and "bf16 rows" not in row["provider"]
    ]
    return min(found, default=None)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 10, "axes.edgecolor": GREY, "text.color": INK})
    figure, axis = pyplot.subplots(figsize=(width, height), facecolor="white")
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(colors=INK, which="both")
    return figure, axis


def _bar(
    axis: Any, place: float, value: float, text: str, *, ours: bool, left: float = 0.0,
    height: float = 0.7,
) -> None:  # fmt: skip
    colour, weight = (OUR_COLOUR, "bold") if ours else (PALE, "normal")
    axis.barh(place, value - left, left=left, height=height, color=colour)
    axis.text(value, place, text, va="center", fontsize=9.5, color=INK, fontweight=weight)


def _no_axes(axis: Any) -> None:
    axis.tick_params(axis="y", length=0)
    axis.tick_params(axis="x", which="both", length=0, labelbottom=False)
    axis.spines["bottom"].set_visible(False)


def _no_ticks() -> Any:
    from matplotlib.ticker import NullLocator

    return NullLocator()


def _title(figure: Any, title: str, where: str) -> None:
    height = figure.get_size_inches()[1]
    figure.text(0.02, 1 - 0.14 / height, title, fontsize=12.5, fontweight="bold", va="top")
    figure.text(0.02, 1 - 0.42 / height, where, fontsize=9, color=GREY, va="top")


def _label_ends(axis: Any, ends: list[tuple[float, str, str, bool]]) -> None:
    """Labels at the right, pushed apart where lines end close together."""
    low, high = axis.get_ylim()
    ends = sorted(ends)
    places = [log(value / low) / log(high / low) for value, *_ in ends]  # of the axis' height
    for _ in range(200):
        for i in range(len(places) - 1):
            lack = 0.053 - (places[i + 1] - places[i])
            if lack > 0:
                places[i] -= lack / 2
                places[i + 1] += lack / 2
    for place, (_, text, colour, bold) in zip(places, ends, strict=True):
        axis.annotate(
            text, (1.0, place), xycoords="axes fraction", xytext=(7, 0),
            textcoords="offset points", color=colour, fontsize=10,
            fontweight="bold" if bold else "normal", va="center",
        )  # fmt: skip


def _where(machine: dict[str, Any]) -> str:
    names = {
        "avx2": "AVX2",
        "avx512f": "AVX-512",
        "avx512_bf16": "BF16",
        "avx512_fp16": "FP16",
        "amx_bf16": "AMX",
    }
    have = ", ".join(text for flag, text in names.items() if flag in machine["flags"])
    threads = f"{machine['threads']} thread{'s' if machine['threads'] != 1 else ''}"
    return f"{machine['cpu']} ({have}), {threads}, torch {machine['torch'].split('+')[0]}"


def _ms(value: float) -> str:
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"


def _count(value: float) -> str:
    for size, name in ((1e9, " billion"), (1e6, " million")):
        if value >= size:
            return f"{value / size:.3g}{name}"
    return f"{value:,.0f}"


PICTURES: dict[str, Callable[[Path], Any]] = {"scan": scan, "logging": logging, "pairs": pairs}


def save(figure: Any, path: Path) -> int:
    """Write a PNG with a palette, which is a third of the size; the bytes written."""
    from matplotlib import pyplot
    from PIL import Image

    data = io.BytesIO()
    figure.savefig(data, dpi=150, metadata={"Software": None})
    pyplot.close(figure)
    data.seek(0)
    with Image.open(data) as image:
        small = image.convert("RGB").quantize(128, dither=Image.Dither.NONE)
        path.parent.mkdir(parents=True, exist_ok=True)
        small.save(path, optimize=True)
    return path.stat().st_size


def main(argv: list[str] | None = None) -> None:
    """Draw the pictures of the stored results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=results.RESULTS)
    parser.add_argument("--out", type=Path, default=IMAGES)
    args = parser.parse_args(argv)
    import matplotlib

    matplotlib.use("Agg")
    for name, draw in PICTURES.items():
        figure = draw(args.results)
        if figure is None:
            print(f"{name}.png is left out: there are no results for it")
            continue
        num_bytes = save(figure, args.out / f"{name}.png")
        large = f", more than {MOST_BYTES:,}" if num_bytes > MOST_BYTES else ""
        print(f"{name}.png: {num_bytes:,} bytes{large}")


if __name__ == "__main__":
    main()
