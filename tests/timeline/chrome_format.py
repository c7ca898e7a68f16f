"""The rules of Chrome's Trace Event Format, as far as our files use it."""

from __future__ import annotations

import json
from typing import Any


def check_format(trace: dict[str, Any]) -> None:
    """Trace Event Format: what every event must have, and that events of a thread nest or lie apart."""
    trace = json.loads(json.dumps(trace))
    assert trace["displayTimeUnit"] in ("ms", "ns") and isinstance(trace["otherData"], dict)
    threads: dict[tuple[int, int], list[tuple[float, float]]] = {}
    named = set()
    for event in trace["traceEvents"]:
        assert isinstance(event["name"], str) and isinstance(event["pid"], int) and isinstance(event["tid"], int)
        if event["ph"] == "M":
            value = event["args"]["sort_index" if event["name"] == "process_sort_index" else "name"]
            assert isinstance(value, int if event["name"] == "process_sort_index" else str)
            if event["name"] == "thread_name":
                named.add((event["pid"], event["tid"]))
            continue
        assert event["ph"] == "X" and event["ts"] >= 0 and event["dur"] >= 0 and isinstance(event["cat"], str)
        threads.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["ts"] + event["dur"]))
    assert set(threads) == named
    for stretches in threads.values():
        open_until: list[float] = []
        for begin, end in sorted(stretches, key=lambda s: (s[0], -s[1])):
            while open_until and open_until[-1] <= begin + 1e-6:
                open_until.pop()
            assert not open_until or end <= open_until[-1] + 1e-6, "neither nested nor apart"
            open_until.append(end)
