"""Text comes as early as it is sure, and never has to be taken back."""

from __future__ import annotations

import random

import pytest

from pyengine.sessions.text import TextStream


def told(pieces: list[bytes], stop: tuple[str, ...] = ()) -> tuple[list[str], str, bool]:
    stream = TextStream(stop)
    sure = []
    for piece in pieces:
        sure.append(stream.add(piece))
        if stream.stopped:
            break
    return sure, stream.end(), stream.stopped


def test_characters_that_tokens_split_come_whole() -> None:
    text = "naïve 🦙 日本"
    sure, rest, _ = told([bytes([byte]) for byte in text.encode()])
    assert "".join(sure) + rest == text
    assert [piece for piece in sure if piece] == list(text)


def test_half_a_character_at_the_end_is_dropped() -> None:
    assert told(["é".encode()[:1]]) == ([""], "", False)


def test_what_may_begin_a_stop_text_waits() -> None:
    assert told([b"a<", b"|", b"x"], ("<|end|>",)) == (["a", "", "<|x"], "", False)
    assert told([b"a<", b"|en"], ("<|end|>",)) == (["a", ""], "<|en", False)
    assert told([b"a<", b"|end", b"|>b"], ("<|end|>",)) == (["a", "", ""], "", True)


def test_the_earliest_stop_text_ends_it() -> None:
    assert told([b"one two three"], ("three", "two")) == (["one "], "", True)
    assert told([b"aab"], ("ab", "aab")) == ([""], "", True)


@pytest.mark.parametrize("seed", range(20))
def test_any_division_into_pieces_gives_the_same_text(seed: int) -> None:
    pick = random.Random(seed)
    text = "".join(pick.choice("abé🦙") for _ in range(60))
    stop = tuple("".join(pick.choice("abé") for _ in range(pick.randint(2, 5))) for _ in range(2))
    raw, pieces = text.encode(), []
    while raw:
        n = pick.randint(1, 7)
        pieces.append(raw[:n])
        raw = raw[n:]
    sure, rest, stopped = told(pieces, stop)
    ends = [at for at in map(text.find, stop) if at >= 0]
    assert stopped == bool(ends)
    assert "".join(sure) + rest == text[: min(ends, default=len(text))]
