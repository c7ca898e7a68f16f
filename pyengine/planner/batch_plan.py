"""Planning a batch: costs as they are known, or measured now; the routing that is known; the memory there is."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyengine import vram
from pyengine.budget import available_memory, memory_limit, reserve
from pyengine.errors import UnmanagedModelError
from pyengine.native import Device
from pyengine.planner.costs import Costs
from pyengine.planner.demand import Demand
from pyengine.planner.glimpse import glimpsed_costs
from pyengine.planner.gpu_measuring import costs_on_gpu
from pyengine.planner.kept_costs import Kept, LastRun, costs_file, load_costs, save_costs
from pyengine.planner.measuring import estimated_costs
from pyengine.planner.refine import Refiner
from pyengine.planner.solving import MICRO_BATCH, MOST_SEQUENCES, BatchPlan, Memory, Work, solve
from pyengine.planner.watching import StepWatch
from pyengine.planning import measured as probes
from pyengine.planning import probe
from pyengine.planning.gguf_header import read_header
from pyengine.planning.plan import find_routing
from pyengine.planning.shape import ModelShape, read_shape
from pyengine.policies import DEFAULT_POLICY

if TYPE_CHECKING:
    from pyengine import Llama

#: Bytes of an activation.
_FLOAT = 4


def plan_batch(
    model: Llama | ModelShape | Path,
    *,
    ram_limit: int | None = None,
    prompt_tokens: int,
    answer_tokens: int,
    most_sequences: int = MOST_SEQUENCES,
    costs: Costs | None = None,
    trace: Path | None = None,
) -> BatchPlan:
    """How many texts to compute at once, and what for.

    Quick if this machine was measured with this model (`pyengine plan`). Otherwise a model file is probed for some
    seconds; an open model computes some tokens, so that its context is empty afterwards.

    Args:
        model: a Llama keeps its slots and its context, whatever `ram_limit` says: the plan is for them.
        ram_limit: bytes for everything; None: what the machine can spare.
        prompt_tokens, answer_tokens: of a usual text.
        costs: instead of those that are known.
        trace: routing to plan with; None: the one that is known, see pyengine.planning.plan.find_routing.

    Raises:
        UnmanagedModelError: the model has no experts that are managed.
        DoesNotFitError: not even one such text fits.
        ProbeError, OSError, PyengineError: nothing is known of this machine, and it cannot be measured.
    """
    work = Work(max(0, prompt_tokens), max(1, answer_tokens))
    if isinstance(model, (ModelShape, Path)):
        shape = model if isinstance(model, ModelShape) else read_shape(model)
        found = costs or known_costs(shape) or _probed(shape)
        fixed = shape.other_bytes + found.buffer_bytes
        limit = available_memory() - reserve() if ram_limit is None else ram_limit
        demand, words = demand_of(shape, trace=trace)
        memory = Memory(limit, fixed, found.kv_bytes_per_token + attention_bytes_per_cell(shape))
        return solve(found, demand, shape, memory, work, routing=words, most_sequences=most_sequences)
    if model.engine is None:
        raise UnmanagedModelError(f"nothing is planned: {model.engaged}")
    shape, place = shape_of(model), place_of(model)
    stats = model.expert_stats()
    found = costs or known_costs(shape, place) or _glimpsed(model, shape, place)
    if place is not None:
        found = replace(found, ram_share=min(1.0, stats["ram_slots"] / shape.info.n_experts_total))
    demand, words = demand_of(shape, model.engine.policy, trace)
    most = min(most_sequences, int(model.n_ctx()) // work.tokens)
    memory = Memory(memory_limit(), 0, 0, int(stats["budget_bytes"]))
    return solve(found, demand, shape, memory, work, routing=words, most_sequences=max(1, most))


def _glimpsed(llm: Llama, shape: ModelShape, place: Place | None) -> Costs:
    """Of an open model that nobody measured. On a GPU that is soon done in full, and kept."""
    if place is None:
        return glimpsed_costs(llm, shape)
    found = costs_on_gpu(llm, shape)
    save_measured(shape, found, place)
    return found


def demand_of(shape: ModelShape, policy: str = DEFAULT_POLICY, trace: Path | None = None) -> tuple[Demand, str]:
    """What is known of the model's routing, and a few words on where it comes from. Raises as find_routing does."""
    routing, words = find_routing(shape, trace)
    known = policy if policy in ("lru", "lfu", "lrfu", "expert-map") else DEFAULT_POLICY
    return Demand(routing, [c.layers for c in shape.classes], known), words


def attention_bytes_per_cell(shape: ModelShape) -> int:
    """Of llama.cpp's buffers, what grows with the KV cells: products of queries and keys, of all heads (GGUF key
    <arch>.attention.head_count), of a micro-batch, and their mask; flash attention would not keep them."""
    header, arch = read_header(shape.path), shape.info.architecture
    heads = max(header.per_layer(f"{arch}.attention.head_count", 1, 1), default=1)
    return _FLOAT * MICRO_BATCH * (heads + 1)


@dataclass(frozen=True)
class Place:
    """A GPU whose memory has the slots: what costs depend on beside the machine and the model."""

    device: Device
    link_limit: int = 0
    """bytes per second, of an imitated slow link; 0: as the machine has it"""
    in_ram: bool = True
    """every expert is; otherwise costs know the disk, too"""


def place_of(llm: Llama) -> Place | None:
    """Where the experts of an open model have their slots; None: RAM."""
    assert llm.engine is not None
    stats = llm.expert_stats()
    if stats["gpu"] is None:
        return None
    in_ram = stats["ram_slots"] >= stats["experts"]
    return Place(vram.find(str(stats["gpu"])), llm.engine.native.link_limit, in_ram)


def shape_of(llm: Llama) -> ModelShape:
    """Of an open model, with slots of the size that they have where they are. Raises PyengineError, OSError."""
    assert llm.engine is not None
    shape = read_shape(Path(llm.model_path))
    return shape if llm.expert_stats()["gpu"] is None else replace(shape, info=llm.engine.info)


def key_of(shape: ModelShape, place: Place | None = None) -> dict[str, Any]:
    """What must be equal for kept costs to hold. Raises OSError, PyengineError."""
    if place is None:
        return probes.machine_key(shape.path, probe.now_used_bundle(shape.path))
    device = place.device
    return probes.machine_key(shape.path, False) | {
        "device": [device.name, device.description, device.total_bytes, device.unified],
        "link_limit": place.link_limit,
        "in_ram": place.in_ram,
    }


def _file_of(shape: ModelShape, place: Place | None) -> Path:
    return costs_file(shape.path, "" if place is None else place.device.name)


def known_costs(shape: ModelShape, place: Place | None = None) -> Costs | None:
    """Costs that were measured here before, or estimated from what `pyengine plan` measured; None: neither. On a GPU
    nothing is estimated."""
    key = key_of(shape, place)
    kept = load_costs(_file_of(shape, place), key)
    if kept is not None:
        return kept.costs
    if place is not None:
        return None
    measured = probes.load(probes.probe_file(shape.path), key)
    return None if measured is None else estimated_costs(shape, measured)


def save_measured(shape: ModelShape, costs: Costs, place: Place | None = None) -> None:
    """Keep costs for the next plan, if there is a folder to keep them in."""
    with contextlib.suppress(OSError):
        save_costs(_file_of(shape, place), key_of(shape, place), Kept(costs))


def last_run(shape: ModelShape, place: Place | None = None) -> LastRun | None:
    """What the last batch was like against its plan; None if nothing is known."""
    kept = load_costs(_file_of(shape, place), key_of(shape, place))
    return None if kept is None else kept.run


def _probed(shape: ModelShape) -> Costs:
    measured = probe.measure(shape)
    with contextlib.suppress(OSError):
        probes.save(probes.probe_file(shape.path), key_of(shape), measured)
    return estimated_costs(shape, measured)


@dataclass
class Refining:
    """A plan that its run corrects: begin with the model that runs it, tell finish() when it has ended."""

    plan: BatchPlan
    shape: ModelShape
    refiner: Refiner
    watch: StepWatch
    place: Place | None = None

    @classmethod
    def begin(cls, llm: Llama, plan: BatchPlan) -> Refining:
        """Watch `llm`, which has managed experts, while it runs `plan`."""
        shape = shape_of(llm)
        n, chunk = plan.n_sequences, plan.chosen.prompt_chunk
        # What the routing foretells for any other kind of step would have to be found out now, between two steps. When
        # a text ends, the next one's prompt is computed beside those that go on.
        kinds = {(one.n_sequences, 0) for one in plan.tried} | {(n, chunk), (n - 1, chunk)}

        def slots() -> list[int]:
            return shape.slots(int(llm.expert_stats()["budget_bytes"]))

        refiner = Refiner(plan.costs, plan.demand, slots)
        return cls(plan, shape, refiner, StepWatch(llm, refiner, kinds), place_of(llm))

    def finish(self) -> LastRun | None:
        """Stop watching; keep the corrected costs, and how the run was, for the next plan. Returns the latter; None if
        the run was too short to say anything."""
        self.watch.stop()
        seen = self.refiner.commonest()
        if seen is None:
            return None
        n, n_step = seen
        actual = self.refiner.actual_step_s(n)
        planned = next((one.step.total for one in self.plan.tried if one.n_sequences == n), None)
        run = None if actual is None or planned is None else LastRun(n, n_step, planned, actual)
        kept = Kept(self.refiner.costs, run)
        if kept.costs.sound:
            with contextlib.suppress(OSError):  # a full disk, say: the next plan is as this one was
                save_costs(_file_of(self.shape, self.place), key_of(self.shape, self.place), kept)
        return run
