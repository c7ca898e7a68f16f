"""From what a user writes to the caches and times of a replay."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pyengine.errors import BudgetError, UsageError
from pyengine.replay.layout import Layout, own_slots, shared_slots
from pyengine.replay.timing import Timing

if TYPE_CHECKING:
    from pyengine.planning.measured import Measured
    from pyengine.planning.shape import ModelShape
    from pyengine.traces import TracedModel

DEFAULT_BUDGET = "50%"
#: Sizes of a plotted sweep, shares of all experts.
SWEEP = tuple(i / 8 for i in range(1, 8))


def read_fitting_shape(path: Path, traced: TracedModel) -> ModelShape:
    """The shape of the model a trace is replayed for.

    Raises:
        UsageError: the trace is of a model of another shape.
        ModelFileError, UnmanagedModelError.
    """
    from pyengine.planning.shape import read_shape

    shape = read_shape(path)
    info = shape.info
    mine = (info.n_layer, info.n_expert, info.n_expert_used)
    # A trace that names no model counts experts up to the highest id it saw.
    unnamed = not traced.name and (traced.n_layer, traced.n_expert_used) == (mine[0], mine[2])
    fits = traced.n_expert <= mine[1] if unnamed else (traced.n_layer, traced.n_expert, traced.n_expert_used) == mine
    if not fits:
        raise UsageError(
            f"the trace has {traced.n_layer} layers and {traced.n_expert_used} of {traced.n_expert} experts per token; "
            f"{path.name} has {mine[0]} layers and uses {mine[2]} of {mine[1]}"
        )
    return shape


def layout_of_budget(budget: str, traced: TracedModel, shape: ModelShape | None) -> Layout:
    """Slots shared by all layers of one shape of expert, as in the engine. Raises BudgetError: not understood, below
    what the model needs, or bytes though no model says how many an expert has."""
    from pyengine.budget import check_wording, resolve

    check_wording(budget)
    if shape is not None:
        info = shape.info
        slots = shape.slots(resolve(budget, slot_bytes=info.slot_bytes, least=info.least_budget))
        groups = tuple(c.layers for c in shape.classes)
        return Layout(traced.n_layer, traced.n_expert, traced.n_expert_used, groups, tuple(slots))
    text = budget.strip()
    if not text.endswith("%"):
        raise BudgetError(
            f"a budget of {budget!r:.40} needs the model (-m) that says how large an expert is; or write 50%"
        )
    total = int(float(text[:-1]) / 100 * traced.n_layer * traced.n_expert + 1e-9)
    return shared_slots(traced.n_layer, traced.n_expert, traced.n_expert_used, total)


def layout_of_slots(each: int, traced: TracedModel) -> Layout:
    """`each` slots for every layer alone."""
    return own_slots(traced.n_layer, traced.n_expert, traced.n_expert_used, each)


def swept(layouts: list[Layout], traced: TracedModel) -> list[Layout]:
    """The layouts, and others of the same kind from few slots to many, ascending."""
    own = layouts[0].per_layer
    more = []
    for share in SWEEP:
        each = max(1, round(share * traced.n_expert))
        layout = (
            layout_of_slots(each, traced)
            if own
            else shared_slots(traced.n_layer, traced.n_expert, traced.n_expert_used, each * traced.n_layer)
        )
        more.append(layout)
    kept = layouts if len(layouts[0].groups) == len(more[0].groups) else []
    return sorted({layout.total: layout for layout in [*more, *kept]}.values(), key=lambda layout: layout.total)


def timing_of(
    shape: ModelShape | None, mb_per_s: float | None, compute_ms: float | None, expert_bytes: int | None
) -> Timing | None:
    """Times as given, the rest from the model and from what was measured with it here; None if nothing is asked for.
    Raises UsageError if something is missing."""
    share = Timing.expert_share
    if shape is not None:
        expert_bytes = expert_bytes or round(shape.expert_bytes)
        measured = _measured(shape)
        if measured is not None:
            mb_per_s = mb_per_s or measured.disk_bytes_per_s / 1e6
            compute_ms = compute_ms or measured.token_s * 1e3
            share = measured.expert_share
    given = {"--bandwidth": mb_per_s, "--compute": compute_ms, "--expert-bytes": expert_bytes}
    missing = [name for name, value in given.items() if not value]
    if mb_per_s and compute_ms and expert_bytes:
        return Timing(mb_per_s * 1e6, expert_bytes, compute_ms / 1e3, share)
    if len(missing) == len(given) or (shape is not None and missing == ["--bandwidth", "--compute"]):
        return None
    raise UsageError(f"for figures in time also say {' and '.join(missing)}")


def _measured(shape: ModelShape) -> Measured | None:
    from pyengine.planning import measured, probe

    try:
        key = measured.machine_key(shape.path, probe.now_used_bundle(shape.path))
        return measured.load(measured.probe_file(shape.path), key)
    except OSError:
        return None
