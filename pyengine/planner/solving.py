"""The smallest number of texts at once that hides reading, what it needs and what it gives. Pure.

More texts at once make a step longer and serve more tokens with each expert that is read; but their KV cache takes
memory from the slots, so that more must be read. What fits is: slots + KV cache + buffers + other weights <= memory.

Sought is the smallest n for which the inequalities hold. Kernels also are faster with more rows to an expert, which the
inequalities do not know; so a larger n is taken if it is needed to come near the best throughput that memory allows.
If reading cannot be hidden, the n near the best throughput is all there is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from pyengine.errors import PyengineError
from pyengine.planner.costs import CELLS, Costs
from pyengine.planner.demand import Demand
from pyengine.planner.inequalities import Inequality, StepShape, StepTime
from pyengine.planner.step_times import inequalities, step_time
from pyengine.planning.shape import ModelShape

#: Tokens that llama.cpp computes at once (n_ubatch): a step with more reads its experts twice.
MICRO_BATCH = 512
#: Chunks of prompts that are tried, tokens.
CHUNKS = (32, 64, 128, 256, MICRO_BATCH)
#: Most texts at once that are tried.
MOST_SEQUENCES = 64
#: Of the best throughput, what is near enough: fewer texts at once answer sooner.
_NEAR = 0.98
#: The same of chunks of prompts, whose effect is added to that.
_NEAR_CHUNK = 0.98


class DoesNotFitError(PyengineError):
    """Not even one text fits into the memory."""


@dataclass(frozen=True)
class Memory:
    """Bytes."""

    limit: int
    """for everything"""
    fixed: int
    """weights that are no experts, and buffers"""
    per_cell: int
    """for a KV cell and what else grows with their number"""
    slots: int | None = None
    """of slots, if that is settled: then what is left of `limit` does not matter to them"""

    def budget(self, shape: ModelShape, cells: int) -> int:
        """Of slots, beside so many KV cells; 0 if the least does not fit."""
        room = min(self.limit - self.fixed - cells * self.per_cell, shape.info.slot_bytes)
        if self.slots is not None:
            room = min(self.slots, shape.info.slot_bytes)
        return room if room >= shape.info.least_budget else 0


@dataclass(frozen=True)
class Work:
    """What is to be computed: many texts, each a prompt and an answer, tokens."""

    prompt_tokens: int
    answer_tokens: int

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.answer_tokens

    @property
    def mean_cells(self) -> float:
        """KV cells of a text that is being answered, mean over its answer."""
        return self.prompt_tokens + self.answer_tokens / 2


@dataclass(frozen=True)
class Candidate:
    """One number of texts at once."""

    n_sequences: int
    prompt_chunk: int
    """tokens of prompts in a step, beside a token of each text"""
    kv_tokens: int
    """KV cells: n_ctx of all texts together"""
    ram_budget: int
    """bytes of slots"""
    slots: int
    step: StepTime
    """without a prompt"""
    prompt_step: StepTime
    """with a chunk of one"""
    tokens_per_s: float
    """of answers, prompts computed on the way"""
    inequalities: tuple[Inequality, ...]
    missing: float
    """experts per layer and step; wanted: likewise"""
    wanted: float

    @property
    def hidden(self) -> bool:
        """Whether computing hides reading."""
        return all(one.holds for one in self.inequalities)

    @property
    def binding(self) -> Inequality:
        """The inequality that holds least."""
        return min(self.inequalities, key=lambda one: one.computing - one.reading)


@dataclass(frozen=True)
class BatchPlan:
    chosen: Candidate
    tried: tuple[Candidate, ...]
    """by n_sequences"""
    work: Work
    costs: Costs
    routing: str
    """where it comes from, a few words"""
    n_layer: int
    """that have experts"""
    demand: Demand = field(repr=False, compare=False)
    """what was planned with: it knows the steps of all that were tried"""

    @property
    def n_sequences(self) -> int:
        return self.chosen.n_sequences

    @property
    def n_hidden(self) -> int | None:
        """The smallest number of texts at once that hides reading; None: none that fits does."""
        return next((one.n_sequences for one in self.tried if one.hidden), None)

    @property
    def best(self) -> Candidate:
        """Of those tried, the one with the best throughput."""
        return max(self.tried, key=lambda one: one.tokens_per_s)


def solve(
    costs: Costs,
    demand: Demand,
    shape: ModelShape,
    memory: Memory,
    work: Work,
    *,
    routing: str = "",
    most_sequences: int = MOST_SEQUENCES,
    chunks: Sequence[int] = CHUNKS,
) -> BatchPlan:
    """The smallest n whose reading is hidden and whose throughput is near the best; else the smallest near the best.

    Raises:
        DoesNotFitError: not even one text fits.
    """
    tried: list[Candidate] = []
    for n in counts(most_sequences):
        one = candidate(costs, demand, shape, memory, work, n, _usual(chunks, n))
        if one is None:
            break
        tried.append(one)
    if not tried:
        raise DoesNotFitError(
            f"a text of {work.tokens} tokens, the least slots and the other weights need more than "
            f"{memory.limit:,} bytes of memory"
        )
    chosen = _choose(tried)
    below = max((one.n_sequences for one in tried if one.n_sequences < chosen.n_sequences), default=0)
    between = range(below + 1, chosen.n_sequences)
    finer = [candidate(costs, demand, shape, memory, work, n, _usual(chunks, n)) for n in between]
    tried = sorted([*tried, *(one for one in finer if one is not None)], key=lambda one: one.n_sequences)
    chosen = _choose(tried)
    chosen = _with_best_chunk(costs, demand, shape, memory, work, chosen, chunks)
    tried = [chosen if one.n_sequences == chosen.n_sequences else one for one in tried]
    return BatchPlan(chosen, tuple(tried), work, costs, routing, shape.info.n_layer, demand)


def _choose(tried: Sequence[Candidate]) -> Candidate:
    near = _NEAR * max(one.tokens_per_s for one in tried)
    enough = [one for one in tried if one.tokens_per_s >= near]
    return next((one for one in enough if one.hidden), enough[0])


def candidate(
    costs: Costs, demand: Demand, shape: ModelShape, memory: Memory, work: Work, n: int, chunk: int
) -> Candidate | None:
    """What n texts at once give; None if they do not fit."""
    kv_tokens = -(-n * work.tokens // CELLS) * CELLS
    budget = memory.budget(shape, kv_tokens)
    if not budget:
        return None
    slots = shape.slots(budget)
    at_once = min(slots)
    decode, mixed = demand.of(n, 0, slots), demand.of(n, chunk, slots)
    cells = n * work.mean_cells
    plain = StepShape(n, n, cells, at_once)
    step = step_time(costs, plain, decode)
    prompt_step = step_time(costs, StepShape(n + chunk, n + 1, cells, at_once), mixed)
    return Candidate(
        n_sequences=n,
        prompt_chunk=chunk,
        kv_tokens=kv_tokens,
        ram_budget=budget,
        slots=sum(slots),
        step=step,
        prompt_step=prompt_step,
        tokens_per_s=throughput(step.total, prompt_step.total, n, chunk, work),
        inequalities=tuple(inequalities(costs, plain, decode)),
        missing=decode.missing * costs.miss_factor,
        wanted=decode.wanted,
    )


def throughput(step_s: float, prompt_step_s: float, n: int, chunk: int, work: Work) -> float:
    """Tokens of answers per second in the long run, where each text that ends makes room for the next one's prompt.

    Per token of an answer, prompt_tokens / answer_tokens of prompts are computed, `chunk` in a step; while a text's
    prompt is computed it gives no token.
    """
    ratio = work.prompt_tokens / max(1, work.answer_tokens)
    # Share of the steps that have a chunk, if one of n texts then has its prompt computed: s chunk = (n - s) ratio.
    share = n * ratio / (chunk + ratio)
    if share <= 1:
        seconds = (1 - share) * step_s + share * prompt_step_s
        return (n - share) / seconds
    return chunk / ratio / prompt_step_s  # prompts in every step, and still not all n have one to go on from


def counts(most: int) -> list[int]:
    """Numbers of texts to try first: all small ones, then steps of about a quarter."""
    found, n = [], 1
    while n < most:
        found.append(n)
        n += max(1, n // 4)
    return [*found, max(1, most)]


def _usual(chunks: Sequence[int], n: int) -> int:
    """A chunk that is neither small nor large, as far as a micro-batch has room."""
    ordered = sorted(chunks)
    return min(ordered[len(ordered) // 2], max(1, MICRO_BATCH - n))


def _with_best_chunk(
    costs: Costs, demand: Demand, shape: ModelShape, memory: Memory, work: Work, one: Candidate, chunks: Sequence[int]
) -> Candidate:
    if work.prompt_tokens <= 0:
        return one
    n = one.n_sequences
    sizes = {min(chunk, max(1, MICRO_BATCH - n)) for chunk in chunks}
    others = [candidate(costs, demand, shape, memory, work, n, size) for size in sorted(sizes)]
    found = [other for other in others if other is not None]
    near = _NEAR_CHUNK * max(other.tokens_per_s for other in found)
    return next((other for other in found if other.tokens_per_s >= near), one)
