"""The replay of a trace gives the hits and misses of the engine; what profiles say follows from them."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from pyengine import Llama, bundled_model
from pyengine.planning.routing import Routing, replay, routing_of_trace
from pyengine.traces import Prompts, Trace, TracedModel
from pyengine.traces.recorder import TraceRecorder

HIT, MISS = 0, 1
TEXT = (
    "The lighthouse stood on a rock far out in the sea. Every evening its keeper climbed the stairs, lit the lamp and "
    "wrote the weather into a book: wind, clouds, ships that passed. def fibonacci(n): return n if n < 2 else"
)


class Recorded:
    """A run of the bundled model at one budget: misses of every step as the engine counted them, and its trace."""

    def __init__(self, share: str) -> None:
        llm = Llama(ram_budget=share, policy="lru", look_ahead="off", n_ctx=256, n_threads=1, n_threads_batch=1)
        assert llm.engine is not None
        native = llm.engine.native
        tokens = llm.tokenize(TEXT.encode())
        recorder = TraceRecorder(llm.engine.routing_log, llm.engine.info, bundled_model())
        events = native.events

        def kept(capacity: int = 1 << 16) -> NDArray[np.void]:
            taken = events(capacity)
            self.events.append(taken)
            return taken

        self.events: list[NDArray[np.void]] = []
        native.events = kept  # type: ignore[method-assign]
        try:
            llm.eval(tokens[:20])
            for token in tokens[20:]:
                llm.eval([token])
            self.slots = llm.expert_stats()["slots"]
        finally:
            llm.close()
        self.trace = recorder.trace()
        self.n_decoded = len(tokens) - 20

    def decoded_misses(self) -> list[int]:
        """Per expert FFN of the tokens decoded one at a time."""
        events = np.concatenate(self.events)
        n_layer = self.trace.model.n_layer
        first = int(events["step"].min()) + n_layer  # the prompt comes before
        misses = events[(events["kind"] == MISS) & (events["step"] >= first)]
        return np.bincount(misses["step"] - first, minlength=n_layer * self.n_decoded).tolist()

    def resident_before(self) -> list[int]:
        """What lay in the slots when decoding began, longest unused first: hits of a prompt's layer are touched before
        its misses are loaded, those with most pairs first."""
        used: dict[int, None] = {}
        events = np.concatenate(self.events)
        first = int(events["step"].min()) + self.trace.model.n_layer
        events = events[events["step"] < first]
        for step in np.unique(events["step"]):
            of_step = events[events["step"] == step]
            wanted = [tuple(int(e[name]) for name in ("kind", "tokens", "layer", "expert")) for e in of_step]
            for _, _, layer, expert in sorted(
                (w for w in wanted if w[0] in (HIT, MISS)), key=lambda w: (w[0], -w[1] if w[0] == MISS else 0, w[3])
            ):
                key = layer * self.trace.model.n_expert + expert
                used.pop(key, None)
                used[key] = None
            for kind, _, layer, expert in wanted:
                if kind not in (HIT, MISS):
                    del used[layer * self.trace.model.n_expert + expert]
        return list(used)


@pytest.fixture(scope="module", params=["25%", "40%", "75%", "100%"])
def recorded(request: pytest.FixtureRequest) -> Recorded:
    return Recorded(request.param)


def test_the_replay_misses_what_the_engine_missed_step_by_step(recorded: Recorded) -> None:
    routing = routing_of_trace(recorded.trace)
    assert routing is not None and len(routing.ids) == recorded.n_decoded
    layers = range(recorded.trace.model.n_layer)
    steps = list(routing._steps(list(layers)))[len(layers) :]  # after the prompt
    assert list(replay(steps, recorded.slots, recorded.resident_before())) == recorded.decoded_misses()
    assert sum(recorded.decoded_misses()) > 0


def test_the_trace_has_the_prompt(recorded: Recorded) -> None:
    trace = recorded.trace
    assert trace.prompts.tokens.tolist() == [20] and trace.prompts.at.tolist() == [0]
    assert trace.starts.tolist() == [0]
    events = np.concatenate(recorded.events)
    of_prompt = events[(events["kind"] < 2) & (events["step"] < events["step"].min() + trace.model.n_layer)]
    assert np.bincount(of_prompt["layer"]).tolist() == trace.prompts.counts(trace.model.n_layer)[0].tolist()
    for layer in (0, 7):
        experts, pairs = trace.prompts.of(0, layer, trace.model.n_layer)
        seen = {int(e["expert"]): int(e["tokens"]) for e in of_prompt[of_prompt["layer"] == layer]}
        assert dict(zip(experts.tolist(), pairs.tolist(), strict=True)) == seen and int(pairs.sum()) == 8 * 20


def test_a_trace_too_short_says_nothing() -> None:
    model = TracedModel("", "", 2, 8, 2)
    assert routing_of_trace(Trace(model, np.zeros((7, 2, 2), np.uint16))) is None


def prompts(recorded: list[tuple[int, int, tuple[int, ...]]]) -> Prompts:
    """Of (decoded tokens before it, tokens, distinct experts of each layer); an expert chosen by 9 tokens each."""
    counts = [n for _, _, layers in recorded for n in layers]
    return Prompts(
        at=np.array([at for at, _, _ in recorded]),
        tokens=np.array([tokens for _, tokens, _ in recorded]),
        offsets=np.cumsum([0, *counts]),
        experts=np.concatenate([np.arange(n) for n in counts]).astype(np.uint16),
        pairs=np.full(sum(counts), 9, np.uint16),
    )


def test_a_recorded_prompt_says_how_many_experts_prompts_use() -> None:
    model = TracedModel("", "", 2, 64, 2)
    ids = np.tile(np.array([[0, 1], [2, 3]], np.uint16), (40, 1, 1))  # the same two experts for ever
    silent = routing_of_trace(Trace(model, ids))
    told = routing_of_trace(Trace(model, ids, prompts=prompts([(0, 256, (50, 40))])))
    assert silent is not None and told is not None

    def wanted(routing: Routing, n: int) -> list[float]:
        return routing.prefill(n, [range(2)], [128], cold=True).wanted.tolist()

    assert wanted(silent, 256) == [2, 2]
    assert wanted(told, 256) == wanted(told, 300) == [50, 40]
    assert wanted(told, 4) == [2, 2], "nothing is known of so short a prompt"


def test_replay_of_a_step_larger_than_the_slots() -> None:
    """Hits are touched first, then members push members out: nothing else is there."""
    assert list(replay([[0, 1, 2], [0, 1, 2], [2]], slots=2)) == [3, 1, 0]


def test_the_same_ids_again_miss_nothing() -> None:
    steps = [[0, 1], [10, 11]]
    assert list(replay(steps * 3, slots=4)) == [2, 2, 0, 0, 0, 0]
    assert list(replay(steps * 3, slots=3)) == [2, 2, 1, 1, 1, 1]
    assert list(replay(steps * 3, slots=2)) == [2] * 6


def test_a_prompt_before_an_answer_takes_slots() -> None:
    """Every answer uses the same two experts; the prompt before it pushes them out."""
    model = TracedModel("", "", 1, 64, 2)
    ids = np.full((80, 1, 2), [[60, 61]], np.uint16)
    without = routing_of_trace(Trace(model, ids))
    with_prompts = routing_of_trace(Trace(model, ids, prompts=prompts([(at, 40, (48,)) for at in range(0, 80, 10)])))
    assert without is not None and with_prompts is not None
    assert without.decode([range(1)], [8]).hit_rate == 1
    assert with_prompts.decode([range(1)], [8]).per_layer[0] == pytest.approx(2 / 10)
    assert with_prompts.decode([range(1)], [64]).hit_rate == 1, "with room for everything a prompt takes nothing"
