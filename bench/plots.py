"""Pictures of the stored results: python -m bench.plots [--results FOLDER] [--out FOLDER]

scan.png      time of a scan over the number of queries, with the least that the machine allows
logging.png   time of logging beside the passes that no logging can do without
pairs.png     influence scores a second beside the libraries' that do the same

A picture whose results are missing is left out, with a line that says so. They have a light
background of their own, so that they read alike on light and dark pages.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import _results

INK, GREY, PALE = "#1f2430", "#6b7280", "#d5d9e0"
OURS = "#c2410c"
COLOURS = {
    "torch fp16 mm": "#1d4ed8",
    "torch fp32": "#60a5fa",
    "numpy": "#0f766e",
    "faiss SQfp16": "#7e22ce",
    "faiss flat": "#c084fc",
}
# Of the peers' parts, the cases that are drawn; "influence" also has one without curvature.
PEERS_CASES = {"l-relatif": "l-RelatIF", "influence": "influence"}
IMAGES = Path(__file__).parents[1] / "docs" / "images"
MOST_BYTES = 80_000


def scan(folder: Path) -> Any:
    """Lines over Q, labelled at their ends; the machine's floor is shaded."""
    records = [r for r in _results.latest("scores", folder) if r["params"].get("rows") == "float16"]
    if not records:
        return None
    largest = max(r["params"]["R"] * r["params"]["D"] for r in records)
    records = [r for r in records if r["params"]["R"] * r["params"]["D"] == largest]
    records.sort(key=lambda r: r["params"]["Q"])
    queries = [r["params"]["Q"] for r in records]
    first = records[0]["params"]
    lines: dict[str, list[float | None]] = {}
    for name, matches in (
        ("faiss flat", ("faiss flat",)),
        ("faiss SQfp16", ("faiss SQfp16",)),
        ("numpy", ("numpy",)),
        ("torch fp32", ("torch fp32",)),
        ("torch fp16 mm", ("torch fp16",)),
        ("logra_kernels", ("logra",)),
    ):
        values = [_best(record, matches) for record in records]
        if any(values):
            lines[name] = values
    floors = []
    for r in records:
        p, limits = r["params"], r["limits"]
        read = 2e3 * p["R"] * p["D"] / limits["read_gb_per_s"] / 1e9
        fma = 2e3 * p["Q"] * p["R"] * p["D"] / limits["fma_gflop_per_s"] / 1e9
        floors.append((read, fma))
    read = sorted(one for one, _ in floors)[len(floors) // 2]

    figure, axis = _figure(7.6, 4.6)
    at = list(range(len(queries)))
    bottom = min(min(v for v in values if v) for values in lines.values()) / 2.5
    floor = [max(read, fma) for _, fma in floors]
    axis.fill_between(at, floor, bottom, color="#f1f2f5", zorder=0, linewidth=0)
    axis.plot(at, floor, color=GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axis.text(0.05, read / 1.12, "memory read once", color=GREY, fontsize=9, va="top")
    axis.text(at[-1], floor[-1] / 5.5, "fp32 multiply-adds ", color=GREY, fontsize=9, ha="right")
    ends = []
    for name, values in lines.items():
        points = [(x, y) for x, y in zip(at, values, strict=True) if y is not None]
        ours = name == "logra_kernels"
        colour = OURS if ours else COLOURS[name]
        xs, ys = zip(*points, strict=True)
        width, size = (3.0, 7) if ours else (1.6, 4)
        axis.plot(xs, ys, color=colour, linewidth=width, marker="o", markersize=size, zorder=3)
        ends.append((ys[-1], f"{name}  {_ms(ys[-1])}", colour, ours))
    axis.set_yscale("log")
    axis.set_ylim(bottom=bottom)
    axis.set_xlim(-0.15, at[-1] + 0.08)
    axis.set_xticks(at, [str(q) for q in queries])
    axis.set_xlabel("queries in one scan", color=INK)
    _milliseconds(axis)
    _label_ends(axis, ends)
    machine = records[0]["machine"]
    title = f"A scan of {first['R']:,} rows of {first['D']:,} in fp16, milliseconds"
    _title(figure, axis, title, f"{_where(machine)}; faiss: the ten best rows only")
    figure.subplots_adjust(left=0.08, right=0.74, top=0.84, bottom=0.12)
    return figure


def logging(folder: Path) -> Any:
    """Bars of the newest logging case, in units of the floor."""
    records = _results.latest("logging", folder)
    if not records:
        return None
    record = next((r for r in records if r["params"].get("model") == "llama"), records[0])
    names = {
        "floor": "forward and activation gradients alone",
        "logra": "logra_kernels: with every row",
        "torch hooks, einsum": "hooks and einsum in torch",
        "full backward": "training's full backward, no rows",
    }
    values = {name: _results.median_ms(record, name) for name in names}
    if values["floor"] is None:
        return None
    figure, axis = _figure(7.6, 2.5)
    shown = [name for name in names if values[name] is not None]
    for place, name in enumerate(shown):
        ratio = values[name] / values["floor"]
        colour = OURS if name == "logra" else PALE
        axis.barh(place, ratio, height=0.62, color=colour)
        text = f" {ratio:.2f}   {_ms(values[name])}"
        weight = "bold" if name == "logra" else "normal"
        axis.text(ratio, place, text, va="center", color=INK, fontsize=10, fontweight=weight)
    axis.axvline(1.0, color=GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=3)
    axis.set_yticks(range(len(shown)), [names[name] for name in shown])
    axis.tick_params(axis="y", length=0)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.25 * max(values[name] for name in shown) / values["floor"])
    axis.set_xticks([])
    axis.spines["bottom"].set_visible(False)
    case = record["case"].rsplit(", ", 1)[0]
    _title(figure, axis, f"Logging: {case}", _where(record["machine"]))
    figure.subplots_adjust(left=0.385, right=0.98, top=0.72, bottom=0.04)
    return figure


def pairs(folder: Path) -> Any:
    """Bars of pairs a second on a logarithmic axis, grouped by what is computed."""
    groups: list[tuple[str, dict[str, float]]] = []
    machine = None
    titles = {"l-relatif": "l-RelatIF", "influence": "Influence (Eq. 3)"}
    for record in _results.latest("peers", folder):
        numbers = re.search(r"Q=16, N=(\d+)", record["case"])
        part = record["params"].get("part")
        if numbers is None or not record["case"].startswith(PEERS_CASES.get(part, "none of these")):
            continue
        machine = record["machine"]
        rates = {
            name: rate for name, rate in _results.rates(record).items() if "logra's ops" not in name
        }
        groups.append((f"{titles[part]}, 16 queries, {int(numbers[1]):,} rows", rates))
    for record in _results.latest("table1", folder)[-1:]:
        machine = record["machine"]
        rates = {}
        for row in record["influence"]:
            name = f"{row['system']} {row['variant']}".strip()
            rates[name] = max(rates.get(name, 0.0), row["pairs_per_s"])
        best: dict[str, float] = {}
        for name, rate in rates.items():
            ours = name.lower().startswith("logra")
            key = "logra" if ours else "kronfluence EKFAC"
            best[key] = max(best.get(key, 0.0), rate)
        groups.append(("A small language model, each at its best batch", best))
    groups = [(title, rates) for title, rates in groups if len(rates) > 1]
    if not groups:
        return None

    bars = sum(len(rates) for _, rates in groups)
    figure, axis = _figure(7.6, 1.3 + 0.29 * bars + 0.42 * len(groups))
    place, ticks, names = 0.0, [], []
    least = min(min(rates.values()) for _, rates in groups) / 3
    for title, rates in groups:
        axis.text(
            least, place + 0.05, title, fontsize=10, fontweight="bold", color=INK, va="center"
        )
        place += 1.0
        for name, rate in sorted(rates.items(), key=lambda item: -item[1]):
            ours = name.startswith("logra")
            axis.barh(place, rate - least, left=least, height=0.7, color=OURS if ours else PALE)
            text = f" {_count(rate)}"
            weight = "bold" if ours else "normal"
            axis.text(rate, place, text, va="center", fontsize=9.5, color=INK, fontweight=weight)
            ticks.append(place)
            names.append(name.replace("logra", "logra_kernels", 1) if ours else name)
            place += 1.0
        place += 0.45
    axis.set_xscale("log")
    axis.set_xlim(least, 12 * max(max(rates.values()) for _, rates in groups))
    axis.set_ylim(place - 0.6, -0.6)
    axis.set_yticks(ticks, names)
    axis.tick_params(axis="y", length=0)
    axis.tick_params(axis="x", which="both", length=0, labelbottom=False)
    axis.spines["bottom"].set_visible(False)
    title = "Pairs of training example and query scored a second (logarithmic)"
    _title(figure, axis, title, _where(machine))
    height = figure.get_size_inches()[1]
    figure.subplots_adjust(left=0.30, right=0.98, top=1 - 0.72 / height, bottom=0.03)
    return figure


def _best(record: dict[str, Any], starts: tuple[str, ...]) -> float | None:
    """Least median of the providers whose names start so; rows kept in bf16 are another store."""
    found = [
        row["median_ms"]
        for row in record["providers"]
        if row["provider"].startswith(starts) and "bf16 rows" not in row["provider"]
    ]
    return min(found) if found else None


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 10, "axes.edgecolor": GREY, "text.color": INK})
    figure, axis = pyplot.subplots(figsize=(width, height), facecolor="white")
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(colors=INK, which="both")
    return figure, axis


def _title(figure: Any, axis: Any, title: str, where: str) -> None:
    height = figure.get_size_inches()[1]
    figure.text(0.02, 1 - 0.14 / height, title, fontsize=12.5, fontweight="bold", va="top")
    figure.text(0.02, 1 - 0.42 / height, where, fontsize=9, color=GREY, va="top")


def _milliseconds(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, NullLocator

    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(axis="y", length=0)


def _label_ends(axis: Any, ends: list[tuple[float, str, str, bool]]) -> None:
    """Labels at the right, pushed apart where lines end close together."""
    from math import log

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
            text,
            (1.0, place),
            xycoords="axes fraction",
            xytext=(7, 0),
            textcoords="offset points",
            color=colour,
            fontsize=10,
            fontweight="bold" if bold else "normal",
            va="center",
        )


def _where(machine: dict[str, Any]) -> str:
    flags = machine["flags"]
    names = {
        "avx2": "AVX2",
        "avx512f": "AVX-512",
        "avx512_bf16": "BF16",
        "avx512_fp16": "FP16",
        "amx_bf16": "AMX",
    }
    have = ", ".join(text for flag, text in names.items() if flag in flags)
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
    """As a PNG with a palette, which is a third of the size; the bytes written."""
    import io

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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=_results.RESULTS)
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
