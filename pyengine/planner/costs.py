"""What computing and moving cost, of one model on one machine. Pure.

All that a step takes is put together from these by inequalities.py; measuring.py finds them, refine.py corrects them
while a model runs, kept_costs.py keeps them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

#: (how many, seconds), ascending; linear between, and beyond the last as between the last two.
Points = tuple[tuple[int, float], ...]


#: llama.cpp's attention looks at a multiple of so many KV cells, and its contexts have one.
CELLS = 256


def cells_looked_at(cells: float) -> int:
    """By attention, if so many are in use."""
    return max(1, math.ceil(cells / CELLS)) * CELLS


@dataclass(frozen=True)
class Costs:
    """Seconds unless the name says otherwise. A layer is one that has experts; a step is one computation of llama.cpp,
    of at most n_ubatch tokens."""

    layer: Points
    """(tokens of a step, seconds of a layer without its experts: norms, attention, router), with one output"""
    router_token_s: float
    """of that, the router, per token"""
    cell_s: float
    """attention, all layers: more per token of a step and KV cell that it looks at"""
    output_s: float
    """the model's head, per token beyond the first whose logits are wanted"""
    host_s: float
    """outside of llama.cpp (choosing the next token, ...), per sequence and step"""
    expert: Points
    """(rows, seconds of the kernels of one expert of one layer)"""
    pass_s: float
    """kernels of one layer, more for beginning at all"""
    miss: Points
    """(rows, seconds that computing one expert takes longer if it was missing): a pass of its own, and processor time
    and memory bandwidth that reading takes"""
    rest: Points
    """(rows, seconds from the last missing expert's arrival to the end of the layer): several are read at once and come
    together"""
    transfer_s: float
    """from disk, per expert while several are under way"""
    latency_s: float
    """from the router's choice until the first missing expert begins to arrive at that pace"""
    transfer_bytes: float
    """per expert, as read: alignment included"""
    recall: float
    """of the experts that would be missing, the share that is fetched ahead, 0..1"""
    miss_factor: float
    """experts missing in fact, per one that the routing foretells"""
    kv_bytes_per_token: int
    buffer_bytes: int
    """of memory, what the loaded model takes beside weights, slots and KV cache"""
    n_threads: int
    bundle: bool
    measured: bool
    """False: estimated, from less than a full measurement"""
    limit_s: float = 0.0
    """per expert that is read, if the disk is limited; see with_bandwidth(). 0: it is not"""
    device: str = ""
    """ggml device that has the slots, and computes; empty: RAM, the CPU. transfer_s then is of its link"""
    stream_tokens: int = 0
    """on a device: from so many tokens of a step on, a layer's missing experts come while the one before computes"""
    disk_s: float = 0.0
    """on a device: more per expert that is not in RAM either, while several are under way"""
    ram_share: float = 1.0
    """on a device: of the missing experts, those that are in RAM, 0..1"""

    @property
    def pace_s(self) -> float:
        """Per missing expert, while several are under way: disk and link work at the same time, the slower counts."""
        return max(self.transfer_s, (1 - self.ram_share) * self.disk_s)

    def layer_s(self, tokens: float) -> float:
        """Of one layer without its experts in a step of so many tokens."""
        return float(_along(self.layer, np.array(tokens)))

    def expert_s(self, rows: Floats | float) -> Floats:
        """Of the kernels of one expert that works on so many rows; of none, 0."""
        return _along(self.expert, np.asarray(rows, np.float64))

    def miss_s(self, rows: Floats | float) -> Floats:
        """More of an expert with so many rows if it was missing."""
        return _along(self.miss, np.asarray(rows, np.float64))

    def rest_s(self, rows: Floats | float) -> Floats:
        """From the last arrival to the end of the layer, if missing experts have so many rows."""
        return _along(self.rest, np.asarray(rows, np.float64))

    def with_bandwidth(self, bytes_per_s: float) -> Costs:
        """With a limit on what the disk may give, as a control group has it (io.max). Such a limit counts bytes over a
        while: what was not read during attention may be read afterwards, at the disk's own pace. A step takes as long
        as the limit needs for all that it reads, or longer."""
        least = self.transfer_bytes / bytes_per_s if bytes_per_s > 0 else math.inf
        return replace(self, limit_s=least) if least > self.transfer_s else self

    def scaled(
        self,
        *,
        compute: float = 1.0,
        other: float = 1.0,
        transfer: float = 1.0,
        misses: float = 1.0,
        rest: float = 1.0,
    ) -> Costs:
        """With kernels, all other computing, the disk, misses and the rest so many times slower, or more."""
        return replace(
            self,
            layer=tuple((n, s * other) for n, s in self.layer),
            router_token_s=self.router_token_s * other,
            cell_s=self.cell_s * other,
            output_s=self.output_s * other,
            host_s=self.host_s * other,
            expert=tuple((n, s * compute) for n, s in self.expert),
            pass_s=self.pass_s * compute,
            miss=tuple((n, s * compute) for n, s in self.miss),
            rest=tuple((n, s * compute * rest) for n, s in self.rest),
            transfer_s=self.transfer_s * transfer,
            latency_s=self.latency_s * transfer,
            disk_s=self.disk_s * transfer,
            miss_factor=self.miss_factor * misses,
        )

    @property
    def sound(self) -> bool:
        """Whether all numbers are in their ranges."""
        values = [getattr(self, f.name) for f in fields(self) if f.type in ("float", "int")]
        return (
            all(type(v) in (int, float) and math.isfinite(v) and v >= 0 for v in values)
            and self.recall <= 1
            and self.ram_share <= 1
            and self.transfer_bytes > 0
            and _ascending(self.layer)
            and _ascending(self.expert)
            and _ascending(self.miss, least=0.0)
            and _ascending(self.rest, least=0.0)
        )


def _ascending(points: Points, least: float = 1e-15) -> bool:
    counts = [n for n, _ in points]
    return (
        bool(points)
        and all(type(n) is int and n > 0 for n in counts)
        and counts == sorted(set(counts))
        and all(math.isfinite(s) and s >= least for _, s in points)
    )


def _along(points: Points, at: Floats) -> Floats:
    """Linear between the points, from (0, 0) before the first, on as between the last two beyond the last."""
    counts = np.array([0.0, *(float(n) for n, _ in points)])
    seconds = np.array([0.0, *(s for _, s in points)])
    slope = max(0.0, (seconds[-1] - seconds[-2]) / (counts[-1] - counts[-2]))  # of one point: from (0, 0)
    # Part of one row does not exist: means of few rows count as what they are made of.
    return np.asarray(np.interp(at, counts, seconds) + np.maximum(0.0, at - counts[-1]) * slope)


def rising(points: Points) -> Points:
    """The same points, none above one after it: less work never takes longer, and whatever else a machine does only
    ever makes a measurement slower."""
    least, out = math.inf, []
    for n, seconds in reversed(points):
        least = min(least, seconds)
        out.append((n, least))
    return tuple(reversed(out))
