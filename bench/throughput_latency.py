"""A picture of what batch_curves.py measured: tokens per second of all texts together against the time between two
tokens of one text, a curve over the number of texts for each kind.

    .venv/bin/python bench/throughput_latency.py bench/results/batch_curves.csv -o docs/throughput.png
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.ticker import LogLocator, NullFormatter

from pyengine.bench.rows import AUTO, LRU_BUNDLE, ON_DEMAND, STOCK_MMAP_PLAIN, STOCK_RESIDENT

#: Kind -> (what it is called, marker, where its points' numbers stand, in points), in the order of the legend.
KINDS = {
    AUTO: ("pyengine", "o", (-4, 7)),
    STOCK_RESIDENT: ("stock llama.cpp, all in memory, no limit", "x", (6, -10)),
    LRU_BUNDLE: ("plain LRU", "s", (5, -11)),
    ON_DEMAND: ("load on demand", "v", (5, -11)),
    STOCK_MMAP_PLAIN: ("stock llama.cpp, memory-mapped", "D", (5, -11)),
}


def read(files: Sequence[Path]) -> Mapping[str, Mapping[int, float]]:
    """Kind -> texts at once -> seconds of a step, median of the rounds."""
    found: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for file in files:
        with file.open(newline="") as lines:
            for row in csv.DictReader(lines):
                if row["step_s"]:
                    found[row["kind"]][int(row["n"])].append(float(row["step_s"]))
    return {kind: {n: statistics.median(steps) for n, steps in sorted(of.items())} for kind, of in found.items()}


def draw(found: Mapping[str, Mapping[int, float]], out: Path) -> None:
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for kind, (name, marker, place) in KINDS.items():
        if steps := found.get(kind):
            x, y = list(steps.values()), [n / step for n, step in steps.items()]
            (curve,) = axes.plot(x, y, marker=marker, label=name, linewidth=2 if kind == AUTO else 1.2)
            for n, where in zip(steps, zip(x, y, strict=True), strict=True):
                axes.annotate(
                    f"{n}", where, textcoords="offset points", xytext=place, fontsize=8, color=curve.get_color()
                )
    axes.set(xscale="log", yscale="log", xlabel="seconds between two tokens of one text")
    axes.set_ylabel("tokens per second, all texts")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())
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
