"""Who is computed when, counted in steps: nothing here looks at a clock."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from pyengine import Llama
from pyengine.errors import UsageError
from pyengine.sessions import PromptTooLongError, Request, SamplingParams, Scheduler, Session, SessionState

from .requests import greedy, prompt
from .tape import Tape

Make = Callable[..., Scheduler]


def finished(scheduler: Scheduler) -> list[Session]:
    return list(scheduler.run())


def completion(llama: Llama, request: Request) -> tuple[str, str]:
    """(text, finish reason) of llama_cpp.Llama's own way."""
    how = request.sampling
    answer = llama.create_completion(
        list(request.tokens),
        max_tokens=how.max_tokens,
        temperature=how.temperature,
        seed=how.seed,
        stop=list(how.stop),
        repeat_penalty=how.repeat_penalty,
    )
    return answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"seed": 7}, {"seed": 7, "repeat_penalty": 1.3}])
def test_a_session_alone_says_what_create_completion_says(tiny: Llama, sampling: dict[str, Any]) -> None:
    request = Request(prompt(150), SamplingParams(max_tokens=20, **sampling))  # a prompt of three batches
    wanted = completion(tiny, request)
    with Scheduler(tiny) as scheduler:
        (session,) = [scheduler.submit(request)]
        assert finished(scheduler) == [session]
    assert (session.text, session.finish_reason) == wanted
    assert len(session.text) > 10 and len(session.tokens) == 20


def test_sampled_texts_differ_by_seed_alone(scheduler: Make) -> None:
    one = scheduler()
    sessions = [one.submit(Request(prompt(9), SamplingParams(max_tokens=20, seed=seed))) for seed in (1, 2, 1)]
    finished(one)
    assert sessions[0].tokens == sessions[2].tokens != sessions[1].tokens


def test_the_routing_log_is_told_whose_tokens_are_computed(
    scheduler: Make, tiny: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tiny.engine is not None
    told: list[list[int]] = []
    monkeypatch.setattr(tiny.engine.routing_log, "expect", told.append)
    one = scheduler(prompt_chunk=16)
    chats = [one.submit(greedy(prompt(5, seed=i), 4)) for i in range(2)]
    one.step()
    one.submit(greedy(prompt(20, seed=9), 1))
    finished(one)
    assert all(chat.finished for chat in chats)
    assert told == [[5, 5], [1, 1, 16], [1, 1, 4], [1, 1]]


def test_a_long_prompt_stops_nobody(scheduler: Make, tiny: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    one = scheduler(prompt_chunk=16)
    chats = [one.submit(greedy(prompt(5, seed=i), 60)) for i in range(3)]
    one.step()
    tape = Tape(tiny, monkeypatch)
    long = one.submit(greedy(prompt(300, seed=9), 5))
    steps = 0
    while not long.tokens:
        before = [len(chat.tokens) for chat in chats]
        gained = one.step()
        steps += 1
        assert [len(chat.tokens) for chat in chats] == [n + 1 for n in before]
        assert set(gained) >= set(chats)
    assert steps == -(-300 // 16)
    assert [len(batch) for batch in tape.batches] == [3 + 16] * 18 + [3 + 12]


def test_a_short_prompt_waits_for_one_chunk_of_a_long_one(scheduler: Make) -> None:
    one = scheduler()
    long, short = one.submit(greedy(prompt(200), 4)), one.submit(greedy(prompt(10, seed=1), 4))
    one.step()
    assert not short.tokens
    one.step()
    assert len(short.tokens) == 1 and not long.tokens


def test_mixed_steps_stay_in_one_micro_batch(scheduler: Make, tiny: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    one = scheduler(prompt_chunk=1000)
    one.submit(greedy(prompt(5), 60))
    one.step()
    tape = Tape(tiny, monkeypatch)
    one.submit(greedy(prompt(200, seed=1), 2))
    finished(one)
    assert max(map(len, tape.batches)) == tiny.context_params.n_ubatch


def test_sessions_begin_in_order_as_sequences_become_free(scheduler: Make) -> None:
    one = scheduler(max_sequences=2)
    sessions = [one.submit(greedy(prompt(5, seed=i), n)) for i, n in enumerate((4, 8, 4, 4))]
    one.step()
    assert [s.state.value for s in sessions] == ["decoding", "decoding", "waiting", "waiting"]
    order = finished(one)
    assert sorted(map(sessions.index, order[:2])) == [0, 1] or order[0] is sessions[0]
    assert [len(s.tokens) for s in sessions] == [4, 8, 4, 4]
    begun = [s.times.first_token for s in sessions]
    assert begun == sorted(begun)


def test_a_session_without_room_waits_until_another_one_ends(scheduler: Make) -> None:
    one = scheduler(max_sequences=2)
    first = one.submit(greedy(prompt(250), 250))
    second = one.submit(greedy(prompt(250, seed=1), 2))
    while not first.finished:
        one.step()
        assert second.state is SessionState.WAITING
    finished(one)
    assert (len(first.tokens), len(second.tokens), first.preemptions, second.preemptions) == (250, 2, 0, 0)


def test_the_youngest_gives_way_when_cells_run_out_and_loses_nothing(scheduler: Make) -> None:
    one = scheduler(max_sequences=4)  # each can count on 128 cells, or 32 more than its prompt
    sessions = [one.submit(greedy(prompt(200, seed=i), 80)) for i in range(2)]
    texts = ["", ""]
    while not one.idle:
        one.step()
        for i, session in enumerate(sessions):
            assert session.text.startswith(texts[i]), "text only grows"
            texts[i] = session.text
    assert [s.preemptions for s in sessions] == [0, 1]
    assert [(len(s.tokens), s.finish_reason) for s in sessions] == [(80, "length")] * 2
    assert one._cells.used == 0


def test_a_text_without_limit_ends_when_the_context_is_full(scheduler: Make) -> None:
    one = scheduler()
    session = one.submit(greedy(prompt(480), None))
    list(one.run())
    assert (len(session.tokens), session.finish_reason) == (32, "length")


def test_a_stop_text_ends_it_and_is_not_told(tiny: Llama) -> None:
    with Scheduler(tiny) as one:
        whole = one.submit(greedy(prompt(20), 30))
        finished(one)
    stop = whole.text[8:13]
    at = whole.text.index(stop)
    request = greedy(prompt(20), 30, stop=(stop, "never said"))
    wanted = completion(tiny, request)
    with Scheduler(tiny) as one:
        session = one.submit(request)
        seen = []
        while not session.finished:
            one.step()
            seen.append(session.text)
    assert (session.text, session.finish_reason) == (whole.text[:at], "stop") == wanted
    assert all(session.text.startswith(text) for text in seen)
    assert len(session.tokens) < 30


def test_the_models_end_token_ends_it(scheduler: Make, tiny: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    one = scheduler()
    whole = one.submit(greedy(prompt(20), 12))
    finished(one)
    end = next(token for i, token in enumerate(whole.tokens) if i > 3 and token not in whole.tokens[:i])
    monkeypatch.setattr("llama_cpp.llama_vocab_is_eog", lambda _, token: token == end)
    session = one.submit(greedy(prompt(20), 12))
    finished(one)
    assert session.finish_reason == "stop"
    assert session.tokens == whole.tokens[: whole.tokens.index(end)]
    session = one.submit(greedy(prompt(20), 12, ignore_eos=True))
    finished(one)
    assert session.tokens == whole.tokens


def test_no_tokens_wanted_means_only_the_prompt(scheduler: Make) -> None:
    one = scheduler()
    session = one.submit(greedy(prompt(70), 0))
    finished(one)
    assert (session.tokens, session.text, session.finish_reason) == ([], "", "length")
    assert session.times.first_token is None and session.times.finished is not None


def test_logprobs_come_with_each_token(scheduler: Make) -> None:
    one = scheduler()
    session = one.submit(greedy(prompt(10), 6, logprobs=3))
    bare = one.submit(greedy(prompt(10), 6, logprobs=0))
    finished(one)
    assert [entry.token for entry in session.logprobs] == session.tokens
    for entry in session.logprobs:
        assert entry.likeliest[0] == (entry.token, entry.logprob), "greedy takes the likeliest"
        values = [logprob for _, logprob in entry.likeliest]
        assert len(values) == 3 and values == sorted(values, reverse=True) and max(values) < 0
    assert [entry.likeliest for entry in bare.logprobs] == [()] * 6


@pytest.mark.parametrize("when", ["waiting", "prefilling", "decoding"])
def test_cancelled_sessions_end_with_the_next_step(scheduler: Make, when: str) -> None:
    one = scheduler(max_sequences=2)
    other = one.submit(greedy(prompt(5, seed=5), 20))
    if when == "waiting":
        one.submit(greedy(prompt(5, seed=6), 20))
    victim = one.submit(greedy(prompt(120, seed=7), 20))
    for _ in range(5 if when == "decoding" else 1):
        one.step()
    assert victim.state.value == when
    have = list(victim.tokens)
    one.cancel(victim)
    assert victim in one.step()
    assert (victim.finish_reason, victim.tokens) == ("cancelled", have)
    finished(one)
    assert len(other.tokens) == 20
    assert one._cells.used == 0
    one.cancel(victim)  # does nothing
    assert one.step() == []


def test_a_prompt_that_can_never_fit_is_refused_at_once(scheduler: Make) -> None:
    one = scheduler()
    with pytest.raises(PromptTooLongError, match="512 tokens, and the context has room for 511"):
        one.submit(greedy(prompt(512)))
    longest = one.submit(greedy(prompt(511)))
    finished(one)
    assert (len(longest.tokens), longest.finish_reason) == (1, "length")


def test_tokens_of_another_vocabulary_are_refused(scheduler: Make, tiny: Llama) -> None:
    one = scheduler()
    for token in (-1, tiny.n_vocab()):
        with pytest.raises(UsageError, match="token ids"):
            one.submit(greedy([1, token]))


def test_many_threads_submit_wait_and_read_while_one_steps(scheduler: Make) -> None:
    one = scheduler(max_sequences=4)
    results: dict[int, tuple[str, str]] = {}

    def client(number: int) -> None:
        session = one.submit(greedy(prompt(10 + number, seed=number), 12))
        assert session.wait(0, timeout=60)
        text = "".join(session.pieces())
        assert session.wait(timeout=60)
        results[number] = text, session.text

    clients = [threading.Thread(target=client, args=(i,)) for i in range(10)]
    for thread in clients:
        thread.start()
    ended = 0
    while ended < len(clients):
        assert one.wait_for_work(timeout=60)
        ended += sum(session.finished for session in one.step())
    for thread in clients:
        thread.join(60)
    assert sorted(results) == list(range(10))
    assert all(text == whole and text for text, whole in results.values())


def test_progress_is_told_once_a_step(scheduler: Make) -> None:
    one, told = scheduler(), []
    session = one.submit(greedy(prompt(5), 4), lambda session: told.append(len(session.tokens)))
    finished(one)
    assert told == [1, 2, 3, 4] and session.finished


def test_closing_ends_what_is_left_and_wakes_who_waits(tiny: Llama) -> None:
    one = Scheduler(tiny)
    sessions = [one.submit(greedy(prompt(5, seed=i), 50)) for i in range(2)]
    one.step()
    waiting = threading.Thread(target=sessions[0].wait)
    waiting.start()
    one.close()
    waiting.join(60)
    assert not waiting.is_alive()
    assert [s.finish_reason for s in sessions] == ["cancelled"] * 2
    one.close()
    with pytest.raises(UsageError, match="closed"):
        one.submit(greedy(prompt(5)))
    assert completion(tiny, greedy(prompt(5), 3))[0], "the model is free again"


def test_one_scheduler_at_a_time(scheduler: Make, tiny: Llama) -> None:
    scheduler()
    with pytest.raises(UsageError, match="another Scheduler"):
        Scheduler(tiny)


@pytest.mark.parametrize("wrong", [{"max_sequences": 0}, {"max_sequences": 9}, {"prompt_chunk": 0}])
def test_options_out_of_range(scheduler: Make, wrong: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        scheduler(**wrong)
    scheduler()  # nothing was left behind


def test_no_other_thread_begins_a_text_between_steps(scheduler: Make, tiny: Llama) -> None:
    one = scheduler()
    session = one.submit(greedy(prompt(5), 6))
    one.step()
    errors = []

    def intrude() -> None:
        try:
            tiny.create_completion("x", max_tokens=2)
        except UsageError as error:
            errors.append(error)

    thread = threading.Thread(target=intrude)
    thread.start()
    thread.join(60)
    assert errors
    finished(one)
    assert len(session.tokens) == 6
