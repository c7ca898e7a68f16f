"""The plots: figures of pyengine against the budget, baselines as level lines. Needs matplotlib (extra "bench")."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyengine.bench.rows import (
    AUTO,
    LFU_BUNDLE,
    LRU,
    LRU_BUNDLE,
    ON_DEMAND,
    STOCK_MMAP,
    STOCK_MMAP_PLAIN,
    STOCK_RESIDENT,
)
from pyengine.bench.samples import Sample
from pyengine.bench.summary import LABEL_OF_REPLAY
from pyengine.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: File name -> (column, title, unit of the axis).
PLOTS: dict[str, tuple[str, str, str]] = {
    "decode": ("decode_tok_per_s", "Decode", "tokens/s"),
    "prefill": ("prefill_tok_per_s", "Prefill", "tokens/s"),
    "first_token": ("ttft_s", "Load to first token, cold cache", "s"),
    "bytes_per_token": ("disk_mb_per_token", "Read from disk while decoding", "MB per token"),
    "bandwidth": ("bandwidth_mb_per_s", "Achieved bandwidth while loads are under way", "MB/s"),
}

_COLOURS = {
    STOCK_RESIDENT: "#222222",
    STOCK_MMAP: "#c44e52",
    STOCK_MMAP_PLAIN: "#dd8452",
    ON_DEMAND: "#8172b3",
    LRU: "#4c72b0",
    LRU_BUNDLE: "#2a9d5c",
    LFU_BUNDLE: "#d4a017",
    AUTO: "#d62728",
}
#: Curves may coincide: a wide one shows beside a narrow one.
_WIDTHS = {LRU: 3.0, LRU_BUNDLE: 1.4, LFU_BUNDLE: 2.2, AUTO: 1.4}
_LINES = {STOCK_RESIDENT: "-", STOCK_MMAP: ":", STOCK_MMAP_PLAIN: "--", ON_DEMAND: "-."}


#: Largest over smallest value from which on an axis is logarithmic.
_WIDE = 8.0


def draw(samples: Sequence[Sample], folder: Path) -> list[Path]:
    """Write one PNG for each entry of PLOTS that has data, a panel for each model; returns their paths. There are none
    for samples of a single budget.

    Raises:
        UsageError: matplotlib is not installed.
        OSError: a file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError('plots need matplotlib: pip install "pyengine[bench]"') from error
    written: list[Path] = []
    if len({sample.share for sample in samples if sample.share is not None}) < 2:
        return written
    models = list(dict.fromkeys(sample.model for sample in samples))
    for name, (column, title, unit) in PLOTS.items():
        figure = Figure(figsize=(0.6 + 5.4 * len(models), 4.4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, len(models), squeeze=False)[0]
        drawn = [_panel(axis, samples, model, column) for axis, model in zip(axes, models, strict=True)]
        if not any(drawn):
            continue
        figure.suptitle(f"{title} ({unit})", fontsize=11)
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=110, metadata={"Software": None})  # the same bytes for the same data
        written.append(path)
    return written


def _panel(axis: Axes, samples: Sequence[Sample], model: str, column: str) -> bool:
    """Draw one model; False if there is nothing to draw."""
    mine = [s for s in samples if s.model == model and s.status == "ok" and getattr(s, column) is not None]
    for kind, colour in _COLOURS.items():
        points = [(s.share, getattr(s, column)) for s in mine if s.kind == kind]
        if not points:
            continue
        if points[0][0] is None:
            axis.axhline(
                _median([y for _, y in points]), color=colour, linestyle=_LINES[kind], linewidth=1.4, label=kind
            )
        else:
            _curve(axis, points, kind, colour)
    if column == "bandwidth_mb_per_s":
        _probe_curve(axis, mine)
    gone = sorted({f"{s.kind}: {s.status}" for s in samples if s.model == model and s.status == "out of memory"})
    replay = next((f"\n{LABEL_OF_REPLAY}" for s in mine if s.replay), "")
    axis.set_title(model.removesuffix(".gguf") + replay, fontsize=9)
    axis.set_xlabel("expert budget, % of all experts", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.set_xlim(0, 104)
    values = [getattr(s, column) for s in mine]
    if mine and min(values) > 0 and max(values) > _WIDE * min(values):
        axis.set_yscale("log")
        _plain_ticks(axis)
    else:
        axis.set_ylim(bottom=0)
    axis.grid(True, which="both", linewidth=0.3, alpha=0.6)
    if mine:
        axis.legend(fontsize=7.5, title="\n".join(gone) or None, title_fontsize=7.5)
    return bool(mine)


def _curve(axis: Axes, points: Sequence[tuple[Any, float]], kind: str, colour: str) -> None:
    shares = sorted({share for share, _ in points})
    middle = [_median([y for share, y in points if share == x]) for x in shares]
    axis.plot(shares, middle, color=colour, linewidth=_WIDTHS[kind], label=kind)
    axis.plot([x for x, _ in points], [y for _, y in points], ".", color=colour, markersize=5)


def _probe_curve(axis: Axes, samples: Sequence[Sample]) -> None:
    for kind in (LRU, LRU_BUNDLE):
        points = [s for s in samples if s.kind == kind and s.probe_mb_per_s]
        if points:
            middle = _median([s.probe_mb_per_s for s in points if s.probe_mb_per_s])
            label = f"disk probe, reads as {kind}"
            axis.axhline(middle, color=_COLOURS[kind], linestyle=":", linewidth=1.2, label=label)


def _plain_ticks(axis: Axes) -> None:
    """Numbers instead of powers of ten, enough of them on a short logarithmic axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def _median(values: Sequence[float]) -> float:
    import statistics

    return statistics.median(values)
