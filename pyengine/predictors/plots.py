"""The picture: recall by layer, a line for each form. Needs matplotlib (extra "bench")."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pyengine.errors import UsageError
from pyengine.predictors.figures import LayerReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = {
    "fresh-gate": "#222222",
    "fate": "#c44e52",
    "fate-corrected": "#dd8452",
    "linear": "#4c72b0",
    "mlp": "#2a9d5c",
}
_CONTROL_COLOURS = ("#999999", "#8172b3", "#937860", "#da8bc3")
_LABELS = {"recall@k": "recall of the experts a token uses", "miss_recall@k": "recall of those that are not resident"}


def draw_recall(path: Path, reports: Sequence[LayerReport], title: str) -> None:
    """Write a PNG: recall@k and, below it, the same on the miss stream, by layer, a column for each distance.

    Raises:
        UsageError: matplotlib is not installed.
        OSError: the file cannot be written.
        ValueError: the file's ending names a format that matplotlib does not write.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError('plots need matplotlib: pip install "pyengine[bench]"') from error
    distances = sorted({r.distance for r in reports if r.distance > 0})
    figure = Figure(figsize=(1.2 + 5.6 * max(1, len(distances)), 7.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, max(1, len(distances)), squeeze=False, sharey=True)
    figure.suptitle(title, fontsize=11)
    for row, name in enumerate(_LABELS):
        for column, distance in enumerate(distances or [0]):
            _panel(axes[row][column], reports, distance, name)
    handles = {label: line for axis in axes[0] for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), fontsize=8, ncols=5, loc="outside lower center")
    figure.savefig(path, dpi=110, metadata={"Software": None} if path.suffix == ".png" else None)


def _panel(axis: Axes, reports: Sequence[LayerReport], distance: int, name: str) -> None:
    lines: dict[str, list[tuple[int, float]]] = {}
    for report in reports:
        if report.distance in (0, -1, distance):
            for form, figures in report.figures.items():
                if name in figures:
                    lines.setdefault(form, []).append((report.target, figures[name]))
    controls = [form for form in lines if form not in _COLOURS]
    colours = _COLOURS | dict(zip(controls, _CONTROL_COLOURS, strict=False))
    for form, points in lines.items():
        # A form that was not tried for a layer has a gap there.
        tried = dict(points)
        points = [(layer, tried.get(layer, float("nan"))) for layer in range(min(tried), max(tried) + 1)]
        style = ":" if form in controls or form == "fresh-gate" else "-"
        axis.plot(
            *zip(*points, strict=True), style, color=colours.get(form, "#bbbbbb"), marker=".", ms=4, lw=1.5, label=form
        )
    axis.set_ylim(0, 1.03)
    axis.set_xlabel("layer", fontsize=9)
    axis.set_ylabel(_LABELS[name], fontsize=9)
    axis.set_title(f"{distance} layer{'' if distance == 1 else 's'} ahead", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(True, linewidth=0.3, alpha=0.6)
