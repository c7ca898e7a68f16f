"""What no scheme can avoid reading: misses of Belady's choice of victims on the routing of a contest's own texts.

The texts are recorded once for each model, with as many experts in memory as fit, and replayed with the slots of each
budget. Prompts count as steps that use what they need; only what decoded tokens miss is told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil

from pyengine.bench.cgroups import Groups
from pyengine.bench.launch import Outcome, launch
from pyengine.bench.rows import AUTO, Row
from pyengine.bench.sampling import BenchModel, task_of
from pyengine.bench.settings import Settings

#: Texts that are recorded, and tokens decoded in each; in contests, too, each follows the one before.
_TEXTS, _TOKENS = 2, 128


def record_misses(
    models: Sequence[BenchModel],
    settings: Settings,
    folder: Path,
    known: Sequence[Mapping[str, Any]],
    say: Callable[[str], None],
    run: Callable[..., Outcome] = launch,
) -> list[dict[str, Any]]:
    """Misses for every model and budget that is not known yet.

    Args:
        folder: for the traces.
        known: what earlier calls returned.
        run: starts one process; see launch.launch().

    Returns:
        model (name), share (percent of all experts), misses_per_token; those known at first. A model that cannot be
        recorded, or whose expert ids come from a trace, is not in it.
    """
    found = [dict(one) for one in known]
    have = {(one["model"], one["share"]) for one in found}
    for model in models:
        name = model.facts.path.name
        lacking = [share for share in settings.shares if (name, share) not in have]
        if not lacking or settings.trace is not None:
            continue
        trace = folder / f"{model.facts.path.stem}.trace.npz"
        outcome = _record(model, settings, trace, run)
        if outcome.status != "ok":
            say(f"{name}: no ceilings, its routing cannot be recorded: {outcome.reason}")
            continue
        try:
            found += [
                {"model": name, "share": share, "misses_per_token": misses}
                for share, misses in belady_misses(trace, model.facts.path, lacking)
            ]
        finally:
            trace.unlink(missing_ok=True)
    return found


def _record(model: BenchModel, settings: Settings, trace: Path, run: Callable[..., Outcome]) -> Outcome:
    facts = model.facts
    spare = psutil.virtual_memory().available - facts.other_bytes - 2 * facts.allowance
    budget = max(facts.least_budget * facts.n_expert_used, min(facts.slot_bytes, spare))
    brief = replace(settings, n_tokens=_TOKENS, n_prompts=_TEXTS, prefill_tokens=1)
    task = task_of(model, Row(AUTO, None, budget, None), brief)
    return run("pyengine.bench.recording", {"task": asdict(task), "out": str(trace)}, Groups(), settings.sample_limit_s)


def belady_misses(trace: Path, model: Path, shares: Sequence[float]) -> Iterator[tuple[float, float]]:
    """(share, misses per decoded token) for each share of all experts in percent.

    Raises:
        TraceError, OSError: the trace cannot be read.
        UsageError, ModelFileError: it is not of this model.
    """
    from pyengine.replay.bounds import belady
    from pyengine.replay.sizes import layout_of_budget, read_fitting_shape
    from pyengine.replay.steps import steps_of
    from pyengine.traces import load_trace

    recorded = load_trace(trace)
    shape = read_fitting_shape(model, recorded.model)
    steps = steps_of(recorded)
    for share in shares:
        misses = belady(steps, layout_of_budget(f"{share:g}%", recorded.model, shape))
        yield share, float(misses.missing.sum()) / max(1, steps.n_token)
