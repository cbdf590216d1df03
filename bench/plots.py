"""Draws the figures of bench/results as PNGs, one style for all.

    python bench/plots.py [--results bench/results] [--out bench/results/plots] [NAME ...]

NAME is a function's below: allreduce_sizes, allreduce_speedup, bitrate, scaling, time_to_accuracy. A file that is not
there is left out, and said so. Colours stand for methods and are the same in every plot; bars and bands from the 10th
to the 90th percentile are spread over repeats, not uncertainty of the median.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

mpl.use("Agg")

RESULTS = Path(__file__).parent / "results"
STYLE = {
    "font.size": 10.0,
    "axes.titlesize": 11.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 9.0,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "figure.dpi": 130,
}
# Okabe and Ito's colours, which people who do not see all colours can tell apart; grey and dashes for what is local.
COLOURS = {
    "no exchange": "#777777",
    "fp32": "#000000",
    "fp16": "#999999",
    "bf16": "#56b4e9",
    "powersgd r=1": "#f0c27b",
    "powersgd r=2": "#e69f00",
    "powersgd r=4": "#a06f00",
    "int8": "#cc79a7",
    "qcomm k=0.5": "#66c2a5",
    "qcomm k=1": "#009e73",
    "qcomm k=2": "#0072b2",
    "qcomm k=3.2": "#3b3eac",
    "qcomm k=3.4": "#22165c",
    "qcomm range c=6": "#8c6bb1",
    "qcomm auto": "#d55e00",
}
RATES = {"100mbit": "100 Mb/s", "1gbit": "1 Gb/s", "10gbit": "10 Gb/s", "none": "loopback"}

Document = dict[str, Any]


def spread(row: Document, scale: float = 1.0) -> list[list[float]]:
    """Distances to the 10th and 90th percentile, as matplotlib wants error bars."""
    return [[scale * (row["seconds"] - row["p10"])], [scale * (row["p90"] - row["seconds"])]]


def plain_ticks(axes: Axes, which: str) -> None:
    """Numbers instead of powers on a logarithmic axis."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def allreduce_sizes(document: Document) -> Figure:
    """``bench_allreduce --sizes``: time of an all-reduce against the buffer's size."""
    places = sorted({(row["rate"], row["world_size"]) for row in document["rows"]})
    figure = Figure(figsize=(5.2 * len(places) + 1.6, 4.2), layout="constrained")
    panels = figure.subplots(1, len(places), squeeze=False, sharey=True)[0]
    for axes, (rate, world_size) in zip(panels, places, strict=True):
        rows = [row for row in document["rows"] if (row["rate"], row["world_size"]) == (rate, world_size)]
        for method in dict.fromkeys(row["method"] for row in rows):
            points = sorted((row for row in rows if row["method"] == method), key=lambda row: row["mib"])
            sizes = [row["mib"] for row in points]
            axes.plot(sizes, [1e3 * row["seconds"] for row in points], "o-", color=COLOURS[method], label=method)
            axes.fill_between(
                sizes, [1e3 * r["p10"] for r in points], [1e3 * r["p90"] for r in points],
                color=COLOURS[method], alpha=0.12, linewidth=0,
            )  # fmt: skip
        axes.set(xscale="log", yscale="log", xlabel="fp32 gradients (MiB)")
        axes.set_xticks(sorted({row["mib"] for row in rows}))
        for which in "xy":
            plain_ticks(axes, which)
        axes.set_title(f"{RATES.get(rate, rate)}, {world_size} ranks")
    panels[0].set_ylabel("all-reduce, median and p10 to p90 (ms)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center")
    return figure


def allreduce_speedup(document: Document) -> Figure:
    """``bench_allreduce``: how many times faster than an fp32 all-reduce, by link."""
    rows = [row for row in document["rows"] if row["mib"] == document["rows"][0]["mib"]]
    places = list(dict.fromkeys((row["rate"], row["world_size"]) for row in rows))
    methods = [name for name in dict.fromkeys(row["method"] for row in rows) if name != "fp32"]
    figure = Figure(figsize=(9.0, 4.4), layout="constrained")
    axes = figure.subplots()
    width = 0.86 / len(methods)
    for number, method in enumerate(methods):
        for place, (rate, world_size) in enumerate(places):
            of_place = {row["method"]: row for row in rows if (row["rate"], row["world_size"]) == (rate, world_size)}
            row, fp32 = of_place[method], of_place["fp32"]["seconds"]
            ratio = row["ratio_to_fp32"]
            low, high = fp32 / row["p90"], fp32 / row["p10"]
            position = place - 0.43 + (number + 0.5) * width
            label = method if place == 0 else None
            axes.bar(position, ratio, 0.92 * width, color=COLOURS[method], label=label)
            ends = [[max(0.0, ratio - low)], [max(0.0, high - ratio)]]
            axes.errorbar(position, ratio, ends, color="#333333", linewidth=0.9, capsize=1.5)
    axes.axhline(1.0, color=COLOURS["fp32"], linewidth=1.0)
    axes.set_xticks(range(len(places)), [f"{RATES.get(rate, rate)}\n{ranks} ranks" for rate, ranks in places])
    axes.grid(visible=False, axis="x")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylabel("times as fast as fp32 (logarithmic; line: 1)")
    axes.set_title(f"All-reduce of {rows[0]['mib']:g} MiB of ResNet-18's gradients")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center")
    return figure


def bitrate(document: Document) -> Figure:
    """``bench_bitrate``: bits by layer and step as a heat map for each method, and by step as lines."""
    runs = document["runs"]
    layers = runs[0]["layers"]
    figure = Figure(figsize=(4.3 * len(runs) + 1.2, 0.17 * len(layers) + 4.4), layout="constrained")
    grid = figure.add_gridspec(2, len(runs), height_ratios=(0.17 * len(layers) + 0.6, 3.0))
    for column, run in enumerate(runs):
        steps, bits = run["steps"], run["bits_per_element"]
        axes = figure.add_subplot(grid[0, column])
        by_layer = list(zip(*bits, strict=True))
        image = axes.imshow(
            by_layer, aspect="auto", interpolation="nearest", cmap="viridis",
            extent=(steps[0], steps[-1] + steps[1] - steps[0], len(layers) - 0.5, -0.5),
        )  # fmt: skip
        names = [layer["name"].removesuffix(".weight") for layer in layers]
        axes.set_yticks(range(len(layers)), names if column == 0 else [""] * len(layers), fontsize=7)
        axes.grid(visible=False)
        axes.set_title(run["method"])
        figure.colorbar(image, ax=axes, label="bits an element", shrink=0.9)
        lines = figure.add_subplot(grid[1, column], sharex=axes)
        lowest, highest = [min(row) for row in bits], [max(row) for row in bits]
        colour = COLOURS[run["method"]]
        lines.fill_between(steps, lowest, highest, color=colour, alpha=0.2, linewidth=0, label="layers, range")
        lines.plot(steps, [statistics.median(row) for row in bits], color=colour, label="layers, median")
        for phase, dashes in ((0, "--"), (1, ":")):
            sent = [row[phase] for row in run["bits_per_element_phases"]]
            lines.plot(steps, sent, dashes, color="#333333", linewidth=1.2, label=f"sent, phase {phase + 1}")
        lines.set(xlabel="step", ylim=(0, None))
        if column == 0:
            lines.set_ylabel("bits an element")
            lines.legend(loc="lower right", ncols=2)
    return figure


def scaling(document: Document) -> Figure:
    """``bench_scaling``: throughput and efficiency of a training step against the number of ranks."""
    rows = [row for row in document["rows"] if row["rate"] == document["rows"][0]["rate"]]
    launchers = list(dict.fromkeys(row["launcher"] for row in rows))
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    figure = Figure(figsize=(4.4 * len(modes) + 1.8, 3.4 * len(launchers)), layout="constrained")
    panels = figure.subplots(len(launchers), len(modes), squeeze=False, sharex=True, sharey="row")
    for line, launcher in zip(panels, launchers, strict=True):
        for axes, mode in zip(line, modes, strict=True):
            chosen = [row for row in rows if (row["launcher"], row["mode"]) == (launcher, mode)]
            draw_scaling(axes, chosen, document["cores"])
            axes.set_title(f"{mode} scaling, {launcher}")
        line[0].set_ylabel("images/s, median, p10 to p90")
        line[0].set_ylim(0, None)  # of the whole row
    for axes in panels[-1]:
        axes.set_xlabel("ranks")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside right center")
    return figure


def draw_scaling(axes: Axes, rows: Sequence[Document], cores: int) -> None:
    """One panel: throughput of every method, and of ranks that would not be in each other's way."""
    one = next(row for row in rows if row["ranks"] == 1)
    counts = sorted({row["ranks"] for row in rows})
    ideal = [count * one["images_per_second"] for count in counts]
    axes.plot(counts, ideal, ":", color="#777777", linewidth=1.2, label="E(P) = 1")
    if cores < counts[-1]:
        axes.axvline(cores, color="#bbbbbb", linewidth=1.0, linestyle="--")
        axes.annotate(f"{cores} cores", (cores, 0.02), xycoords=("data", "axes fraction"), fontsize=8, color="#777777")
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for number, method in enumerate(methods):
        # One rank exchanges nothing, whatever the method.
        points = [one, *(row for row in rows if row["method"] == method and row is not one)]
        speeds = [row["images_per_second"] for row in points]
        images = [row["ranks"] * row["batch"] for row in points]
        ends = [
            [speed - n / row["p90"] for speed, n, row in zip(speeds, images, points, strict=True)],
            [n / row["p10"] - speed for speed, n, row in zip(speeds, images, points, strict=True)],
        ]
        style = "s--" if method == "no exchange" else "o-"
        # Side by side, so that no spread hides another.
        dodge = 0.05 * (number - (len(methods) - 1) / 2)
        places = [row["ranks"] + (dodge if row is not one else 0.0) for row in points]
        axes.errorbar(places, speeds, ends, fmt=style, color=COLOURS[method], label=method, capsize=2, elinewidth=1)
    axes.set_xticks(counts)


def time_to_accuracy(document: Document) -> Figure:
    """``bench_time_to_accuracy``: test accuracy against seconds of training, and the seconds to the target."""
    runs, target = document["runs"], document["target"]
    methods = list(dict.fromkeys(run["method"] for run in runs))
    figure = Figure(figsize=(9.2, 4.0), layout="constrained")
    curves, bars = figure.subplots(1, 2, width_ratios=(1.6, 1.0))
    for number, method in enumerate(methods):
        of_method = [run for run in runs if run["method"] == method]
        for run in of_method:
            _, seconds, accuracy = zip(*run["points"], strict=True)
            label = method if run is of_method[0] else None
            curves.plot(seconds, [100 * value for value in accuracy], color=COLOURS[method], label=label)
        times = [run["seconds"] for run in of_method]
        middle, reached = statistics.median(times), all(run["reached"] for run in of_method)
        bars.barh(number, middle, color=COLOURS[method], hatch=None if reached else "//", edgecolor="white")
        if len(times) > 1:
            ends = [[middle - min(times)], [max(times) - middle]]
            bars.errorbar(middle, number, xerr=ends, color="#333333", linewidth=1, capsize=2)
        text = f"{middle:.0f} s" if reached else f"not in {middle:.0f} s"
        bars.annotate(text, (max(times), number), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9)
    curves.axhline(100 * target, color="#777777", linewidth=1.0, linestyle="--")
    curves.set(xscale="log", xlabel="seconds of training, tests left out", ylabel="test accuracy (%)")
    plain_ticks(curves, "x")
    curves.set_title(f"{document['task']['model']}, {document['ranks']} ranks, {RATES.get(document['rate'], 'link')}")
    figure.legend(*curves.get_legend_handles_labels(), loc="outside lower center", ncols=len(methods))
    bars.set_yticks(range(len(methods)), methods)
    bars.invert_yaxis()
    bars.grid(visible=False, axis="y")
    bars.set_xlim(0, 1.3 * max(run["seconds"] for run in runs))
    bars.set(xlabel="seconds")
    bars.set_title(f"to {target:.0%}")
    return figure


PLOTS: dict[str, tuple[str, Callable[[Document], Figure]]] = {
    "allreduce_sizes": ("allreduce_sizes.json", allreduce_sizes),
    "allreduce_speedup": ("allreduce.json", allreduce_speedup),
    "bitrate": ("bitrate.json", bitrate),
    "scaling": ("scaling.json", scaling),
    "time_to_accuracy": ("time_to_accuracy.json", time_to_accuracy),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PLOTS)}; all without one")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=RESULTS / "plots")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(PLOTS)
    if unknown:
        parser.error(f"NAME must be of {', '.join(PLOTS)}, got {', '.join(sorted(unknown))}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.names or PLOTS:
        source, draw = PLOTS[name]
        if not (arguments.results / source).is_file():
            print(f"plots: {name} is left out, there is no {arguments.results / source}", file=sys.stderr)
            continue
        with mpl.rc_context(STYLE):
            figure = draw(json.loads((arguments.results / source).read_text()))
            figure.savefig(arguments.out / f"{name}.png", metadata={"Software": None})
    return 0


if __name__ == "__main__":
    sys.exit(main())
