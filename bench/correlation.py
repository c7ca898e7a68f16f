"""Does Klotski's correlation table foresee experts of a step of several tokens better than the next router's votes do?

Texts are recorded token by token with gate inputs and expert ids; half of them is learned from, and from the others
steps are put together: one token each of several texts, as a batch decodes them, and chunks of prompts. For every layer
each way names the experts in the order in which it expects them to be needed, before the layer's router speaks.

Columns: named_K, of the experts that the step needs and that find no slot (default cache policy, 25 % of the experts in
slots, nothing fetched ahead) the share among the K absent ones named first; right_K, of these K the share that is
needed; hot_K, of the tokens that the K busiest experts serve, those that the K named first serve; possible_K, what
named_K would be for who knew.

Ways: votes, the 12 highest of eight tokens have a vote each; ranks, the first of each has 12 votes, the last one; of 32
tokens ranks-32; gates, the next router's probabilities summed over all tokens, gates-8 over eight; the same with the
linear form that `pyengine learn-predictor` fits (learned); table, Klotski's; witnesses, the same counts as independent
witnesses; + , margins summed with the best weight; popularity of the texts learned from; recent, the cache policy's
priorities. The first layer has no gate before it: table is from the last layer in the step before, token from the token
ids.

    .venv/bin/python bench/correlation.py [--model FILE] [--trace inputs.npz] [--passages 24] [--answers 40]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import numpy.typing as npt
from common import write_csv
from first_layers import token_ways
from foreseeing import Sources, both, learned_router, next_router, probable, table
from group_steps import Steps, of_chunks, of_texts, pairs_of, residents, spans
from recorded_texts import ANSWER, PASSAGE, record

from pyengine.bundled import bundled_model
from pyengine.traces import Trace, load_trace

Floats = npt.NDArray[np.float32]
Counts = npt.NDArray[np.int64]

BUDGET = 0.25
TEXTS, CHUNKS = (1, 4, 8, 16, 32), (16, 64, 512)
MOST = 12
#: What the engine does about several tokens: native/src/prefetcher.cpp, pyengine/advice/foresight.py.
ASKED, BEYOND = 8, 4
#: Steps of a group, and the first ones of a kind, in which slots fill.
LENGTH, WARM_UP = 100, 5


@dataclass(frozen=True, eq=False)
class Stage:
    """Steps, and what is needed and lies in slots there."""

    steps: Steps
    pairs: npt.NDArray[np.int64]
    resident: npt.NDArray[np.bool_]
    recent: Floats


def stages(trace: Trace, texts: list[tuple[int, int]]) -> Iterator[Stage]:
    passages = [text for text in texts if text[1] == PASSAGE]
    kinds = [of_texts(texts, size, LENGTH) for size in TEXTS] + [of_chunks(passages, size) for size in CHUNKS]
    slots = int(BUDGET * trace.model.n_layer * trace.model.n_expert)
    for steps in kinds:
        pairs = pairs_of(trace, steps)
        resident, recent = residents(pairs, steps, trace.model.n_expert_used, slots)
        yield Stage(steps, pairs, resident, recent)


def asked(steps: Steps, most: int) -> Counts:
    """The tokens that a predictor looks at: `most` of each step, spread evenly."""
    n = min(steps.size, most)
    return steps.tokens[:, [i * steps.size // n for i in range(n)]]


def votes(scores: Floats, tokens: Counts, named: int, by_rank: bool) -> Floats:
    """float32 [n_step, n_expert]: each token's highest `named` have a vote each as Prefetcher::votes counts them, or by
    their ranks as many as come after them; -inf for those that nobody names."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, :named]
    rank = np.full(scores.shape, 1 << 20)
    np.put_along_axis(rank, order, np.arange(named)[None], axis=1)
    mine = rank[tokens]  # [n_step, n_asked, n_expert]
    n = (np.maximum(named - mine, 0) if by_rank else mine < named).sum(axis=1)
    first = (mine + named * np.arange(tokens.shape[1])[None, :, None]).min(axis=1)
    return np.where(n > 0, n - first / 1e4, -np.inf).astype(np.float32)


def summed(probability: Floats, tokens: npt.NDArray[np.int64]) -> Floats:
    return np.asarray(probability[tokens].sum(axis=1), np.float32)


@dataclass(frozen=True, eq=False)
class Tally:
    """Of one way at one kind of step; int64 [MOST] each, by number of experts named."""

    named: Counts
    right: Counts
    served: Counts
    hottest: Counts
    possible: Counts
    needed: int

    @staticmethod
    def of(scores: Floats, stage: Stage, layer: int) -> Tally:
        """Of float32 [n_step, n_expert]: the higher, the earlier named; -inf: never."""
        scores, pairs = scores[WARM_UP:], stage.pairs[WARM_UP:, layer]
        absent = ~stage.resident[WARM_UP:, layer]
        order = np.argsort(-np.where(absent, scores, -np.inf), axis=1, kind="stable")[:, :MOST]
        real = np.take_along_axis(absent & np.isfinite(scores), order, axis=1)
        right = real & (np.take_along_axis(pairs, order, axis=1) > 0)
        needed = (absent & (pairs > 0)).sum(axis=1)
        by_score = np.argsort(-scores, axis=1, kind="stable")[:, :MOST]
        told = np.isfinite(np.take_along_axis(scores, by_score, axis=1))
        return Tally(
            named=real.cumsum(axis=1).sum(axis=0),
            right=right.cumsum(axis=1).sum(axis=0),
            served=(np.take_along_axis(pairs, by_score, axis=1) * told).cumsum(axis=1).sum(axis=0),
            hottest=-np.sort(-pairs, axis=1)[:, :MOST].cumsum(axis=1).sum(axis=0),
            possible=np.minimum(needed[:, None], np.arange(1, MOST + 1)).sum(axis=0),
            needed=int(needed.sum()),
        )

    def __add__(self, other: Tally) -> Tally:
        return Tally(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def rows(self, *begin: object) -> Iterator[list[object]]:
        for k in range(MOST):
            shares = (
                self.right[k] / max(1, self.needed),
                self.right[k] / max(1, self.named[k]),
                self.served[k] / max(1, self.hottest[k]),
                self.possible[k] / max(1, self.needed),
            )
            yield [*begin, k + 1, *(f"{share:.4f}" for share in shares), self.needed]


def ways(of: Sources, target: int, distance: int) -> dict[str, Floats]:
    """Scores of every token; of votes and of the table they are no probabilities."""
    router, learned = next_router(of, target, distance), learned_router(of, target, distance)
    klotski, witnesses = table(of.used(target - distance), of.used(target), of.fit)
    found = {"votes": router, "learned-votes": learned, "table": klotski}
    margins = {
        "gates": router,
        "learned": learned,
        "witnesses": witnesses,
        "gates+table": both(of, router, klotski, target),
        "gates+witnesses": both(of, router, witnesses, target),
        "learned+witnesses": both(of, learned, witnesses, target),
    }
    return found | {name: probable(of, scores, target) for name, scores in margins.items()}


def step_scores(found: dict[str, Floats], stage: Stage, n_used: int) -> Iterator[tuple[str, Floats]]:
    steps, named = stage.steps, n_used + BEYOND
    few = asked(steps, ASKED)
    for way, scores in found.items():
        if way.endswith("votes"):
            yield way, votes(scores, few, named, by_rank=False)
            yield way.replace("votes", "ranks"), votes(scores, few, named, by_rank=True)
        else:
            yield way, summed(scores, steps.tokens)
    yield "ranks-32", votes(found["votes"], asked(steps, 32), named, by_rank=True)
    yield "gates-8", summed(found["gates"], few)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=bundled_model())
    parser.add_argument("--trace", type=Path, default=Path("inputs.npz"), help="recorded if there is no such file")
    parser.add_argument("--passages", type=int, default=24)
    parser.add_argument("--answers", type=int, default=40)
    options = parser.parse_args()
    if options.trace.exists():
        trace = load_trace(options.trace)
    else:
        trace = record(options.model, options.passages, options.answers, options.trace)
    texts = [text for text in spans(trace) if text[1] >= ANSWER]
    mine, held = texts[::2], texts[1::2]
    tokens = [np.concatenate([a + np.arange(n) for a, n in part]) for part in (mine, mine[::4])]
    of = Sources.of(trace, np.setdiff1d(tokens[0], tokens[1]), tokens[1], options.model)
    all_stages = list(stages(trace, held))
    tallies: dict[tuple[str, int, int, str, int], Tally] = {}
    for distance in (0, 1, 2):
        for target in range(distance, trace.model.n_layer) if distance else (0,):
            found = ways(of, target, distance) if distance else {}
            popular = of.used(target)[of.fit].sum(axis=0).astype(np.float32)
            for stage in all_stages:
                if distance:
                    named = dict(step_scores(found, stage, trace.model.n_expert_used))
                else:
                    named = dict(token_ways(of, stage.steps))
                named["popularity"] = np.broadcast_to(popular, stage.recent[:, target].shape)
                named["recent"] = stage.recent[:, target]
                for way, scores in named.items():
                    key = (stage.steps.kind, stage.steps.size, distance, way, target)
                    tallies[key] = Tally.of(scores, stage, target)
            print(f"distance {distance}, layer {target}", flush=True)
    write(tallies)


def write(tallies: dict[tuple[str, int, int, str, int], Tally]) -> None:
    """By kind of step; and by layer for a text alone and four of them, eight named."""
    figures = ("named", "named_share", "right_share", "hot_share", "possible_share", "needed")
    sums: dict[tuple[str, int, int, str], Tally] = {}
    for (*key, _), tally in tallies.items():
        kind = (key[0], key[1], key[2], key[3])
        sums[kind] = sums[kind] + tally if kind in sums else tally
    rows = [row for kind, tally in sums.items() for row in tally.rows(*kind)]
    write_csv("correlation.csv", ("kind", "size", "distance", "way", *figures), rows)
    few = {key: tally for key, tally in tallies.items() if key[0] == "texts" and key[1] in (1, 4)}
    by_layer = [row for key, tally in few.items() for row in tally.rows(*key) if row[5] == 8]
    write_csv("correlation_layers.csv", ("kind", "size", "distance", "way", "layer", *figures), by_layer)


if __name__ == "__main__":
    main()
