"""Plans for experts in slots of a GPU, which is a wrapped CPU device here; no test looks at how fast anything was."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from made_up_costs import costs
from models.fixtures import ModelFactory, generated_model

from pyengine import Llama
from pyengine.cli import main
from pyengine.errors import UsageError
from pyengine.planner import Costs, batch_plan, plan_batch
from pyengine.planner.batch_on_gpu import plan_on_gpu
from pyengine.planner.batch_plan import Refining, known_costs, last_run, place_of, save_measured, shape_of
from pyengine.planner.gpu_measuring import costs_on_gpu
from pyengine.planner.solving import DoesNotFitError, Work
from pyengine.planning.shape import read_shape
from pyengine.sessions import Request, SamplingParams, Scheduler

__all__ = ["generated_model"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pyengine's cache folder, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def path(generated_model: ModelFactory) -> Path:
    return generated_model("llama-q4_0").path


@pytest.fixture(scope="module")
def llm(path: Path) -> Iterator[Llama]:
    model = Llama(
        path,
        gpu="CPU",
        vram_budget="50%",
        ram_budget="100%",
        policy="lfu",
        look_ahead="off",
        n_ctx=256,
        n_sequences=4,
        n_threads=1,
        n_threads_batch=1,
    )
    yield model
    model.close()


def known(**changed: object) -> Costs:
    return costs(**({"device": "CPU", "stream_tokens": 16} | changed))


def test_an_open_model_is_measured_and_then_as_it_was(llm: Llama) -> None:
    llm.eval([5, 6, 7])
    before = np.array(llm._ctx.get_logits()[: llm.n_vocab()])
    assert llm.engine is not None
    llm.engine.native.set_link_limit(10_000_000)  # so that moving is waited for
    try:
        found = costs_on_gpu(llm, shape_of(llm))
    finally:
        llm.engine.native.set_link_limit(0)
    assert llm.n_tokens == 0
    llm.eval([5, 6, 7])
    assert np.array_equal(np.array(llm._ctx.get_logits()[: llm.n_vocab()]), before), "the router has its say again"
    stats = llm.expert_stats()
    assert found.sound and found.measured and found.device == "CPU" and found.stream_tokens == 16
    assert found.transfer_bytes == pytest.approx(stats["expert_bytes"] / stats["experts"]), "the link has counted them"
    assert found.transfer_s > 0 and found.disk_s == 0 and found.ram_share == 1


def test_it_is_measured_once_for_a_device_and_a_link(llm: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []

    def measure(*_: object) -> Costs:
        assert llm.engine is not None
        measured.append(llm.engine.native.link_limit)
        return known(transfer_s=float(len(measured)))

    monkeypatch.setattr(batch_plan, "costs_on_gpu", measure)
    assert llm.engine is not None
    try:
        for limit in (0, 0, 10_000_000, 10_000_000, 0):
            llm.engine.native.set_link_limit(limit)
            plan = plan_batch(llm, prompt_tokens=16, answer_tokens=16)
            assert plan.costs.device == "CPU"
    finally:
        llm.engine.native.set_link_limit(0)
    assert measured == [0, 10_000_000, 0], "the last link's costs are kept, no other's"
    assert {one.ram_budget for one in plan.tried} == {llm.expert_stats()["budget_bytes"]}


def test_costs_of_ram_and_of_a_gpu_are_kept_apart(llm: Llama) -> None:
    shape, place = shape_of(llm), place_of(llm)
    assert place is not None and place.in_ram and place.device.name == "CPU"
    save_measured(shape, costs())
    assert known_costs(shape, place) is None
    save_measured(shape, known(), place)
    assert known_costs(shape, place) == known() and known_costs(shape) == costs()
    assert known_costs(shape, replace(place, link_limit=1)) is None
    assert known_costs(shape, replace(place, in_ram=False)) is None


def half_of_a_step(llm: Llama) -> tuple[tuple[int, float], ...]:
    """Seconds of a layer by tokens, as costs have them: half of what this machine takes."""
    times = []
    for _ in range(9):
        llm.reset()
        start = time.perf_counter()
        llm.eval([5, 6, 7])
        times.append(time.perf_counter() - start)
    layer = statistics.median(times) / shape_of(llm).info.n_layer / 2
    return ((1, layer), (101, 2 * layer))


def test_a_run_corrects_them(llm: Llama) -> None:
    place = place_of(llm)
    before = known(layer=half_of_a_step(llm))  # what is off by more than some times is not believed
    foretold = plan_batch(llm, prompt_tokens=4, answer_tokens=12, costs=before, most_sequences=3)
    refining = Refining.begin(llm, foretold)
    with Scheduler(llm, max_sequences=3) as scheduler:
        for first in (5, 50, 100):
            sampling = SamplingParams(max_tokens=14, seed=1, ignore_eos=True)
            scheduler.submit(Request([first, first + 1, first + 2], sampling))
        for _ in scheduler.run():
            pass
    last = refining.watch.last
    assert last is not None and last.compute_s == 0, "a GPU's kernels are not timed"
    run = refining.finish()
    assert run is not None and run.n_sequences == 3
    shape = shape_of(llm)
    assert last_run(shape, place) == run and last_run(shape) is None
    kept = known_costs(shape, place)
    assert kept is not None and kept.device == "CPU" and kept.layer_s(3) != before.layer_s(3)


def test_a_model_is_planned_within_the_memory_of_the_gpu(path: Path, llm: Llama) -> None:
    shape, place = shape_of(llm), place_of(llm)
    assert place is not None
    save_measured(shape, known(), place)
    file, work = read_shape(path), Work(16, 16)
    large, limit, where, _ = plan_on_gpu(file, "CPU", work, vram_limit=1 << 30, ram_budget="100%")
    assert limit == 1 << 30 and where == place
    assert large.tried[0].ram_budget == shape.info.slot_bytes, "as large as they are on the device"
    least = plan_on_gpu(file, "CPU", work, vram_limit=40 << 20, ram_budget="100%")[0]
    assert least.tried[-1].kv_tokens <= large.tried[-1].kv_tokens
    with pytest.raises(DoesNotFitError):
        plan_on_gpu(file, "CPU", work, vram_limit=1, ram_budget="100%")
    with pytest.raises(UsageError, match="not known"):
        plan_on_gpu(file, "nowhere", work)
    with pytest.raises(UsageError, match="nothing is known"):
        plan_on_gpu(file, "CPU", work, ram_budget="0", may_measure=False)


def test_the_command_prints_it(path: Path, llm: Llama) -> None:
    place = place_of(llm)
    save_measured(shape_of(llm), known(transfer_s=1e-3, transfer_bytes=1e6), place)
    arguments = ["plan", "-m", str(path), "--no-probe", "--batch", "--gpu", "CPU", "--ram-budget", "100%"]
    arguments += ["--vram-limit", "100MiB", "--prompt-tokens", "8", "--answer-tokens", "8"]
    done = CliRunner().invoke(main, arguments, env={"COLUMNS": "100", "NO_COLOR": "1"})
    assert done.exit_code == 0, done.stderr
    for words in ("100 MiB of memory of CPU", "1 GB/s over the link", "A + G", "measured earlier"):
        assert words in done.stdout
    report = json.loads(CliRunner().invoke(main, [*arguments, "--json"]).stdout)["batch"]
    assert report["costs"]["device"] == "CPU" and report["memory_limit"] == 100 << 20
