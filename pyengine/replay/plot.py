"""Hit rate against the number of slots, a curve for each policy. Needs matplotlib (extra "bench")."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pyengine.errors import UsageError
from pyengine.replay.run import BOUNDS, NONE, Result


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
    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for name in dict.fromkeys((r.policy, r.predictor) for r in results):
        policy, predictor = name
        curve = sorted((r.layout.cache_shape.slots_per_layer, 100 * r.hit_rate) for r in results if _key(r) == name)
        label = policy if predictor == NONE else f"{policy} + {predictor}"
        bound = policy in BOUNDS
        axis.plot(
            [x for x, _ in curve],
            [y for _, y in curve],
            color="black" if bound else None,
            linestyle={"belady": "-", "sch": ":"}.get(policy, "-"),
            linewidth=1.8 if bound else 1.2,
            marker=".",
            label=label,
        )
    shared = any(not r.layout.per_layer for r in results)
    axis.set_xlabel("slots per layer" + (", shared by all layers" if shared else ""), fontsize=9)
    axis.set_ylabel("hit rate, %", fontsize=9)
    axis.set_title(title, fontsize=10)
    axis.tick_params(labelsize=8)
    axis.grid(True, linewidth=0.3, alpha=0.6)
    axis.legend(fontsize=7.5)
    try:
        figure.savefig(path, dpi=110, metadata={"Software": None})  # the same bytes for the same data
    except ValueError as error:
        raise UsageError(f"{path.name}: matplotlib cannot write this kind of file") from error


def _key(result: Result) -> tuple[str, str]:
    return result.policy, result.predictor
