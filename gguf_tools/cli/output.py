"""Numbers for people."""

from __future__ import annotations

import itertools
from collections.abc import Sequence


def format_bytes(count: float) -> str:
    """`count` bytes with a binary unit, three significant digits: "29.9 MiB"."""
    units = ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while abs(count) >= 1000 and len(units) > 1:
        count /= 1024
        del units[0]
    whole = units[0] == "bytes" or abs(count) >= 100
    return f"{count:.0f} {units[0]}" if whole else f"{count:.3g} {units[0]}"


def format_ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers with runs drawn together: "0-3, 7"."""
    runs = []
    for _, run in itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        members = [number for _, number in run]
        runs.append(str(members[0]) if len(members) == 1 else f"{members[0]}-{members[-1]}")
    return ", ".join(runs)
