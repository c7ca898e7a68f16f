"""The phases of a sample over a model that only counts."""

from __future__ import annotations

import pytest

from pyengine.bench.measuring import Texts, measure
from pyengine.bench.texts import long_text, short_prompts, stretch


class CountingModel:
    """The token after n computed ones is n; every token costs one miss."""

    def __init__(self):
        self.begun = []
        self.computed = []
        self.misses = 0.0

    def begin(self, text, tokens):
        self.begun.append((text, tokens))
        self.computed = []

    def eval(self, tokens):
        self.computed += tokens
        self.misses += len(tokens)

    def likeliest(self):
        return len(self.computed)

    def counters(self):
        return {"misses": self.misses, "cpu_s": 2 * self.misses}


TEXTS = Texts(prompts=[[7] * 3, [8] * 4, [9] * 5], prefill=[6] * 20)


def run(n_tokens=6, limit_s=60.0, texts=TEXTS):
    model, said = CountingModel(), []
    return measure(model, texts, n_tokens, limit_s, said.append), model, said


def test_phases_count_their_own_tokens_only():
    result, _, said = run()
    phases = result["phases"]
    assert said == ["prompt", "decode_cold", "prefill", "decode"]
    assert {name: phase["tokens"] for name, phase in phases.items()} == {
        "prompt": 3,
        "decode_cold": 5,
        "prefill": 20,
        "decode": 10,
    }
    for phase in phases.values():
        assert phase["counts"] == {"misses": phase["tokens"], "cpu_s": 2 * phase["tokens"]}
        assert phase["seconds"] > 0
    assert len(phases["decode"]["step_seconds"]) == 10


def test_tokens_are_greedy_and_one_list_per_prompt():
    result, _, _ = run()
    assert result["tokens"] == [[3, 4, 5, 6, 7, 8], [4, 5, 6, 7, 8, 9], [5, 6, 7, 8, 9, 10]]


def test_each_text_is_begun_with_its_number_and_length():
    _, model, _ = run()
    assert model.begun == [(0, 9), (3, 20), (1, 10), (2, 11)]


def test_the_only_prompt_is_decoded_twice():
    result, model, _ = run(texts=Texts([[7] * 3], [6] * 20))
    assert result["tokens"] == [[3, 4, 5, 6, 7, 8]] * 2
    assert [number for number, _ in model.begun] == [0, 1, 0]


def test_the_time_limit_ends_an_answer_but_not_the_sample():
    result, _, _ = run(limit_s=0.0)
    assert result["tokens"] == [[3], [4], [5]]
    assert result["phases"]["decode"]["tokens"] == 0
    assert result["phases"]["prefill"]["tokens"] == 20


def test_texts_are_there_and_long_enough():
    prompts = short_prompts()
    assert len(prompts) == 4
    assert all(60 < len(text) < 250 for text in prompts)
    assert "\n    " in prompts[3]  # code, on two lines
    assert len(long_text().split()) > 900


def test_a_text_begins_again_when_it_is_too_short():
    assert stretch([1, 2, 3], 7) == [1, 2, 3, 1, 2, 3, 1]
    with pytest.raises(ValueError, match="no text"):
        stretch([], 1)
