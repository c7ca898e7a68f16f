"""Hit rate against the budget, a curve for each policy; beside it how much of the way from LRU to Belady each goes,
where curves that lie close together part. Needs matplotlib (extra "bench")."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyengine.errors import UsageError
from pyengine.replay.run import BELADY, BOUNDS, LRU, NONE, Result, gaps_closed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = (
    "#4c72b0",
    "#dd8452",
    "#2a9d5c",
    "#c44e52",
    "#8172b3",
    "#937860",
    "#da8bc3",
    "#17a2b8",
    "#b5a000",
    "#666666",
)
#: Curves may coincide: marks of different shapes, and lines ever thinner, show that there is more than one.
_MARKS = "osD^vP*Xhd"
_WIDEST, _THINNEST = 3.2, 1.0
_BOUND_LINES = {BELADY: "-", "sch": ":"}


def draw(results: Sequence[Result], title: str, path: Path) -> None:
    """Write a picture.

    Raises:
        UsageError: matplotlib is not installed, or does not know the kind of file.
        OSError: the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError('plots need matplotlib: pip install "pyengine[bench]"') from error
    gaps = gaps_closed(results)
    compared = any(gap is not None and r.policy not in (*BOUNDS, LRU) for r, gap in zip(results, gaps, strict=True))
    figure = Figure(figsize=(10.0 if compared else 7.2, 5.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2 if compared else 1, squeeze=False)[0]
    _hit_rates(axes[0], results)
    if compared:
        _gaps(axes[1], results, gaps)
    for axis in axes:
        _budget_axis(axis, results)
    figure.suptitle(title, fontsize=11)
    lines = axes[0].get_legend_handles_labels()
    figure.legend(*lines, fontsize=8, ncols=5, loc="outside lower center", frameon=False)
    try:
        figure.savefig(path, dpi=110, metadata={"Software": None} if path.suffix == ".png" else None)
    except ValueError as error:
        raise UsageError(f"{path.name}: matplotlib cannot write this kind of file") from error


def _hit_rates(axis: Axes, results: Sequence[Result]) -> None:
    for name in _names(results):
        points = [(_budget(r), 100 * r.hit_rate) for r in results if _key(r) == name]
        _curve(axis, results, name, points)
    axis.set_ylabel("hit rate, %", fontsize=9)


def _gaps(axis: Axes, results: Sequence[Result], gaps: Sequence[float | None]) -> None:
    shown = []
    for name in _names(results):
        points = [
            (_budget(r), 100 * gap) for r, gap in zip(results, gaps, strict=True) if gap is not None and _key(r) == name
        ]
        if points:
            _curve(axis, results, name, points)
            shown += [gap for _, gap in points]
    # One bad policy must not press the others flat.
    axis.set_ylim(max(-60.0, min(shown) - 5), min(130.0, max(shown) + 5))
    axis.set_ylabel("of the way from LRU (0) to Belady (100), %", fontsize=9)


def _curve(axis: Axes, results: Sequence[Result], name: tuple[str, str], points: Sequence[tuple[float, float]]) -> None:
    policy, predictor = name
    label = policy if predictor == NONE else f"{policy} + {predictor}"
    x, y = zip(*sorted(points), strict=True)
    if policy in BOUNDS:
        label += " (knows the future)"
        axis.plot(x, y, color="black", linestyle=_BOUND_LINES[policy], linewidth=1.8, label=label, zorder=1)
        return
    online = [key for key in _names(results) if key[0] not in BOUNDS]
    number = online.index(name)
    width = _WIDEST + (_THINNEST - _WIDEST) * number / max(1, len(online) - 1)
    axis.plot(
        x,
        y,
        color=_COLOURS[number % len(_COLOURS)],
        linewidth=width,
        marker=_MARKS[number % len(_MARKS)],
        markersize=2.5 + 1.2 * width,
        markeredgewidth=0,
        alpha=0.9,
        label=label,
    )


def _budget_axis(axis: Axes, results: Sequence[Result]) -> None:
    """Percent below, slots per layer above."""
    n_expert = results[0].layout.n_expert if results else 1
    shared = any(not r.layout.per_layer for r in results)
    axis.set_xlabel("budget, % of all experts", fontsize=9)

    def slots(percent: Any) -> Any:
        return percent * n_expert / 100

    def percent(slots: Any) -> Any:
        return slots * 100 / n_expert

    above = axis.secondary_xaxis("top", functions=(slots, percent))
    above.set_xlabel("slots per layer" + (", shared by all layers" if shared else ""), fontsize=8)
    above.tick_params(labelsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(True, linewidth=0.3, alpha=0.6)


def _budget(result: Result) -> float:
    """% of all experts."""
    return 100 * result.layout.cache_shape.slots_per_layer / result.layout.n_expert


def _names(results: Sequence[Result]) -> list[tuple[str, str]]:
    return list(dict.fromkeys(_key(r) for r in results))


def _key(result: Result) -> tuple[str, str]:
    return result.policy, result.predictor
