"""Experts in VRAM, RAM and disk against stock llama.cpp and against the papers' systems on a GPU, at equal VRAM.

    .venv/bin/python bench/gpu_tiers.py MODEL --rows stock auto:50 ncmoe:50 auto:25 [--prompts 512:4] [--csv CSV]

Needs llama-cpp-python built for the GPU. Rows are those of gpu_rows.py. Rows of one share, and those without any, are
loaded together, a process each, and take turns: every round each decodes the same stretch of tokens, the first ones of
the last round last; then prompts. With --trace the experts that our rows use come from it (random weights route at
random). --links are speeds from RAM to VRAM in GB/s, 0 the machine's own, which stock plays alone. R is the time to
move one expert over the time of a layer of `stock`.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import gpu_device
import gpu_rows
from gpu_figures import add_r, line, say, summarise, write
from gpu_players import GoneError, Player, start

from pyengine.bench.model_facts import read_facts


class Match:
    """Players of one share, and what they have shown so far."""

    def __init__(
        self, name: str, players: list[Player], given: argparse.Namespace, speed: float, turns: list[dict[str, Any]]
    ) -> None:
        self._name, self._players, self._given, self._speed, self._turns = name, players, given, speed, turns

    def play(self) -> None:
        given = self._given
        for player in list(self._players):
            tokens = 8 if player.row.stock else given.warm_tokens
            warmth = {"chunks": given.warm_chunks, "tokens": tokens, "at": 0, "seconds": given.warm_seconds}
            self._ask(player, "warm", given.limit, link=0, **warmth)
        at = given.warm_tokens
        for link in given.links:
            # The first one is for what adapts to the link.
            for number in range(-1, given.rounds) if given.rounds else ():
                for player in self._in_order(number, link):
                    asked = {"at": at, "tokens": given.tokens, "seconds": given.seconds}
                    self._turn(player, "decode", number, link, 0, asked)
                at += given.tokens
            for length, rounds in given.prompts:
                for number in range(-1, rounds):
                    # The first one makes graphs and takes memory.
                    n = length if number >= 0 else min(length, 2 * given.ubatch)
                    for player in self._in_order(number, link):
                        self._turn(player, "prefill", number, link, length, {"at": at, "tokens": n})
                    at += n

    def _in_order(self, number: int, link: int) -> list[Player]:
        playing = [player for player in self._players if link == 0 or not player.row.stock]
        return playing[::-1] if number % 2 else playing

    def _turn(self, player: Player, do: str, number: int, link: int, prompt: int, asked: dict[str, Any]) -> None:
        answer = self._ask(player, do, self._given.limit, link=link, **asked)
        if answer is None or number < 0:
            return
        given, speed = self._given, link or self._speed
        turn = line(
            answer,
            speed,
            model=Path(given.model).name,
            row=str(player.row),
            kind=player.row.kind,
            share=player.row.share,
            match=self._name,
            round=number,
            what=do,
            prompt_tokens=prompt,
            link=link,
            expert_mb=player.facts.get("expert_mb"),
            recall=given.recall,
            distance=given.distance if given.recall is not None else None,
            ram=given.ram,
            ubatch=given.ubatch,
        )
        self._turns.append(turn)
        say(turn)

    def _ask(self, player: Player, do: str, limit: float, **asked: Any) -> dict[str, Any] | None:
        try:
            answer = player.ask(do, limit, **asked)
        except GoneError as error:
            print(f"{player.row}: {error}", flush=True)
            self._players.remove(player)
            return None
        for warning in answer["warnings"]:
            print(f"{player.row}: {warning}", flush=True)
        if "error" in answer:
            print(f"{player.row}: {do}: {answer['error']}", flush=True)
            return None
        return answer


def _prompt(text: str) -> tuple[int, int]:
    length, _, rounds = text.partition(":")
    return int(length), int(rounds or 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rows", nargs="+", required=True)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48, help="decoded in a turn")
    parser.add_argument("--seconds", type=float, default=2.0, help="after which a turn's decoding ends anyway")
    parser.add_argument("--prompts", nargs="*", type=_prompt, default=[], metavar="LENGTH:ROUNDS")
    parser.add_argument("--links", nargs="+", type=float, default=[0.0])
    parser.add_argument("--warm-chunks", type=int, default=2)
    parser.add_argument("--warm-tokens", type=int, default=256)
    parser.add_argument("--warm-seconds", type=float, default=6.0)
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for one answer; who takes longer is out")
    parser.add_argument("--gpu", default="CUDA0", help="or several, with commas; stock takes all there are")
    parser.add_argument("--ram", default="100%")
    parser.add_argument("--threads", type=int, default=16)
    parser.add_argument("--ubatch", type=int, default=512)
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--recall", type=float, help="of a simulated predictor, with --trace")
    parser.add_argument("--distance", type=int, default=3, help="so many layers ahead it looks")
    parser.add_argument("--csv", type=Path)
    given = parser.parse_args()
    try:
        rows = [gpu_rows.parse(text) for text in given.rows]
    except ValueError as error:
        parser.error(str(error))
    given.links = [int(link * 1e9) for link in given.links]
    facts = read_facts(given.model)
    names = ("gpu", "ram", "threads", "ubatch", "recall", "distance")
    task = {name: getattr(given, name) for name in names} | {
        "model": str(given.model),
        "n_ctx": -(-max([2048, *(length + 64 for length, _ in given.prompts)]) // 256) * 256,
        "n_layer": facts.n_layer,
        "trace": str(given.trace) if given.trace else None,
    }
    speed = gpu_device.measured(given.gpu.split(",")[0])
    print(f"{given.gpu}: {speed / 1e9:.1f} GB/s from host memory, copies of 16 MiB", flush=True)
    began, turns = time.monotonic(), []
    everywhere = [row for row in rows if row.share is None]
    for share in dict.fromkeys(row.share for row in rows if row.share is not None or len(everywhere) == len(rows)):
        players = start([*everywhere, *(row for row in rows if row.share is not None and row.share == share)], task)
        name = "" if share is None else f"{share:g}"
        print(f"{name or 'all'}: loaded after {time.monotonic() - began:.0f} s", flush=True)
        try:
            Match(name, players, given, speed, turns).play()
        finally:
            for player in players:
                player.end()
            add_r(turns, facts.n_layer)
            if given.csv:
                write(given.csv, turns)
    summarise(turns)
    print(f"{time.monotonic() - began:.0f} s in all", flush=True)


if __name__ == "__main__":
    main()
