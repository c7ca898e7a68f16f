"""One token drawn: what the processor did above, the loads below; then the same with a few layers enlarged. Needs
matplotlib (extra "bench")."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyengine.errors import UsageError
from pyengine.timeline.spans import Kind, Load, Spans, Token, lanes, load_kind, loads, of_kind

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Colours and names of what the processor does; a later one is drawn over an earlier one.
_OTHER = ("attention, routers and the rest", "#dcdcdc")
_COMPUTING = {
    Kind.FFN: ("other work on experts", "#a9d5bb"),
    Kind.PREDICT: ("predicting", "#8172b3"),
    Kind.COMPUTE: ("expert kernels", "#2a9d5c"),
    Kind.STALL: ("waiting for loads", "#d62728"),
}
_LOADS = {
    Load.DEMAND: ("load, awaited", "#f4978e"),
    Load.LATE: ("load, fetched ahead but late", "#f2b632"),
    Load.PREFETCH: ("load, fetched ahead", "#4c72b0"),
    Load.GIVEN_UP: ("load, given up", "#cccccc"),
}
_HATCH = {Load.GIVEN_UP: "/////"}

#: Layers of the enlarged part.
_ENLARGED = 3
#: More numbers of layers than this side by side could not be read.
_MOST_NUMBERS = 32


def load_matplotlib() -> tuple[Any, Any]:
    """Figure and FigureCanvasAgg. Raises UsageError: matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError('plots need matplotlib: pip install "pyengine[bench]"') from error
    return Figure, FigureCanvasAgg


def draw(token: Token, title: str, path: Path) -> None:
    """Write a picture of the token, PNG or whatever else the path's ending names.

    Raises:
        UsageError: matplotlib is not installed, or does not know the kind of file.
        OSError: the file cannot be written.
    """
    figure_of, canvas_of = load_matplotlib()
    figure = figure_of(figsize=(10, 5.8), layout="constrained")
    canvas_of(figure)
    found = loads(token.spans)
    lane = lanes(found).tolist()
    ffns = of_kind(token.spans, Kind.FFN)
    windows = [(token.begin_ns, token.end_ns), _enlarged(token, ffns)]
    low = 1.2 + 0.15 * min(8, max(lane, default=0))
    axes = figure.subplots(4, 1, height_ratios=[1, low, 1, low])
    for row, window in enumerate(windows):
        upper, lower = axes[2 * row : 2 * row + 2]
        _computing(upper, token, ffns, window)
        _loading(lower, token, found, lane)
        for axis in (upper, lower):
            axis.set_xlim(*(_ms(token, t) for t in window))
            axis.spines[["top", "right", "left"]].set_visible(False)
            axis.tick_params(axis="y", length=0)
        lower.tick_params(axis="x", labelsize=8)
        if row == 0:
            for axis in (upper, lower):
                axis.axvspan(*(_ms(token, t) for t in windows[1]), color="#fff1a8", zorder=0)
    axes[0].set_title(title, fontsize=9.5, loc="left")
    axes[2].set_title(
        "the layers marked above, enlarged (those neighbours whose share of waiting is nearest to the token's)",
        fontsize=9.5,
        loc="left",
    )
    axes[3].set_xlabel("ms since the token began", fontsize=8.5)
    _legend(figure, token, found)
    try:
        figure.savefig(path, dpi=110, metadata={"Software": None} if path.suffix == ".png" else None)
    except ValueError as error:
        raise UsageError(f"{path.name}: matplotlib cannot write this kind of file") from error


def _ms(token: Token, at_ns: int) -> float:
    return (int(at_ns) - token.begin_ns) / 1e6


def _enlarged(token: Token, ffns: Spans) -> tuple[int, int]:
    """From ns to ns: layers in a row, each with what precedes its experts, that wait as much of their time as the whole
    token does, as nearly as any."""
    if len(ffns) <= _ENLARGED:
        return token.begin_ns, token.end_ns
    ends = [token.begin_ns, *ffns["end_ns"].tolist()]
    windows = [(ends[i], ends[i + _ENLARGED]) for i in range(len(ffns) - _ENLARGED + 1)]
    share = _waiting_share(token, token.begin_ns, token.end_ns)
    return min(windows, key=lambda window: abs(_waiting_share(token, *window) - share))


def _waiting_share(token: Token, begin_ns: int, end_ns: int) -> float:
    part = Token(token.number, begin_ns, end_ns, token.spans).shares()
    return part.waiting / part.total if part.total else 0.0


def _computing(axis: Axes, token: Token, ffns: Spans, window: tuple[int, int]) -> None:
    _bars(axis, [(0.0, _ms(token, token.end_ns))], (0, 1), _OTHER[1])
    for kind, (_, colour) in _COMPUTING.items():
        _bars(axis, _stretches(token, of_kind(token.spans, kind)), (0, 1), colour)
    shown = [span for span in ffns if span["begin_ns"] < window[1] and span["end_ns"] > window[0]]
    for span in shown[:: max(1, -(-len(shown) // _MOST_NUMBERS))]:
        middle = (max(int(span["begin_ns"]), window[0]) + min(int(span["end_ns"]), window[1])) // 2
        name = f"layer {span['layer']}" if len(shown) <= 2 * _ENLARGED else f"{span['layer']}"
        axis.text(_ms(token, middle), 1.08, name, ha="center", va="bottom", fontsize=6.5, color="#555555")
    axis.set_ylim(0, 1.5)
    axis.set_yticks([0.5], ["processor"], fontsize=8.5)
    axis.tick_params(axis="x", length=0, labelbottom=False)


def _loading(axis: Axes, token: Token, found: Spans, lane: Sequence[int]) -> None:
    for what, (_, colour) in _LOADS.items():
        for number in range(max(lane, default=0) + 1):
            mine = [i for i in range(len(found)) if lane[i] == number and load_kind(found[i]) is what]
            _bars(axis, _stretches(token, found[mine]), (number + 0.08, 0.84), colour, _HATCH.get(what))
    n_lane = max(lane, default=0) + 1
    axis.set_ylim(n_lane, 0)
    axis.set_yticks([n_lane / 2], ["disk"], fontsize=8.5)


def _stretches(token: Token, spans: Spans) -> list[tuple[float, float]]:
    """Begin and length in ms."""
    begins, ends = spans["begin_ns"].tolist(), spans["end_ns"].tolist()
    return [(_ms(token, begin), (end - begin) / 1e6) for begin, end in zip(begins, ends, strict=True)]


def _bars(
    axis: Axes,
    stretches: Sequence[tuple[float, float]],
    place: tuple[float, float],
    colour: str,
    hatch: str | None = None,
) -> None:
    # No edges but where a hatch needs its colour: short stretches would look longer than they are.
    style = {"linewidth": 0} if hatch is None else {"edgecolor": "#777777", "linewidth": 0.4, "hatch": hatch}
    axis.broken_barh(stretches, place, facecolor=colour, **style)


def _legend(figure: Figure, token: Token, found: Spans) -> None:
    """What the processor did, with its milliseconds, in two columns; the loads, with their number, in two more."""
    from matplotlib.patches import Patch

    shares = token.shares()
    spent = {
        Kind.COMPUTE: shares.kernels,
        Kind.STALL: shares.waiting,
        Kind.PREDICT: shares.predicting,
        Kind.FFN: shares.engine,
    }
    entries = [
        Patch(facecolor=_COMPUTING[kind][1], label=f"{_COMPUTING[kind][0]}: {ms:.1f} ms") for kind, ms in spent.items()
    ]
    entries.append(Patch(facecolor=_OTHER[1], label=f"{_OTHER[0]}: {shares.other:.1f} ms"))
    entries.append(Patch(facecolor="none", label=""))  # ends the second column
    kinds = [load_kind(span) for span in found]
    entries += [
        Patch(
            facecolor=colour,
            hatch=_HATCH.get(what),
            edgecolor="#777777",
            linewidth=0,
            label=f"{name}: {kinds.count(what)}",
        )
        for what, (name, colour) in _LOADS.items()
    ]
    figure.legend(handles=entries, fontsize=8, ncols=4, loc="outside lower center", frameon=False)
