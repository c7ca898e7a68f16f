"""A picture of what batch_ablation.py measured: answers' tokens per second, of all texts together, against the time
between two tokens of one text.

    .venv/bin/python bench/throughput_latency.py bench/results/batch_ablation.csv [MORE.csv] -o docs/throughput.png
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

#: Column -> (what it is called, marker), in the order of the legend.
COLUMNS = {
    "planner": ("pyengine, the planner's n", "o"),
    "reorder": ("pyengine, 8 texts", "s"),
    "hot-prefetch": ("without reordering", "^"),
    "multi-batch": ("without fetching ahead", "v"),
    "one-by-one": ("one text at a time", "D"),
    "stock-resident": ("stock llama.cpp, all in memory", "x"),
}


def read(files: Sequence[Path]) -> Mapping[str, list[tuple[float, float, int]]]:
    """Column -> (seconds between tokens, tokens per second, texts) of each sample that has figures."""
    found = defaultdict(list)
    for file in files:
        with file.open(newline="") as lines:
            for row in csv.DictReader(lines):
                if row["tok_per_s"]:
                    speed, n = float(row["tok_per_s"]), int(row["n"])
                    found[row["column"]].append((n / speed, speed, n))
    return found


def draw(found: Mapping[str, list[tuple[float, float, int]]], out: Path) -> None:
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for column, (name, marker) in COLUMNS.items():
        if points := sorted(found.get(column, ())):
            x, y, n = zip(*points, strict=True)
            line = "-" if column in ("planner", "stock-resident") else ""
            axes.plot(x, y, marker=marker, linestyle=line, label=name)
            below = column == "stock-resident"
            for where in zip(x, y, n, strict=True):
                axes.annotate(
                    f"{where[2]}", where[:2], textcoords="offset points", xytext=(6, -11 if below else 5), fontsize=8
                )
    axes.set(xscale="log", yscale="log", xlabel="seconds between two tokens of one text")
    axes.set_ylabel("tokens per second, all texts")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("{x:g}")
    axes.tick_params(which="minor", labelsize=7)
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.legend(fontsize=8)
    figure.savefig(out, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/throughput.png"))
    arguments = parser.parse_args()
    draw(read(arguments.files), arguments.output)


if __name__ == "__main__":
    main()
