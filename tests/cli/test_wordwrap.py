"""Streamed text broken at word boundaries."""

from __future__ import annotations

import random

import pytest
from rich.cells import cell_len

from pyengine.cli.wordwrap import WordWrap


def wrapped(text, width, pieces=1, seed=0):
    """`text` fed in `pieces` random pieces."""
    cuts = sorted(random.Random(seed).choices(range(len(text) + 1), k=pieces - 1))
    wrap = WordWrap(width)
    out = [wrap.feed(text[a:b]) for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    return "".join(out) + wrap.finish()


def test_words_stay_whole():
    assert wrapped("the quick brown fox jumps", 10) == "the quick\nbrown fox\njumps"


def test_a_line_may_be_exactly_full():
    assert wrapped("12345 7890 next", 10) == "12345 7890\nnext"


def test_a_word_longer_than_the_line_is_left_to_the_terminal():
    assert wrapped("a " + "x" * 25 + " b", 10) == "a\n" + "x" * 25 + "\nb"


def test_newlines_and_indentation_are_kept():
    assert wrapped("- one\n  - two\n\nthree", 20) == "- one\n  - two\n\nthree"


def test_wide_characters_count_two_columns():
    assert wrapped("日本 日本 日本", 10) == "日本 日本\n日本"


def test_fenced_code_is_not_wrapped_and_prose_after_it_is():
    code = "```python\nsome code that is rather long\n```\n"
    assert wrapped(code + "prose that is long", 10) == code + "prose that\nis long"


def test_control_characters_are_removed_but_tab_and_newline():
    assert wrapped("a\x1b[2Jb\tc\x07\x9bd\r\ne", 80) == "a[2Jb\tcd\ne"


@pytest.mark.parametrize("seed", range(20))
def test_pieces_do_not_change_the_result(seed):
    letters = random.Random(seed)
    words = ["".join(letters.choices("abc日 \n`", k=letters.randrange(1, 15))) for _ in range(60)]
    text = " ".join(words)
    whole = wrapped(text, 20)
    assert wrapped(text, 20, pieces=1 + seed * 5, seed=seed) == whole
    assert whole.split() == text.split()


@pytest.mark.parametrize("seed", range(5))
def test_no_line_of_short_words_is_too_long(seed):
    letters = random.Random(seed)
    text = " ".join("".join(letters.choices("abcdef", k=letters.randrange(1, 12))) for _ in range(200))
    assert all(cell_len(line) <= 24 for line in wrapped(text, 24, pieces=50, seed=seed).split("\n"))


def test_at_most_one_word_is_held_back():
    wrap = WordWrap(80)
    shown = ""
    text = "some words of an answer that comes in small pieces"
    for end in range(1, len(text) + 1):
        shown += wrap.feed(text[end - 1])
        assert text[:end].startswith(shown)
        assert len(text[:end][len(shown) :].split()) <= 1
