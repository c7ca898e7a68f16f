"""A timeline as a file for trace viewers (ui.perfetto.dev, chrome://tracing): Chrome's Trace Event Format, JSON object
form, complete events ("ph": "X") with times in microseconds, names of processes and threads as metadata ("ph": "M").

Viewers want the events of a thread nested or apart: loads that overlap go to threads of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from pyengine.timeline.spans import Kind, Load, Timeline, lanes, load_kind, loads

_COMPUTE_PROCESS, _LOAD_PROCESS = 1, 2

_NAMES = {Kind.FFN: "experts", Kind.COMPUTE: "kernels", Kind.STALL: "waiting", Kind.PREDICT: "predicting"}

#: Of the format's reserved colours; viewers that do not know them choose their own, by name.
_COLOURS = {
    Kind.FFN: "grey",
    Kind.COMPUTE: "thread_state_running",
    Kind.STALL: "terrible",
    Kind.PREDICT: "generic_work",
    Load.DEMAND: "bad",
    Load.LATE: "yellow",
    Load.PREFETCH: "good",
    Load.GIVEN_UP: "grey",
}


def chrome_trace(timeline: Timeline, about: Mapping[str, Any]) -> dict[str, Any]:
    """The object to write as JSON; `about` (model, budget ...) goes into its otherData."""
    found = loads(timeline.spans)
    lane = lanes(found)
    events = [
        _named("process_name", _COMPUTE_PROCESS, 0, "computing"),
        _named("process_name", _LOAD_PROCESS, 0, "loads"),
    ]
    events += [_sorted(_COMPUTE_PROCESS, 0), _sorted(_LOAD_PROCESS, 1)]
    events.append(_named("thread_name", _COMPUTE_PROCESS, 1, "decode"))
    events += [
        _named("thread_name", _LOAD_PROCESS, 1 + i, f"load {1 + i}") for i in range(int(lane.max(initial=-1)) + 1)
    ]
    events += _computing(timeline)
    for span, number in zip(found, lane, strict=True):
        what = load_kind(span)
        args = {"layer": int(span["layer"]), "expert": int(span["expert"])}
        events.append(
            _complete(what.value, "load", _COLOURS[what], span["begin_ns"], span["end_ns"], args)
            | {"pid": _LOAD_PROCESS, "tid": 1 + int(number)}
        )
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": dict(about)}


def _computing(timeline: Timeline) -> Iterator[dict[str, Any]]:
    thread = {"pid": _COMPUTE_PROCESS, "tid": 1}
    for token in timeline:
        args = {name: round(ms, 3) for name, ms in vars(token.shares()).items()}
        yield _complete(f"token {token.number}", "token", None, token.begin_ns, token.end_ns, args) | thread
    spans = timeline.spans
    # Where two begin together the longer one is the outer one.
    for span in spans[np.lexsort((-spans["end_ns"].astype(np.int64), spans["begin_ns"]))]:
        kind = Kind(int(span["kind"]))
        if kind in _NAMES:
            args = {"layer": int(span["layer"])}
            yield _complete(_NAMES[kind], "compute", _COLOURS[kind], span["begin_ns"], span["end_ns"], args) | thread


def _complete(
    name: str, category: str, colour: str | None, begin_ns: int, end_ns: int, args: dict[str, Any]
) -> dict[str, Any]:
    event = {"name": name, "cat": category, "ph": "X", "ts": int(begin_ns) / 1e3, "args": args}
    event["dur"] = (int(end_ns) - int(begin_ns)) / 1e3
    return event if colour is None else event | {"cname": colour}


def _named(what: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}}


def _sorted(pid: int, index: int) -> dict[str, Any]:
    return {"name": "process_sort_index", "ph": "M", "pid": pid, "tid": 0, "args": {"sort_index": index}}
