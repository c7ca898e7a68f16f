"""Turns, room in the context, figures of an answer."""

from __future__ import annotations

import pytest
from fake_engine import FakeLlama

from pyengine.cli.conversation import Conversation
from pyengine.cli.interrupt import StopRequest
from pyengine.cli.options import Sampling

SAMPLING = Sampling(
    temp=0.8,
    top_k=40,
    top_p=0.95,
    min_p=0.05,
    typical=1.0,
    repeat_penalty=1.0,
    presence_penalty=0.0,
    frequency_penalty=0.0,
    mirostat=0,
    mirostat_lr=0.1,
    mirostat_ent=5.0,
    seed=11,
)


def say(conversation, llm, text):
    with StopRequest(llm) as stop:
        answer = conversation.ask(text, stop)
        assert "".join(answer) == answer.text
    conversation.record(text, answer)
    return answer


def test_every_turn_is_in_the_next_prompt():
    llm = FakeLlama(n_ctx=1000)
    conversation = Conversation(llm, SAMPLING, system="be kind")
    say(conversation, llm, "one")
    say(conversation, llm, "two")
    assert llm.chats[1]["messages"] == [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "You said: one"},
        {"role": "user", "content": "two"},
    ]
    assert [chat["seed"] for chat in llm.chats] == [11, 12]


def test_figures_count_this_answer_alone():
    llm = FakeLlama(n_ctx=1000, ram_budget="50%")
    llm.token_delay_s = 0.02
    conversation = Conversation(llm, SAMPLING)
    say(conversation, llm, "one two three")
    figures = say(conversation, llm, "four").figures
    assert figures.tokens == 3  # You said: four
    prompt_tokens = 4 + 6 + 2  # each with the token of its role
    assert figures.context_used == prompt_tokens + 3
    assert figures.hits == 180 * (prompt_tokens + 3)
    assert figures.misses == 60 * (prompt_tokens + 3)
    assert 10 < figures.tokens_per_s < 50
    assert figures.first_token_s >= 0


def test_an_answer_cut_by_the_limit_counts_the_token_that_was_not_evaluated():
    llm = FakeLlama(n_ctx=1000)
    answer = say(Conversation(llm, SAMPLING, max_tokens=2), llm, "x")
    assert (answer.text, answer.finish_reason, answer.figures.tokens) == ("You said:", "length", 2)


def test_an_empty_answer_is_a_turn_without_speed():
    llm = FakeLlama(n_ctx=100)
    llm.answers = ("",)
    conversation = Conversation(llm, SAMPLING)
    figures = say(conversation, llm, "x").figures
    assert (figures.tokens, figures.tokens_per_s, figures.first_token_s) == (0, None, None)
    assert len(conversation.turns) == 1


def test_oldest_turns_make_room_before_the_context_is_full():
    llm = FakeLlama(n_ctx=120)
    conversation = Conversation(llm, SAMPLING, system="sys")
    dropped = []
    for number in range(12):
        say(conversation, llm, f"message number {number}")
        dropped.append(conversation.dropped)
    assert sum(dropped) == 12 - len(conversation.turns)
    assert dropped[0] == 0
    assert max(dropped) > 1  # several at once: the prompt's beginning does not change at every turn
    assert dropped.count(0) > len(dropped) / 2
    last = llm.chats[-1]["messages"]
    assert last[0] == {"role": "system", "content": "sys"}
    assert last[-1]["content"] == "message number 11"
    assert last[-3]["content"] == "message number 10"


def test_a_wrong_estimate_is_corrected_by_dropping_again():
    llm = FakeLlama(n_ctx=36)
    conversation = Conversation(llm, SAMPLING)
    conversation._estimate = lambda text: 0  # a template that adds far more than foreseen
    say(conversation, llm, "a " * 10)
    say(conversation, llm, "b " * 10)
    assert conversation.dropped == 1
    assert [turn.user[0] for turn in conversation.turns] == ["b"]


def test_a_message_that_can_never_fit_is_refused_and_forgotten():
    llm = FakeLlama(n_ctx=20)
    conversation = Conversation(llm, SAMPLING)
    say(conversation, llm, "short")
    with pytest.raises(ValueError, match="does not fit the context of 20 tokens"):
        say(conversation, llm, "word " * 30)
    say(conversation, llm, "short again")
    assert [turn.user for turn in conversation.turns] == ["short again"]


def test_other_value_errors_are_not_taken_for_a_full_context(monkeypatch):
    llm = FakeLlama(n_ctx=100)
    conversation = Conversation(llm, SAMPLING)
    say(conversation, llm, "one")

    def refuse(*_, **__):
        raise ValueError("Conversation roles must alternate")

    monkeypatch.setattr(llm, "create_chat_completion", refuse)
    with pytest.raises(ValueError, match="roles must alternate"):
        say(conversation, llm, "two")
    assert len(conversation.turns) == 1


def test_a_stopped_answer_stays_as_far_as_it_came():
    llm = FakeLlama(n_ctx=100)
    conversation = Conversation(llm, SAMPLING)
    with StopRequest(llm) as stop:
        answer = conversation.ask("hello", stop)
        for piece in answer:
            stop.requested = True
            assert piece == "You"
    conversation.record("hello", answer)
    assert answer.stopped
    assert answer.figures.tokens == 1
    assert conversation.messages()[-1] == {"role": "assistant", "content": "You"}


def test_an_answer_stopped_in_the_prompt_leaves_no_turn():
    llm = FakeLlama(n_ctx=100)
    conversation = Conversation(llm, SAMPLING)
    with StopRequest(llm) as stop:
        stop.requested = True
        llm.fail_at_token = 1  # how an aborted computation shows itself: a RuntimeError
        answer = conversation.ask("hello", stop)
        assert list(answer) == []
    conversation.record("hello", answer)
    assert answer.stopped
    assert conversation.turns == []
