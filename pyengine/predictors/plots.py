"""The picture: recall by layer, a line for each form. Needs matplotlib (extra "bench")."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pyengine.errors import UsageError
from pyengine.predictors.figures import LayerReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: The forms, as they lie over each other: colour, width of the line, size of the mark, words.
_FORMS = {
    "fresh-gate": ("#222222", 1.2, 0, "the layer's own router (best possible)"),
    "fate": ("#c44e52", 1.6, 4, "Fate, plain: its router on an earlier input"),
    "fate-corrected": ("#e5a050", 1.6, 4, "Fate, corrected for the layers' gains"),
    "linear": ("#4c72b0", 2.4, 4, "learned, linear"),
    # Often tried for a few layers only, close to the linear one.
    "mlp": ("#1f8a4c", 1.6, 8, "learned, two layers"),
}
_CONTROLS = ("#999999", "#8172b3", "#937860", "#da8bc3")
_LABELS = {"recall@k": "of the experts a token uses, %", "miss_recall@k": "of those that are not resident, %"}


def draw_recall(path: Path, reports: Sequence[LayerReport], title: str) -> None:
    """Write a PNG: recall@k and, beside it, the same on the miss stream, by layer, a row for each distance.

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
    distances = sorted({r.distance for r in reports if r.distance > 0}) or [0]
    panels = [(name, distance) for distance in distances for name in _LABELS]
    figure = Figure(figsize=(10.0, 0.9 + 3.9 * len(distances)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(distances), len(_LABELS), squeeze=False, sharey=True).ravel()
    figure.suptitle(f"{title}: experts named before their router has spoken, recall by layer", fontsize=11)
    for axis, (name, distance) in zip(axes, panels, strict=True):
        _panel(axis, reports, distance, name)
    handles = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), fontsize=8, ncols=3, loc="outside lower center", frameon=False)
    figure.savefig(path, dpi=110, metadata={"Software": None} if path.suffix == ".png" else None)


def _panel(axis: Axes, reports: Sequence[LayerReport], distance: int, name: str) -> None:
    lines: dict[str, list[tuple[int, float]]] = {}
    for report in reports:
        if report.distance in (0, -1, distance):
            for form, figures in report.figures.items():
                if name in figures:
                    lines.setdefault(form, []).append((report.target, 100 * figures[name]))
    controls = [form for form in lines if form not in _FORMS]
    for form in sorted(lines, key=lambda form: [*controls, *_FORMS].index(form)):
        # A form that was not tried for a layer has a gap there.
        tried = dict(lines[form])
        points = [(layer, tried.get(layer, float("nan"))) for layer in range(min(tried), max(tried) + 1)]
        control = form in controls
        colour, width, mark, words = (
            (_CONTROLS[controls.index(form) % len(_CONTROLS)], 1.4, 0, form) if control else _FORMS[form]
        )
        style = ":" if control or form == "fresh-gate" else "-"
        axis.plot(*zip(*points, strict=True), style, color=colour, marker=".", ms=mark, lw=width, label=words)
    axis.set_ylim(0, 103)
    axis.set_xlabel("layer", fontsize=9)
    axis.set_ylabel(_LABELS[name], fontsize=9)
    axis.set_title(f"{distance} layer{'' if distance == 1 else 's'} ahead", fontsize=9)
    axis.tick_params(labelsize=8, labelleft=True)
    axis.grid(True, linewidth=0.3, alpha=0.6)
