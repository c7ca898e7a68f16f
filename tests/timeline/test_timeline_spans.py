"""What follows from spans: lanes, a token's shares, which token is typical."""

from __future__ import annotations

import numpy as np
import pytest
from made_up import NOBODY, decode, spans

from pyengine.timeline.spans import ADOPTED, GIVEN_UP, Kind, Load, Timeline, lanes, load_kind, loads


def overlapping(begins: list[int], ends: list[int]) -> int:
    """Most stretches under way at once, those of no length left out."""
    return max(sum(b <= t < e for b, e in zip(begins, ends, strict=True)) for t in begins)


@pytest.mark.parametrize("seed", range(5))
def test_lanes_never_overlap_and_are_as_few_as_possible(seed: int) -> None:
    found = loads(decode(2, 8, seed).spans)
    lane = lanes(found)
    for number in set(lane.tolist()):
        mine = found[lane == number]
        assert (mine["begin_ns"][1:] >= mine["end_ns"][:-1]).all()
    assert lane.max() + 1 == overlapping(found["begin_ns"].tolist(), found["end_ns"].tolist())


def test_lanes_of_nothing() -> None:
    assert lanes(spans()).tolist() == []


def test_what_becomes_of_loads() -> None:
    found = spans(
        (0, 9, Kind.DEMAND, 0, 1, 0),
        (0, 9, Kind.DEMAND, 0, 1, ADOPTED),
        (0, 9, Kind.PREFETCH, 0, 1, 0),
        (0, 9, Kind.PREFETCH, 0, 1, GIVEN_UP),
        (0, 9, Kind.DEMAND, 0, 1, GIVEN_UP | ADOPTED),
    )
    assert [load_kind(span) for span in found] == [
        Load.DEMAND,
        Load.LATE,
        Load.PREFETCH,
        Load.GIVEN_UP,
        Load.GIVEN_UP,
    ]


def test_shares_of_a_token() -> None:
    ms = 1_000_000
    timeline = Timeline(
        spans(
            (2 * ms, 9 * ms, Kind.FFN, 0, NOBODY, 0),
            (2 * ms, 3 * ms, Kind.PREDICT, 0, NOBODY, 0),
            (3 * ms, 5 * ms, Kind.COMPUTE, 0, NOBODY, 0),
            (5 * ms, 8 * ms, Kind.STALL, 0, NOBODY, 0),
            (0, 12 * ms, Kind.DEMAND, 0, 4, 0),
            (19 * ms, 22 * ms, Kind.FFN, 0, NOBODY, 0),  # half of it belongs to the next token
        ),
        np.array([[1 * ms, 20 * ms], [20 * ms, 23 * ms]]),
    )
    shares = timeline.token(0).shares()
    assert vars(shares) == {"total": 19, "kernels": 2, "waiting": 3, "predicting": 1, "engine": 2, "other": 11}
    assert vars(timeline.token(1).shares()) | {"total": 3} == {
        "total": 3,
        "kernels": 0,
        "waiting": 0,
        "predicting": 0,
        "engine": 2,
        "other": 1,
    }


def test_shares_add_up() -> None:
    for token in decode(4, 6):
        shares = token.shares()
        parts = [shares.kernels, shares.waiting, shares.predicting, shares.engine, shares.other]
        assert min(parts) > 0
        assert sum(parts) == pytest.approx(shares.total) and shares.total == (token.end_ns - token.begin_ns) / 1e6


def test_the_typical_token_is_of_median_duration() -> None:
    tokens = np.array([[0, 50], [50, 60], [60, 90], [90, 200], [200, 220]])
    assert Timeline(spans(), tokens).typical().number == 2
    assert Timeline(spans(), tokens[:4]).typical().number == 2  # the shorter one of two in the middle
    assert Timeline(spans(), tokens[:1]).typical().number == 0
