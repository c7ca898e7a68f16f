"""A second opinion on residency: which expert is hit, missed and evicted, from stock llama.cpp's routing alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from models.facts import ModelFacts
from models.stock import StockModel
from numpy.typing import NDArray

from .decoding import Script
from .managed import EVICT, HIT, MISS

Access = dict[int, int]  # expert -> (token, rank) pairs that chose it
Event = tuple[int, int, int, int, int]  # as the fields of pye_event


def stock_accesses(facts: ModelFacts, script: Script) -> list[list[Access]]:
    """What each layer with experts wants in each llama_decode of the script: [chunk][layer], layers counted among those
    with experts. A chunk must fit a micro-batch."""
    with StockModel(facts.path, n_ctx=256, watch_routing=True) as model:
        for chunk in script:
            model.decode(chunk)
    rows = {
        block: iter([ranked[: facts.n_expert_used] for ranked in model.routing[block]]) for block in facts.expert_blocks
    }
    return [
        [dict(Counter(e for _ in chunk for e in next(rows[block]))) for block in facts.expert_blocks]
        for chunk in script
    ]


def simulate(accesses: Sequence[Sequence[Access]], slots: int, priorities: NDArray[np.float32]) -> Iterator[Event]:
    """The events of an engine whose experts are all of one shape and whose slots hold at least what one layer wants.

    priorities: [n_layer, n_expert].
    """
    used: dict[tuple[int, int], int] = {}  # resident (layer, expert) -> when it was last used
    clock = 0
    for step, (layer, wanted) in enumerate((i, access) for token in accesses for i, access in enumerate(token)):
        experts = sorted(wanted)
        for e in experts:
            kind = HIT if (layer, e) in used else MISS
            yield step, layer, e, kind, wanted[e]
        hits = [e for e in experts if (layer, e) in used]
        for e in hits + sorted(set(experts) - set(hits), key=lambda e: (-wanted[e], e)):
            if (layer, e) not in used and len(used) == slots:
                free = [r for r in used if r[0] != layer or r[1] not in wanted]
                victim = min(free, key=lambda r: (np.nan_to_num(priorities[r], nan=0.0, posinf=np.inf), used[r]))
                del used[victim]
                yield step, *victim, EVICT, 0
            clock += 1
            used[layer, e] = clock


def engine_path_alignment(path: Path) -> int:
    """Most bytes that alignment may add to one read of the file: a block in front and one behind."""
    return 2 * max(4096, path.stat().st_blksize)
