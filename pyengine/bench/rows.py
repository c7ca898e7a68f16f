"""The rows of a benchmark: which ways to run one model, with how much memory. Pure planning, nothing is run here.

The memory limit of a row is its budget, the bytes of the model that are not experts, and an allowance for the program.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from pyengine.errors import UsageError

#: Bytes a row may use beyond its expert budget and the model's other weights: Python, libraries, KV cache, compute
#: buffers.
ALLOWANCE = 400 * 10**6

STOCK_RESIDENT = "stock-resident"
STOCK_MMAP = "stock-mmap"
STOCK_MMAP_PLAIN = "stock-mmap-plain"
ON_DEMAND = "on-demand"
LRU = "lru"
LRU_BUNDLE = "lru-bundle"
LFU_BUNDLE = "lfu-bundle"
AUTO = "auto"
AUTO_MEMORY = "auto-memory"
ACTIVATION_PATH = "activation-path"
LEARNED = "ablation-learned"
STOCK_GPU = "stock-gpu"
STOCK_GPU_SPLIT = "stock-gpu-split"
GPU_ON_DEMAND = "gpu-on-demand"
GPU_LRU = "gpu-lru"
GPU_AUTO = "gpu-auto"

#: The kinds of row that a benchmark has unless others are asked for, and what each is.
KINDS: dict[str, str] = {
    STOCK_RESIDENT: "stock llama.cpp, all weights read into memory, no limit",
    STOCK_MMAP: "stock llama.cpp as it comes: memory-mapped, weights repacked into anonymous memory",
    STOCK_MMAP_PLAIN: "stock llama.cpp, memory-mapped, not repacked (use_extra_bufts off): pages can be dropped",
    ON_DEMAND: "pyengine with slots for the experts of one layer only: every expert is loaded when it is used",
    LRU: "pyengine, policy lru, nothing fetched ahead, experts read from the GGUF file",
    LRU_BUNDLE: "the same with experts read from a bundle",
    LFU_BUNDLE: "the same with policy lfu",
    AUTO: "pyengine as it comes, with a bundle: policy auto, experts fetched ahead",
}

DEFAULT_BUDGETS = (12.5, 25.0, 50.0, 75.0, 100.0)

#: The share of experts whose memory limit the memory-mapped rows get, percent.
MMAP_SHARE = 50.0

#: Memory-mapped stock.
MMAP_KINDS = (STOCK_MMAP, STOCK_MMAP_PLAIN)


#: The ablation in the papers' order: each kind has what the one before has, and one thing more.
ABLATION: dict[str, str] = {
    "ablation-lru": "pyengine with a bundle: policy lru, nothing fetched ahead, a layer waits for all its experts",
    "ablation-policy": "+ policy lfu, decayed",
    "ablation-prefetch": "+ experts fetched ahead, guessed by Fate; wrong ones are read to their end, right ones wait",
    "ablation-preemption": "+ when the router has spoken, wrong ones are dropped and right ones go first",
    "ablation-reordering": "+ experts that are there compute first",
    LEARNED: "+ learned predictors (pyengine learn-predictor) in Fate's place",
}

#: Systems of the papers inside this engine, with its reads and kernels.
PAPERS: dict[str, str] = {
    ACTIVATION_PATH: "MoE-Infinity: kept by activation path and fetched ahead for all layers at each token's start",
}

#: What a user has who says nothing about memory.
UNTOLD: dict[str, str] = {
    AUTO_MEMORY: "auto, and the budget too: as many experts as it finds room for within its memory limit",
}

#: With a GPU (--gpu): the share is that of the expert bytes that may lie in VRAM.
GPU: dict[str, str] = {
    STOCK_GPU: "stock llama.cpp, the whole model in VRAM",
    STOCK_GPU_SPLIT: "stock llama.cpp, experts of the first layers on the CPU (--n-cpu-moe), at equal VRAM",
    GPU_ON_DEMAND: "pyengine with slots in VRAM for the experts of one layer only, all others in RAM",
    GPU_LRU: "pyengine, policy lru, nothing fetched ahead, the other experts in RAM",
    GPU_AUTO: "pyengine as it comes on a GPU, the other experts in RAM",
}

#: Kinds that are pyengine as it comes; all others are baselines.
OURS = (AUTO_MEMORY, AUTO)

#: Every kind of row that can be asked for.
ALL_KINDS: dict[str, str] = KINDS | UNTOLD | ABLATION | PAPERS | GPU

#: Names for several kinds at once.
ROW_SETS: dict[str, tuple[str, ...]] = {"ablation": (STOCK_RESIDENT, *ABLATION)}


class Advice(NamedTuple):
    """How pyengine's kinds are loaded: policy and look_ahead as pyengine.Llama takes them, what
    NativeEngine.set_prefetch_rules() is told beyond its defaults, and the budget, if not the row's."""

    policy: str
    look_ahead: str
    rules: Mapping[str, bool] = MappingProxyType({})
    ram_budget: str | None = None


_WAITING = {"reorder": False}
_BLUNT = {"preempt": False, "reorder": False}

ADVICE: dict[str, Advice] = {
    ON_DEMAND: Advice("lru", "off"),
    LRU: Advice("lru", "off"),
    LRU_BUNDLE: Advice("lru", "off"),
    LFU_BUNDLE: Advice("lfu", "off"),
    AUTO: Advice("auto", "auto"),
    AUTO_MEMORY: Advice("auto", "auto", ram_budget="auto"),
    "ablation-lru": Advice("lru", "off", _BLUNT),
    "ablation-policy": Advice("lfu", "off", _BLUNT),
    "ablation-prefetch": Advice("lfu", "fate", _BLUNT),
    "ablation-preemption": Advice("lfu", "fate", _WAITING),
    "ablation-reordering": Advice("lfu", "fate"),
    LEARNED: Advice("lfu", "auto"),
    # Its own priorities come on top; see activation_path.py.
    ACTIVATION_PATH: Advice("lru", "off"),
    GPU_ON_DEMAND: Advice("lru", "off"),
    GPU_LRU: Advice("lru", "off"),
    GPU_AUTO: Advice("auto", "auto"),
}

#: Kinds that read a bundle.
BUNDLED = (LRU_BUNDLE, LFU_BUNDLE, AUTO, AUTO_MEMORY, *ABLATION, *PAPERS)


@dataclass(frozen=True)
class ModelFacts:
    """What planning must know about a model; sizes in bytes.

    Attributes:
        path: its (first) GGUF file.
        files: all its files.
        file_bytes, expert_bytes: of all files; of those, expert tensors.
        slot_bytes: slots for every expert.
        least_budget: one slot in each shape class.
        largest_other: the largest tensor that holds no expert weights.
        n_layer, n_expert, n_expert_used, n_experts: layers with experts, experts in one, of those used by a token (GGUF
            keys <arch>.expert_count, <arch>.expert_used_count), experts in all layers.
        n_matrix: matrices of an expert: gate, up and down, or gate_up and down.
        kernels: the CPU layouts its experts get.
    """

    path: Path
    files: tuple[Path, ...]
    architecture: str
    kernels: str
    file_bytes: int
    expert_bytes: int
    slot_bytes: int
    least_budget: int
    largest_other: int
    n_layer: int
    n_expert: int
    n_expert_used: int
    n_experts: int
    n_matrix: int

    @property
    def other_bytes(self) -> int:
        """Bytes of the model that are not experts."""
        return self.file_bytes - self.expert_bytes

    @property
    def record_bytes(self) -> int:
        """Bytes of one expert (the mean), up to the next page: one read from a bundle."""
        return -(-self.expert_bytes // self.n_experts // 4096) * 4096

    @property
    def matrix_bytes(self) -> int:
        """Bytes of one of an expert's matrices (the mean), up to the next page: one read from a GGUF file."""
        return -(-self.expert_bytes // self.n_experts // self.n_matrix // 4096) * 4096

    @property
    def allowance(self) -> int:
        """Bytes beyond the expert budget and the other weights. While llama.cpp loads a weight that it repacks, it
        holds it twice: with very large vocabularies that is more than ALLOWANCE leaves room for."""
        return max(ALLOWANCE, self.largest_other + ALLOWANCE // 2)


@dataclass(frozen=True)
class Row:
    """One way to run a model.

    Attributes:
        kind: a key of ALL_KINDS.
        share: budget in percent of all experts, None where no budget applies.
        budget: bytes of slots; 0 for stock.
        limit: bytes of the memory control group, None for no limit.
    """

    kind: str
    share: float | None
    budget: int
    limit: int | None

    @property
    def name(self) -> str:
        """Unique among the rows of one model, e.g. "lru 50%"."""
        return f"{self.kind} {self.share:g}%" if self.share is not None else self.kind

    @property
    def stock(self) -> bool:
        return self.kind.startswith("stock")


def expand(names: Sequence[str]) -> tuple[str, ...]:
    """Kinds, with the names of ROW_SETS in the place of what they stand for; each kind once."""
    return tuple(dict.fromkeys(kind for name in names for kind in ROW_SETS.get(name, (name,))))


def plan_rows(
    model: ModelFacts,
    kinds: Sequence[str] = tuple(KINDS),
    shares: Sequence[float] = DEFAULT_BUDGETS,
    mmap_share: float = MMAP_SHARE,
) -> list[Row]:
    """The rows of one model in the order in which a round runs them.

    Args:
        kinds: keys of ALL_KINDS; stock-resident, if wanted, always runs first, because the others are compared with it.
        shares: budgets in percent of all experts, for pyengine's rows.
        mmap_share: the budget whose memory limit the memory-mapped rows get, percent.

    Raises:
        UsageError: an unknown kind, or a share that is not above 0 and at most 100 or is below the least budget.
    """
    unknown = [kind for kind in kinds if kind not in ALL_KINDS]
    if unknown:
        raise UsageError(f"there is no row {unknown[0]!r}; the rows are {', '.join((*ALL_KINDS, *ROW_SETS))}")
    rows: list[Row] = []
    for kind in (kind for kind in ALL_KINDS if kind in kinds):
        if kind == STOCK_RESIDENT:
            rows.append(Row(kind, None, 0, None))
        elif kind in MMAP_KINDS:
            rows.append(Row(kind, None, 0, _limit(model, int(mmap_share / 100 * model.slot_bytes))))
        elif kind == STOCK_GPU:
            rows.append(Row(kind, None, 0, None))
        elif kind == GPU_ON_DEMAND:
            rows.append(Row(kind, None, min(model.slot_bytes, model.n_expert_used * model.least_budget), None))
        elif kind in GPU:  # RAM is not what they differ in
            rows += [replace(_budgeted(model, kind, share), limit=None) for share in shares]
        elif kind == ON_DEMAND:
            # One slot of every shape class for each expert a token uses in one layer.
            budget = min(model.slot_bytes, model.n_expert_used * model.least_budget)
            rows.append(Row(kind, None, budget, _limit(model, budget)))
        else:
            rows += [_budgeted(model, kind, share) for share in shares]
    return rows


def _budgeted(model: ModelFacts, kind: str, share: float) -> Row:
    if not 0 < share <= 100:
        raise UsageError(f"a budget of {share:g} % is not above 0 and at most 100")
    budget = int(share / 100 * model.slot_bytes)
    if budget < model.least_budget:
        least = 100 * model.least_budget / model.slot_bytes
        raise UsageError(f"a budget of {share:g} % is below the least that {model.path.name} needs, {least:.2g} %")
    return Row(kind, share, budget, _limit(model, budget))


def _limit(model: ModelFacts, budget: int) -> int:
    return budget + model.other_bytes + model.allowance
