"""From options to results: prepares models and machine, runs the rounds, writes CSV, record, plots and report."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyengine.bench import quiet
from pyengine.bench.bundle_file import find_bundle
from pyengine.bench.machine import machine_record
from pyengine.bench.model_facts import read_facts
from pyengine.bench.replay_trace import TraceTexts
from pyengine.bench.results import CSV, Run, record, write_record
from pyengine.bench.rounds import take_samples
from pyengine.bench.rows import BUNDLED, GPU
from pyengine.bench.samples import CsvWriter, Sample
from pyengine.bench.sampling import BenchModel, Sampler
from pyengine.bench.settings import Settings
from pyengine.bench.widened import widened_model
from pyengine.errors import UsageError


@dataclass(frozen=True)
class Order:
    """What a user asks for.

    Attributes:
        models: GGUF files; widened: neurons per expert of widened copies of the bundled model, see widened_model.
        out: folder for the results; made if need be, results in it are replaced.
        command: the command line, for the record.
        plots: draw them; report: where to write the page, or None.
    """

    models: Sequence[Path]
    widened: Sequence[int]
    settings: Settings
    make_bundles: bool
    out: Path
    report: Path | None
    plots: bool
    force: bool
    command: str


def run_benchmark(order: Order, say: Callable[[str], None]) -> Run:
    """Measure, and write everything into the folder.

    Raises:
        UsageError: the order cannot be carried out as it stands, or the machine is busy.
        PyengineError, OSError, ValueError: a model, trace or folder cannot be used.
        KeyboardInterrupt: what was measured until then is in the CSV.
    """
    if order.plots:
        import_plotting()
    models = prepare_models(order, say)
    for folder in (order.out, *([order.report.parent] if order.report else [])):
        folder.mkdir(parents=True, exist_ok=True)
    content = record_of(order, models)
    sampler = Sampler(order.settings, order.out)
    samples: list[Sample] = []
    try:
        with (order.out / CSV).open("w", encoding="utf-8", newline="") as file:
            table = CsvWriter(file)
            for sample in take_samples(models, order.settings, sampler, say):
                table.add(sample)
                samples.append(sample)
    finally:
        content |= {"caches": sampler.caches, "probes": sampler.probes, "notes": sampler.notes}
        write_record(order.out, content)
    run = Run(order.out, samples, content)
    if order.plots:
        from pyengine.bench.plots import draw

        draw(samples, order.out)
    if order.report is not None:
        from pyengine.bench.report import report

        order.report.write_text(report([run], order.report), encoding="utf-8")
    return run


def prepare_models(order: Order, say: Callable[[str], None]) -> list[BenchModel]:
    """Facts, and bundles where wanted; checks that everything fits before the first minute is spent."""
    from pyengine.bench.rows import plan_rows

    paths = [*order.models, *(widened_model(n_ff, say) for n_ff in order.widened)]
    names = [path.name for path in paths]
    if len(set(names)) < len(names):
        raise UsageError("two models have the same name; results could not tell them apart")
    settings = order.settings
    _check_gpu(settings)
    models = []
    for path in paths:
        facts = read_facts(path)
        plan_rows(facts, settings.kinds, settings.shares)
        if settings.trace is not None:
            TraceTexts(settings.trace, settings.n_prompts).check(facts)
        wanted = any(kind in BUNDLED for kind in settings.kinds)
        models.append(BenchModel(facts, find_bundle(facts, make=order.make_bundles, say=say) if wanted else None))
    return models


def _check_gpu(settings: Settings) -> None:
    """Raise UsageError if rows on a GPU were asked for without one, or with one that is not there."""
    from pyengine import startup, vram

    wanted = [kind for kind in settings.kinds if kind in GPU]
    if wanted and settings.gpu is None:
        raise UsageError(f"row {wanted[0]!r} needs a GPU; name one with --gpu")
    if settings.gpu is not None:
        startup.check()
        if vram.choose(settings.gpu, "auto", "auto") is None:
            raise UsageError('--gpu takes the name of a device, e.g. "CUDA0"')


def record_of(order: Order, models: Sequence[BenchModel]) -> dict[str, Any]:
    """What is known before the first sample. Raises UsageError if the machine is busy, unless forced."""
    busy = (
        sum(share for share, _ in quiet.other_programs(quiet.WATCH_S)) if order.force else quiet.refuse_busy_machine()
    )
    return record(
        machine_record(models[0].facts.path.parent),
        order.settings,
        models,
        command=order.command,
        busy=busy,
        forced=order.force,
    )


def import_plotting() -> None:
    """Raise UsageError now and not after an hour if plots cannot be drawn."""
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise UsageError('plots need matplotlib: pip install "pyengine[bench]", or --no-plots')


_RATE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([kmg]?)b?(?:/s)?", re.IGNORECASE)


def bytes_per_second(text: str) -> int:
    """A disk's speed as people write it: "200M" is 200 * 10^6 bytes per second. Raises UsageError."""
    match = _RATE.fullmatch(text.strip())
    value = float(match[1]) * {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}[match[2].lower()] if match else 0
    if value < 1:
        raise UsageError(f"a disk limit of {text!r} is not understood; write 200M for 200 MB per second")
    return int(value)
