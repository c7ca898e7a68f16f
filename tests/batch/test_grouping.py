"""The order of the lines, and how many are computed at once."""

from __future__ import annotations

import itertools

import pytest

from pyengine.batch.grouping import MOST_AT_ONCE, Prompt, Window, choose_parallel
from pyengine.errors import UsageError
from pyengine.sessions import Request, SamplingParams


def prompt(number, tokens, max_tokens=6):
    return Prompt(number, f"key{number}", f"{number}", False, Request(tokens, SamplingParams(max_tokens=max_tokens)))


def order(window):
    taken = []
    while window.look():
        taken.append(window.take().number)
    return taken


def test_prompts_that_begin_alike_are_neighbours_within_a_window():
    prompts = [prompt(n, [n % 2, 7, n]) for n in range(10)]
    assert order(Window(prompts, 10)) == [0, 2, 4, 6, 8, 1, 3, 5, 7, 9]
    assert order(Window(prompts, 4)) == [0, 2, 1, 3, 4, 6, 5, 7, 8, 9]
    assert order(Window(prompts, 1)) == list(range(10))


def test_a_window_takes_no_more_than_its_size():
    endless = (prompt(n, [n]) for n in itertools.count())
    window = Window(endless, 4)
    assert len(window.look()) == 4
    window.prepare(3)
    window.prepare(100)
    assert next(endless).number == 8
    assert [window.take().number for _ in range(4)] == [0, 1, 2, 3]
    assert [one.number for one in window.look()] == [4, 5, 6, 7]


def test_nothing_to_do():
    window = Window([], 4)
    assert not window.look()
    assert choose_parallel(None, 64, 4096, window.look()) == 1


@pytest.mark.parametrize(
    ("n_sequences", "n_cells", "n_prompts", "expected"),
    [
        (64, 100, 50, 10),  # cells: 4 + 6 a line
        (64, 5, 50, 1),
        (8, 100, 50, 4),  # half of the sequences are for prefixes
        (1, 100, 50, 1),
        (64, 100, 3, 3),
        (512, 10**6, 256, MOST_AT_ONCE),
    ],
)
def test_as_many_at_once_as_fit(n_sequences, n_cells, n_prompts, expected):
    prompts = [prompt(n, [1, 2, 3, 4]) for n in range(n_prompts)]
    assert choose_parallel(None, n_sequences, n_cells, prompts) == expected


def test_what_is_asked_for_is_done_or_refused():
    assert choose_parallel(5, 8, 10, []) == 5
    for asked, message in ((0, "at least 1"), (9, "n_sequences=9 or more")):
        with pytest.raises(UsageError, match=message):
            choose_parallel(asked, 8, 10, [])
