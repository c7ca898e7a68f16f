"""Costs out of made-up steps, and the steps that are measured: which experts they use, which are missing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from made_up_measured import MEASURED

from pyengine import Llama, bundled_model
from pyengine.planner import measuring
from pyengine.planner.fitting import expert_points, pace, pass_seconds
from pyengine.planner.measuring import estimated_costs, measure_costs
from pyengine.planner.spread_run import SpreadRun
from pyengine.planning.shape import ModelShape, read_shape


@pytest.fixture(scope="module")
def shape() -> ModelShape:
    return read_shape(bundled_model())


def test_kernels_of_one_expert_from_steps_whose_last_layer_has_one_token() -> None:
    # 3 layers, 2 experts each: 4 ms to begin, 1 ms for a row, 0.5 for each further one.
    kernels = {1: 3 * 6e-3, 5: 2 * (4e-3 + 2 * 3e-3) + 6e-3}
    pass_s = pass_seconds(kernels[1], 2 * (4e-3 + 4 * 1e-3) + 6e-3, 3)
    assert pass_s == pytest.approx(4e-3)
    assert expert_points(kernels, 2, 3, 2, pass_s) == ((1, pytest.approx(1e-3)), (5, pytest.approx(3e-3)))
    assert pass_seconds(kernels[1], 0.0, 3) == 0 and pass_seconds(1.0, 1.01, 3) == pytest.approx(0.3)


def test_rows_are_those_that_tokens_spread_over_experts_have() -> None:
    # 3 layers, tokens use 2 of 8 experts in turn: of 8 tokens each expert has 2, of 16 it has 4. Fours take less.
    last = 2 * 1e-3
    kernels = {1: 3 * last, 2: 2 * 4 * 1e-3 + last, 8: 2 * 8 * 2e-3 + last, 16: 2 * 8 * 1.5e-3 + last}
    found = expert_points(kernels, 8, 3, 2, 0.0)
    assert found == ((1, pytest.approx(1e-3)), (2, pytest.approx(2e-3)), (4, pytest.approx(1.5e-3)))


def test_pace_and_latency_of_reads() -> None:
    # 3 ms in each of 10 layers, and 2 ms per expert.
    assert pace(0.03 + 80 * 2e-3, 80, 0.03 + 320 * 2e-3, 320, 10) == (pytest.approx(2e-3), pytest.approx(3e-3))
    # A disk that became faster, or slower: what many have taken is the pace.
    assert pace(0.9, 80, 0.64, 320, 10) == (pytest.approx(2e-3), pytest.approx(0.074))
    assert pace(0.0, 80, 0.64, 320, 10) == (pytest.approx(2e-3), 0.0)


def test_many_come_at_the_disks_pace_if_they_are_not_repacked(shape: ModelShape) -> None:
    slow = replace(MEASURED, missing=((1, 0.0002), (8, 0.0037)), disk_bytes_per_s=6.3e8)
    assert slow.load_s == pytest.approx(5e-4)
    assert estimated_costs(shape, slow).transfer_s == pytest.approx(5e-4)
    assert estimated_costs(shape, replace(slow, bundle=True)).transfer_s == pytest.approx(1e-4)
    assert estimated_costs(shape, replace(slow, bundle=True, disk_bytes_per_s=1e6)).transfer_s == pytest.approx(5e-4)


@pytest.fixture(scope="module")
def llm() -> Iterator[Llama]:
    model = Llama(ram_budget="100%", bundle="off", policy="lru", look_ahead="off", n_ctx=64, n_threads=1)
    yield model
    model.close()


def test_tokens_are_spread_over_as_many_experts_as_asked_for(llm: Llama, shape: ModelShape) -> None:
    run = SpreadRun(llm, shape)
    assert (run.width, run.tokens(1), run.tokens(2)) == (32, 4, 8)
    assert (run.spread(12), run.tokens(2)) == (12, 3)
    first = run.step(3, all_outputs=True)
    assert first.misses == 30 * 12, "all that the tokens use, and no others"
    again = run.step(3)
    assert again.misses == 0 and again.kernels > 0 and again.working <= again.wall
    run.spread(32)
    assert run.step(4, all_outputs=True).misses == 30 * 20
    llm.set_ram_budget(shape.info.slot_bytes // 2)
    run.step(4)
    assert run.step(4).misses == 29 * 32 + 8, "of the last layer only one token comes to the experts"
    assert (run.spread(1), run.spread(99)) == (8, 32)


def test_a_model_is_measured(shape: ModelShape, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "PATIENCE_S", 0.2)
    monkeypatch.setattr(measuring, "REPEATS", 2)
    monkeypatch.setattr(measuring, "ROWS", (1, 2, 5))
    said: list[str] = []
    found = measure_costs(shape, MEASURED, said.append, bundle="off")
    assert found.sound and found.measured and len(said) == 3
    assert {n for n, _ in found.layer} >= {1, 2} and found.expert[0][0] == 1
    assert found.transfer_s > 0 and found.host_s > 0 and found.recall == 0
    assert found.transfer_s != estimated_costs(shape, MEASURED).transfer_s, "it was seen here"
