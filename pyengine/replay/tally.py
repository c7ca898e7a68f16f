"""What a timed replay counts, and the figures that follow."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from pyengine.replay.timing import Timing


@dataclass
class Tally:
    """Counts of expert accesses by layer, int64 [n_layer]; an access is one expert that one token needs in one
    layer."""

    resident: npt.NDArray[np.int64]
    """here, and used since it was last loaded or loaded on demand"""
    in_time: npt.NDArray[np.int64]
    """here, because a prefetch brought it"""
    late: npt.NDArray[np.int64]
    """a prefetch was on its way or queued when the router spoke"""
    miss: npt.NDArray[np.int64]
    """nobody had asked for it"""
    named: npt.NDArray[np.int64]
    """experts that the predictor named"""
    right: npt.NDArray[np.int64]
    """named and needed"""
    named_here: npt.NDArray[np.int64]
    """named and here when the router spoke"""
    right_here: npt.NDArray[np.int64]
    """named, needed and here"""
    right_at_k: npt.NDArray[np.int64]
    """needed, and among the first n_expert_used that were named"""
    absent_named: npt.NDArray[np.int64]
    """needed, named, and not here for any other reason than a prefetch: what prediction is for"""
    n_token: int = 0
    bytes_demand: float = 0.0
    bytes_prefetch: float = 0.0
    bytes_wasted: float = 0.0
    """moved by prefetches and never used"""
    stall_s: float = 0.0
    total_s: float = 0.0

    @classmethod
    def of(cls, n_layer: int) -> Tally:
        """Nothing counted yet."""
        counts: dict[str, Any] = {f.name: np.zeros(n_layer, np.int64) for f in fields(cls) if f.default is MISSING}
        return cls(**counts)

    @property
    def n_layer(self) -> int:
        return len(self.resident)

    def count(self, layer: int, n_wanted: int, n_hit: int, n_in_time: int, n_late: int) -> None:
        """A layer's router has spoken; `n_in_time` of the hits are there because of a prefetch."""
        self.resident[layer] += n_hit - n_in_time
        self.in_time[layer] += n_in_time
        self.late[layer] += n_late
        self.miss[layer] += n_wanted - n_hit - n_late

    def count_named(self, layer: int, wanted: set[int], named: list[int], here: list[int], in_time: set[int]) -> None:
        """What became of the experts that were named, the surest first; `here` are those of them that are."""
        right = wanted.intersection(named)
        right_here = right.intersection(here)
        self.named[layer] += len(named)
        self.right[layer] += len(right)
        self.right_at_k[layer] += len(wanted.intersection(named[: len(wanted)]))
        self.named_here[layer] += len(here)
        self.right_here[layer] += len(right_here)
        self.absent_named[layer] += len(right - right_here) + len(right_here & in_time)

    @property
    def wanted(self) -> npt.NDArray[np.int64]:
        total: npt.NDArray[np.int64] = self.resident + self.in_time + self.late + self.miss
        return total

    def figures(self, timing: Timing) -> dict[str, Any]:
        """The figures as JSON has them; rates are None where nothing was counted."""
        wanted, n = int(self.wanted.sum()), max(1, self.n_token)
        absent = self.in_time + self.late + self.miss
        accuracy = _share(self.right, self.named)
        fetched = _share(self.named_here, self.named)
        return {
            "hit_rate": _share(self.resident + self.in_time, self.wanted),
            "resident": _share(self.resident, self.wanted),
            "in_time": _share(self.in_time, self.wanted),
            "late": _share(self.late, self.wanted),
            "miss": _share(self.miss, self.wanted),
            "recall_at_k": _share(self.right_at_k, self.wanted) if self.named.any() else None,
            "recall": _share(self.right, self.wanted) if self.named.any() else None,
            "recall_by_layer": _shares(self.right, self.wanted) if self.named.any() else None,
            "recall_on_misses": _share(self.absent_named, absent) if self.named.any() else None,
            "accuracy": accuracy,
            "fetch_rate": fetched,
            "good_pred": accuracy * fetched if accuracy is not None and fetched is not None else None,
            "good_pred_direct": _share(self.right_here, self.wanted) if self.named.any() else None,
            "bytes_per_token": (self.bytes_demand + self.bytes_prefetch) / n,
            "wasted_bytes_per_token": self.bytes_wasted / n,
            "stall_share": self.stall_s / self.total_s if self.total_s else None,
            "tokens_per_s": self.n_token / self.total_s if self.total_s else None,
            "ratio": timing.ratio(self.n_layer),
            "accesses": wanted,
        }


def _share(part: npt.NDArray[np.int64], whole: npt.NDArray[np.int64]) -> float | None:
    n = int(whole.sum())
    return int(part.sum()) / n if n else None


def _shares(part: npt.NDArray[np.int64], whole: npt.NDArray[np.int64]) -> list[float]:
    shares: list[float] = (part / np.maximum(whole, 1)).tolist()
    return shares
