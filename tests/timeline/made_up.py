"""Made-up timelines with the figures a test wants."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pyengine.timeline.spans import ADOPTED, GIVEN_UP, Kind, Timeline

FIELDS = np.dtype(
    [
        ("begin_ns", "<u8"),
        ("end_ns", "<u8"),
        ("kind", "<u2"),
        ("layer", "<u2"),
        ("expert", "<u2"),
        ("flags", "<u2"),
    ]
)
NOBODY = 0xFFFF


def spans(*rows: tuple[int, int, int, int, int, int]) -> npt.NDArray[np.void]:
    """Rows of begin, end, kind, layer, expert, flags."""
    return np.array(list(rows), FIELDS)


def decode(n_token: int, n_layer: int, seed: int = 0) -> Timeline:
    """Tokens as an engine decodes them: per layer attention, then an expert FFN of two passes around a stall, a
    prediction in it, demand loads, and prefetches for the next layer of which some are late and some given up."""
    random = np.random.default_rng(seed)
    rows, tokens, now = [], [], 5_000
    for _ in range(n_token):
        begin = now
        for layer in range(n_layer):
            now += int(random.integers(150_000, 250_000))
            ffn, waits = now, int(random.integers(0, 900_000))
            rows.append((now + 3_000, now + 30_000, Kind.PREDICT, layer, NOBODY, 0))
            rows += [
                (now + 30_000, now + 130_000, Kind.COMPUTE, layer, NOBODY, 0),
                (now + 130_000, now + 130_000 + waits, Kind.STALL, layer, NOBODY, 0),
                (now + 130_000 + waits, now + 190_000 + waits, Kind.COMPUTE, layer, NOBODY, 0),
            ]
            for expert in range(int(random.integers(1, 4))):
                rows.append((now + 1_000 * expert, now + 120_000 + waits, Kind.DEMAND, layer, expert, 0))
            for expert in range(int(random.integers(0, 3))):
                kind, flags = [(Kind.PREFETCH, 0), (Kind.DEMAND, ADOPTED), (Kind.PREFETCH, GIVEN_UP)][
                    int(random.integers(3))
                ]
                length = int(random.integers(200_000, 1_200_000))
                rows.append((now + 40_000, now + 40_000 + length, kind, layer + 1, 8 + expert, flags))
            now += 200_000 + waits
            rows.append((ffn, now, Kind.FFN, layer, NOBODY, 0))
        now += 400_000
        tokens.append((begin, now))
    return Timeline(spans(*rows), np.array(tokens, np.int64))
