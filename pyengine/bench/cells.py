"""Cells of a contest: one model at one budget under one disk limit. What is known of a cell, and who goes on in it."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from pyengine.bench.rows import OURS
from pyengine.bench.samples import Sample

#: A baseline with less than this share of the best one's speed cannot be the best, and has one turn in a cell only.
_CONTENDS = 0.5

#: Nor can one with less than this share of it in two turns or more, none as fast as any turn of the best one.
_SURELY_CONTENDS = 1 / 1.5


class Disk(NamedTuple):
    """A disk limit. bytes_per_s: None for the bare disk. transfer_ratio: see Sample."""

    bytes_per_s: int | None
    transfer_ratio: float | None = None

    def __str__(self) -> str:
        limit = f"{self.bytes_per_s / 1e6:.0f} MB/s" if self.bytes_per_s else "bare disk"
        return limit if self.transfer_ratio is None else f"R = {self.transfer_ratio:g} ({limit})"


class Cell(NamedTuple):
    """What tells one cell from another. limit: MB/s, None for the bare disk, and for cells of a ratio, whose limit
    follows the speed of the processor and differs a little between sittings."""

    model: str
    share: float | None
    limit: float | None
    ratio: float | None

    @classmethod
    def of(cls, sample: Sample) -> Cell:
        ratio = sample.transfer_ratio
        return cls(sample.model, sample.share, None if ratio is not None else sample.disk_limit_mb_per_s, ratio)


def cell_of(samples: Iterable[Sample], model: str, share: float, disk: Disk) -> list[Sample]:
    """The samples of one cell."""
    ratio = disk.transfer_ratio
    limit = disk.bytes_per_s / 1e6 if disk.bytes_per_s and ratio is None else None
    return [sample for sample in samples if Cell.of(sample) == Cell(model, share, limit, ratio)]


def contenders(cell: Sequence[Sample], kinds: Sequence[str], *, all_contend: bool = False) -> list[str]:
    """Kinds that deserve another turn in a cell: ours, who has had none yet, and baselines that may be the best.

    Args:
        all_contend: slow baselines, too, as long as they live.
    """
    speeds = {kind: [s.decode_tok_per_s or 0.0 for s in cell if s.kind == kind] for kind in kinds}
    medians = {kind: statistics.median(found) for kind, found in speeds.items() if found}
    baselines = [kind for kind in medians if kind not in OURS]
    best = max(baselines, key=medians.__getitem__, default="")
    gone = {sample.kind for sample in cell if sample.status != "ok"}
    return [
        kind
        for kind in kinds
        if kind in OURS
        or kind not in medians
        or (kind not in gone and (all_contend or _may_be_best(speeds[kind], speeds[best])))
    ]


def left_behind(
    samples: Iterable[Sample], model: str, share: float, kinds: Sequence[str], *, all_contend: bool = False
) -> set[str]:
    """Kinds that no longer contend in some cell of a model and budget: in the others one turn, without getting used to
    the disk first, will do."""
    cells: dict[Cell, list[Sample]] = {}
    for sample in samples:
        if (sample.model, sample.share) == (model, share):
            cells.setdefault(Cell.of(sample), []).append(sample)
    return {
        kind
        for cell in cells.values()
        for kind in set(kinds).difference(contenders(cell, kinds, all_contend=all_contend))
    }


def _may_be_best(speeds: Sequence[float], of_best: Sequence[float]) -> bool:
    share = statistics.median(speeds) / (statistics.median(of_best) or 1.0)
    if share < _CONTENDS:
        return False
    apart = min(len(speeds), len(of_best)) > 1 and max(speeds) < min(of_best)
    return not (apart and share < _SURELY_CONTENDS)


def next_round(cell: Iterable[Sample]) -> int:
    """The number of a cell's next round."""
    return max((sample.round + 1 for sample in cell if sample.kind in OURS), default=0)
