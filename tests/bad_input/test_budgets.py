"""Budgets that are not understood, too small, or far too large."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pyengine.native import NativeEngine

from .conftest import Refused
from .victim import attempt, in_process


@pytest.fixture(scope="module")
def least(sound_path: Path) -> int:
    """Bytes of the smallest budget that works."""
    engine = NativeEngine(sound_path)
    try:
        return engine.info.least_budget
    finally:
        engine.close()


def label(value: Any) -> str:
    huge = isinstance(value, int) and abs(value) > 10**20  # Python writes no number of thousands of digits
    return "huge" if huge else ascii(value)[:20]


@pytest.mark.parametrize(
    "budget",
    [
        *("", " ", "abc", "-1", "-5%", "%", "50 %%", "5%0", "1e9", "0x100000", "nan", "inf", "nan%", "inf%", "1..5GiB"),
        *(
            "2GiBytes",
            "1,000,000",
            "1_000_000",
            "50percent",
            "auto ma",
            "\u0663\u0660%",
            "half",
            "1 000 000",
            "50%\x00",
            "x" * 9000,
        ),
        *(None, 1.5, 1e9, float("nan"), True, False, b"50%", ["50%"], -1, -(10**5000)),
    ],
    ids=label,
)
def test_what_is_not_understood(refused: Refused, sound_path: Path, budget: Any) -> None:
    message = refused(sound_path, "ram_budget", kind="BudgetError", options={"ram_budget": budget})
    assert any(part in message for part in ("not understood", "must be a text or an int", "must not be negative"))


@pytest.mark.parametrize("budget", [0, 1, "0", "0%", "0.0001%", "0.0 GiB", "1KiB", "least - 1"])
def test_what_is_too_small_names_the_least(refused: Refused, sound_path: Path, least: int, budget: str | int) -> None:
    if budget == "least - 1":
        budget = least - 1
    message = refused(sound_path, f"at least {least:,}", kind="BudgetError", options={"ram_budget": budget})
    assert "bytes" in message


@pytest.mark.parametrize(
    "budget", ["least", "100%", "200%", "99999999999%", "9" * 400, 10**18, 10**5000, "1 TiB", "auto"], ids=label
)
def test_what_is_enough_or_more(sound_path: Path, least: int, budget: str | int) -> None:
    outcome = in_process(attempt, sound_path, {"ram_budget": least if budget == "least" else budget})
    assert outcome.exit_code == 0, outcome
    assert outcome.result.kinds == (), outcome
    assert outcome.result.text
