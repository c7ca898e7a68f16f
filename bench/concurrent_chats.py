"""Several chats at once against one alone: tokens per second together, time to the first token, and how even it is.

In each round every chat runs once alone and then all together, with texts that no other run has. Writes one CSV line
per chat and run, and prints medians and ratios with their 95 % bootstrap intervals.

    .venv/bin/python bench/concurrent_chats.py [--model FILE] [--budget 50%] [--chats 4] [--tokens 64]
        [--prompt-tokens 64] [--rounds 5] [--stagger 0] [--prompt-chunk 128]
"""

from __future__ import annotations

import argparse
import contextlib
import random
import statistics
from collections.abc import Iterable
from typing import Any, NamedTuple

from common import PROMPTS, write_csv

from pyengine import Llama
from pyengine.bench.summary import interval
from pyengine.sessions import Request, SamplingParams, Scheduler, Session


class Run(NamedTuple):
    """Some chats, begun together. Seconds, and tokens per second."""

    first_tokens: list[float]
    """of each chat, from its submission"""
    speeds: list[float]
    """of each chat, from its first token to its last"""
    together: float
    """of all chats, from the first one's first token to the last token of all"""
    whole: float
    """of all chats, from the first submission to the last token of all, prompts included"""
    hit_rate: float
    bytes_per_token: float


def text(llm: Llama, n_tokens: int, seed: int) -> list[int]:
    """Token ids of a user's turn, as long as wanted."""
    pick, words = random.Random(seed), ""
    while len(tokens := llm.tokenize(words.encode())) < n_tokens:
        words += f"{pick.choice(PROMPTS)} That was number {pick.randint(1, 999)}. "
    return tokens[:n_tokens]


def measured(llm: Llama, scheduler: Scheduler, prompts: Iterable[list[int]], n_tokens: int, stagger: int) -> Run:
    before = llm.expert_stats()
    how = SamplingParams(max_tokens=n_tokens, temperature=0, ignore_eos=True)
    sessions: list[Session] = []
    for prompt in prompts:
        sessions.append(scheduler.submit(Request(prompt, how)))
        for _ in range(stagger):
            scheduler.step()
    for _ in scheduler.run():
        pass
    for session in sessions:
        if session.error is not None:
            raise session.error
    after = llm.expert_stats()
    begun = [session.times.submitted for session in sessions]
    first = [session.times.first_token or 0.0 for session in sessions]
    ended = [session.times.finished or 0.0 for session in sessions]
    generated = sum(len(session.tokens) for session in sessions)
    hits, misses, read = (after[name] - before[name] for name in ("hits", "misses", "bytes_read"))
    return Run(
        first_tokens=[b - a for a, b in zip(begun, first, strict=True)],
        speeds=[(n_tokens - 1) / (b - a) for a, b in zip(first, ended, strict=True)],
        together=(generated - 1) / (max(ended) - min(first)),
        whole=generated / (max(ended) - min(begun)),
        hit_rate=hits / max(1, hits + misses),
        bytes_per_token=read / generated,
    )


def median_ratio(name: str, ratios: list[float]) -> None:
    low, high = interval(ratios) if len(ratios) > 1 else (ratios[0], ratios[0])
    print(f"{name}: {statistics.median(ratios):.2f} (95 %: {low:.2f} .. {high:.2f}, {len(ratios)} rounds)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None)
    parser.add_argument("--budget", default="50%")
    parser.add_argument("--chats", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64, help="of each answer; the model's end token is ignored")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--prompt-chunk", type=int, default=None, help="of prompts in a step in which somebody decodes")
    parser.add_argument("--stagger", type=int, default=0, help="steps between two chats' beginnings")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="0: all cores this process may use")
    parser.add_argument("--policy", default="auto")
    parser.add_argument("--look-ahead", default="auto")
    parser.add_argument("--csv", default="concurrent_chats.csv", help="in bench/results")
    arguments = parser.parse_args()
    if arguments.tokens < 2 or arguments.chats < 1:
        parser.error("at least one chat and two tokens")
    options: dict[str, Any] = {
        "ram_budget": arguments.budget,
        "policy": arguments.policy,
        "look_ahead": arguments.look_ahead,
        "n_threads": arguments.threads,
        "n_threads_batch": arguments.threads,
        "n_sequences": arguments.chats,
        "n_ctx": arguments.chats * (arguments.prompt_tokens + arguments.tokens),
    }
    rows: list[tuple[Any, ...]] = []
    rounds: list[tuple[list[Run], Run]] = []
    with contextlib.closing(Llama(arguments.model, **options)) as llm:
        print(llm.engaged, flush=True)
        with Scheduler(llm, prompt_chunk=arguments.prompt_chunk) as scheduler:

            def run(seeds: Iterable[int]) -> Run:
                prompts = [text(llm, arguments.prompt_tokens, seed) for seed in seeds]
                return measured(llm, scheduler, prompts, arguments.tokens, arguments.stagger)

            run(range(arguments.chats))  # slots fill, guesses are tried
            for number in range(arguments.rounds):
                seeds = [(2 * number + 2) * arguments.chats + i for i in range(arguments.chats)]
                alone = [run([seed]) for seed in seeds]
                all_at_once = run(seed + arguments.chats for seed in seeds)
                rounds.append((alone, all_at_once))
                for kind, runs in (("alone", alone), ("together", [all_at_once])):
                    chats = ((one, i) for one in runs for i in range(len(one.speeds)))
                    for chat, (one, i) in enumerate(chats):
                        figures = (one.first_tokens[i], one.speeds[i], one.together, one.whole, one.hit_rate)
                        rows.append((number, kind, chat, *(f"{x:.4f}" for x in figures), f"{one.bytes_per_token:.0f}"))
                print(
                    f"round {number}: alone {statistics.median(one.speeds[0] for one in alone):.2f} tok/s, "
                    f"{arguments.chats} together {all_at_once.together:.2f} tok/s",
                    flush=True,
                )
        names = "first_token_seconds tokens_per_second together whole hit_rate bytes_per_token"
        settings = [f"{name}={value}" for name, value in sorted(vars(arguments).items())]
        write_csv(arguments.csv, ("round", "run", "chat", *names.split(), *settings), rows)
    one_speed = [statistics.median(one.speeds[0] for one in alone) for alone, _ in rounds]
    one_first = [statistics.median(one.first_tokens[0] for one in alone) for alone, _ in rounds]
    one_whole = [statistics.median(one.whole for one in alone) for alone, _ in rounds]
    together = [both for _, both in rounds]
    median_ratio("tokens/s of all / of one alone", [b.together / a for a, b in zip(one_speed, together, strict=True)])
    median_ratio("with prompts", [b.whole / a for a, b in zip(one_whole, together, strict=True)])
    median_ratio(
        "slowest first token / alone", [max(b.first_tokens) / a for a, b in zip(one_first, together, strict=True)]
    )
    median_ratio("fastest chat / slowest", [max(b.speeds) / min(b.speeds) for b in together])


if __name__ == "__main__":
    main()
