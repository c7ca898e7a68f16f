"""`pyengine plan --batch`, plan_batch(), the watch on a running model; no test looks at how fast anything was."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from made_up_costs import costs
from made_up_measured import MEASURED as AS_PROBED

from pyengine import Llama, bundled_model
from pyengine.cli import main
from pyengine.planner import Costs, DoesNotFitError, plan_batch
from pyengine.planner import measuring as planner_measuring
from pyengine.planner.batch_plan import Refining, known_costs, last_run, save_measured
from pyengine.planner.measuring import estimated_costs
from pyengine.planning import probe
from pyengine.planning.measured import Measured
from pyengine.planning.shape import ModelShape, read_shape
from pyengine.sessions import Request, SamplingParams, Scheduler

MEASURED = replace(AS_PROBED, prompt_miss_s=1e-5)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pyengine's cache folder, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pyengine"


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was measured; nothing is run."""
    made: list[str] = []

    def measure(*_: Any, **__: Any) -> Measured:
        made.append("speeds")
        return MEASURED

    def measure_costs(shape: ModelShape, *_: Any, **__: Any) -> Costs:
        made.append("costs")
        return replace(estimated_costs(shape, MEASURED), measured=True)

    monkeypatch.setattr(probe, "measure", measure)
    monkeypatch.setattr(planner_measuring, "measure_costs", measure_costs)
    return made


@pytest.fixture(scope="module")
def shape() -> ModelShape:
    return read_shape(bundled_model())


def plan(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["plan", *arguments], env={"COLUMNS": "80", "NO_COLOR": "1"})


def test_the_command_shows_the_inequalities_the_number_and_the_prediction(runs: list[str]) -> None:
    done = plan("--batch", "--ram-limit", "160MiB", "--prompt-tokens", "32", "--answer-tokens", "64")
    assert done.exit_code == 0, done.stderr
    assert runs == ["speeds", "costs"]
    assert "Texts of 32 + 64 tokens in 160 MiB of memory" in done.stdout
    for words in ("A + G", "hot + (Q-1) E", "T0 + Q T", "predicted", "no batch was run yet", "measured now"):
        assert words in done.stdout
    assert plan("--batch", "--ram-limit", "110MiB").exit_code == 0
    assert runs == ["speeds", "costs"], "what is known is not measured again"


def test_json_has_it_all(runs: list[str]) -> None:
    done = plan("--batch", "--ram-limit", "110MiB", "--json")
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)["batch"]
    tried = {one["n_sequences"]: one for one in report["tried"]}
    assert report["n_sequences"] in tried and tried[1]["step"]["total"] > 0
    assert report["memory_limit"] == 110 << 20 and report["last_run"] is None
    for one in tried.values():
        assert one["hidden"] == all(each["computing"] >= each["reading"] for each in one["inequalities"])
    assert "batch" not in json.loads(plan("--json").stdout)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--ram-limit", "50%"), "--ram-limit '50%' is not understood"),
        (("--ram-limit", "much"), "not understood"),
        (("--ram-limit", "1MiB"), "need more than 1,048,576 bytes of memory"),
        (("--no-probe",), "without --no-probe"),
    ],
)
def test_what_cannot_be_planned_is_said_in_a_line(arguments: tuple[str, ...], says: str, runs: list[str]) -> None:
    done = plan("--batch", *arguments)
    assert done.exit_code == 1 and says in done.stderr and len(done.stderr.splitlines()) == 1


def test_costs_are_known_once_they_were_measured(shape: ModelShape) -> None:
    assert known_costs(shape) is None
    save_measured(shape, costs())
    assert known_costs(shape) == costs()


def test_an_estimate_from_what_plan_measures_is_sound(shape: ModelShape) -> None:
    found = estimated_costs(shape, MEASURED)
    assert found.sound and not found.measured
    one_token = 30 * (found.layer_s(1) + 8 * float(found.expert_s(1)))
    assert one_token == pytest.approx(MEASURED.token_s)
    assert found.transfer_s == pytest.approx(MEASURED.load_s)


def test_less_memory_takes_fewer_texts_or_slots(shape: ModelShape) -> None:
    given = estimated_costs(shape, MEASURED)
    large, small = (
        plan_batch(shape, ram_limit=mib << 20, prompt_tokens=32, answer_tokens=32, costs=given, most_sequences=16)
        for mib in (400, 130)
    )
    assert large.best.tokens_per_s >= small.best.tokens_per_s
    assert all(one.slots == 960 for one in large.tried if one.n_sequences <= 8)
    assert small.tried[-1].slots < 960
    with pytest.raises(DoesNotFitError):
        plan_batch(shape, ram_limit=10 << 20, prompt_tokens=32, answer_tokens=32, costs=given)


@pytest.fixture(scope="module")
def llm() -> Iterator[Llama]:
    model = Llama(ram_budget="50%", bundle="off", policy="lfu", look_ahead="off", n_ctx=512, n_sequences=3, n_threads=1)
    yield model
    model.close()


def test_an_open_model_keeps_its_slots_and_context(llm: Llama) -> None:
    found = plan_batch(
        llm, prompt_tokens=100, answer_tokens=100, costs=estimated_costs(read_shape(bundled_model()), MEASURED)
    )
    assert [one.n_sequences for one in found.tried] == [1, 2], "three do not fit into 512 cells"
    assert {one.ram_budget for one in found.tried} == {llm.expert_stats()["budget_bytes"]}


def test_an_open_model_that_nobody_measured_is_glanced_at(llm: Llama) -> None:
    found = plan_batch(llm, prompt_tokens=60, answer_tokens=60)
    assert found.costs.sound and not found.costs.measured
    assert found.chosen.step.total > 0 and llm.n_tokens == 0


def test_a_run_is_watched_and_the_next_plan_knows_it(llm: Llama, shape: ModelShape) -> None:
    foretold = plan_batch(
        llm, prompt_tokens=4, answer_tokens=12, costs=estimated_costs(shape, MEASURED), most_sequences=3
    )
    refining = Refining.begin(llm, foretold)
    with Scheduler(llm, max_sequences=3) as scheduler:
        for text in (b"One", b"Two", b"Three"):
            tokens = llm.tokenize(text)
            scheduler.submit(Request(tokens, SamplingParams(max_tokens=12, temperature=1.0, seed=1, ignore_eos=True)))
        for _ in scheduler.run():
            pass
    seen = refining.refiner.n_steps
    run = refining.finish()
    assert 8 <= seen <= 14
    assert refining.watch.last is not None and refining.watch.last.wanted >= refining.watch.last.missing
    assert run is not None and run.n_sequences == 3 and run.actual_step_s > 0
    assert last_run(shape) == run
    kept = known_costs(shape)
    assert kept is not None and kept.expert_s(1) != estimated_costs(shape, MEASURED).expert_s(1)
    with Scheduler(llm, max_sequences=1) as scheduler:
        scheduler.submit(Request(llm.tokenize(b"Four"), SamplingParams(max_tokens=3)))
        assert len(list(scheduler.run())) == 1
    assert refining.refiner.n_steps == seen, "nobody watches any more"
