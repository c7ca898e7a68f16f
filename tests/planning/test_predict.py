"""Predictions follow from measurements as the engine's structure says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pyengine.planning.measured import Measured
from pyengine.planning.predict import MICRO_BATCH, ExpertCounts, decode_seconds, prefill_seconds
from pyengine.planning.routing import Misses, uniform_routing

COUNTS = ExpertCounts(n_layer=4, n_expert_used=2)
MEASURED = Measured(
    token_s=0.010,
    token_past_s=1e-6,
    expert_share=0.4,
    missing=((1, 0.001), (2, 0.003)),
    prompt_token_s=0.001,
    prompt_past_s=1e-6,
    pair_s=1e-4,
    prompt_miss_s=2e-4,
    bytes_per_miss=1e6,
    overhead_bytes=0,
    disk_bytes_per_s=1e9,
    disk_latency_s=1e-4,
    n_threads=2,
    direct_io=True,
    bundle=False,
    took_s=1.0,
)


def misses(*per_layer: int, wanted: int = 2) -> Misses:
    """Every step misses so many in each layer."""
    of_layer = np.zeros((len(per_layer), wanted + 1))
    of_layer[np.arange(len(per_layer)), per_layer] = 1
    return Misses(np.array(per_layer, float), of_layer, np.full(len(per_layer), float(wanted)))


def test_a_token_takes_what_was_measured() -> None:
    assert decode_seconds(MEASURED, misses(0, 0, 0, 0), 0) == pytest.approx(0.010)
    assert decode_seconds(MEASURED, misses(1, 0, 0, 2), 0) == pytest.approx(0.010 + 0.001 + 0.003)
    assert decode_seconds(MEASURED, misses(0, 0, 0, 0), 1000) == pytest.approx(0.011)


def test_between_two_measured_numbers_of_misses_time_is_interpolated() -> None:
    measured = replace(MEASURED, missing=((1, 0.001), (4, 0.004)))
    assert decode_seconds(measured, misses(3, wanted=4), 0) == pytest.approx(0.010 + 0.003)


def test_it_is_the_mix_of_layers_that_counts_not_the_mean() -> None:
    half = Misses(np.array([1.0]), np.array([[0.5, 0.0, 0.5]]), np.array([2.0]))
    assert decode_seconds(MEASURED, half, 0) == pytest.approx(0.010 + 0.5 * 0.003)


def prefill(n: int, missing: int, wanted: int = 8, *, cold: bool = True, measured: Measured = MEASURED) -> float:
    return prefill_seconds(
        measured,
        COUNTS,
        n,
        lambda _, first: misses(*[missing if first or not cold else 0] * 4, wanted=wanted),
        cold=cold,
    )


def test_a_prompt_bound_by_kernels_hides_the_loads() -> None:
    fast = replace(MEASURED, missing=((1, 1e-9), (2, 2e-9)), prompt_miss_s=0.0)
    assert prefill(512, 8, measured=fast) == pytest.approx(prefill(512, 0), rel=1e-6)


def test_a_prompt_bound_by_the_disk_takes_as_long_as_the_loads() -> None:
    slow = replace(MEASURED, missing=((1, 1.0), (2, 2.0)))
    # Three layers load 8 experts; in the last, only the last token's two are used, a quarter of those that are missing.
    assert prefill(16, 8, measured=slow) == pytest.approx(3 * 8 + 2, rel=0.01)


def test_misses_only_ever_take_longer() -> None:
    times = [prefill(64, m) for m in range(9)]
    assert times == sorted(times) and times[-1] > times[0]


def test_a_long_prompt_is_cold_in_its_first_micro_batch_only() -> None:
    asked: list[tuple[int, bool]] = []

    def note(n: int, first: bool) -> Misses:
        asked.append((n, first))
        return misses(0, 0, 0, 0)

    prefill_seconds(MEASURED, COUNTS, 2 * MICRO_BATCH + 7, note, cold=True)
    assert asked == [(MICRO_BATCH, True), (MICRO_BATCH, False), (7, False)]


def test_attention_makes_the_second_half_of_a_prompt_slower() -> None:
    assert prefill(1024, 0, cold=False) > 2 * prefill(512, 0, cold=False)
    flat = replace(MEASURED, prompt_past_s=0.0)
    assert prefill(1024, 0, cold=False, measured=flat) == pytest.approx(2 * prefill(512, 0, cold=False, measured=flat))


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_more_slots_never_miss_more(share: float) -> None:
    routing = uniform_routing(6, 16, 4, 200)
    layers = [range(6)]
    less, more = (routing.decode(layers, [int(s * 96)]).hit_rate for s in (share, share + 0.25))
    assert less < more <= 1
    assert (more == 1) == (share == 0.75)


def test_uniform_routing_hits_a_little_less_than_its_share_of_slots() -> None:
    """The layer that is about to compute has the fewest residents: all others came after it."""
    hit_rate = uniform_routing(30, 32, 8).decode([range(30)], [480]).hit_rate
    assert 0.40 < hit_rate < 0.5


def test_classes_do_not_share_slots() -> None:
    routing = uniform_routing(4, 16, 4, 200)
    both = routing.decode([[0, 2], [1, 3]], [32, 8])
    assert both.per_layer[[0, 2]].sum() == 0
    assert both.per_layer[[1, 3]].min() > 1


def test_a_prompt_uses_nearly_all_experts_and_a_token_few() -> None:
    routing = uniform_routing(4, 32, 4)
    layers, slots = [range(4)], [64]
    assert routing.prefill(256, layers, slots, cold=True).wanted.tolist() == [32] * 4
    assert routing.prefill(1, layers, slots, cold=True).wanted.tolist() == [4] * 4
    few = routing.prefill(6, layers, slots, cold=True).wanted.mean()
    assert few == pytest.approx(32 * (1 - (1 - 4 / 32) ** 6), rel=0.15)


def test_cold_prompts_miss_everything_and_warm_ones_what_does_not_fit() -> None:
    routing = uniform_routing(4, 32, 4)
    layers = [range(4)]
    assert routing.prefill(256, layers, [128], cold=True).hit_rate == 0
    assert routing.prefill(256, layers, [128], cold=False).hit_rate == 1
    assert routing.prefill(256, layers, [64], cold=False).hit_rate == 0, "a cycle longer than the slots: LRU never hits"
