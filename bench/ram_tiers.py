"""What a RAM tier between VRAM and disk should hold: rules for what enters and what leaves it, over a real trace.

    .venv/bin/python bench/ram_tiers.py TRACE.npz [--tokens 1200] [--csv CSV]

Needs no GPU: only residency is simulated, with demand loads alone. All layers share the slots of a tier, as in the
engine. Columns, per token after the first --warm tokens: experts read from disk, copied from RAM to VRAM, and back.

Rules:
    inclusive         what is read passes through RAM and stays; the victim is whoever has the lowest priority
    duplicates        the same, but what VRAM holds too leaves first
    exclusive         what is read goes to VRAM alone; what VRAM evicts is copied back; duplicates leave first
    exclusive-worth   the same, if whoever it pushes out of RAM is worth less
    demotion          as `duplicates`, and what VRAM evicts without a copy in RAM is copied back
    demotion-worth    the same, if whoever it pushes out of RAM is worth less
    passing-worth     as `demotion-worth`, and what is read stays in RAM only in the place of a duplicate
    exclusive-worth-high   as `exclusive-worth`, and of duplicates the one of highest priority leaves first
"""

from __future__ import annotations

import argparse
import csv
import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pyengine.policies.lfu import LfuPolicy
from pyengine.policies.lrfu import LrfuPolicy
from pyengine.policies.lru import LruPolicy
from pyengine.policies.policy import CacheShape

POLICIES = {"lru": LruPolicy, "lfu": LfuPolicy, "lrfu": LrfuPolicy}
RULES = (
    *("inclusive", "duplicates", "exclusive", "exclusive-worth", "exclusive-worth-high"),
    *("demotion", "demotion-worth", "passing-worth"),
)
_USE = 1e-12  # a use's weight in a key: decides only between equal priorities


@dataclass
class Counts:
    disk: int = 0
    to_vram: int = 0
    back: int = 0


class Tiers:
    """Two directories of one set of experts, numbered over all layers."""

    def __init__(self, n_expert: int, vram: int, ram: int, rule: str) -> None:
        self.room, self.ram_room, self.rule = vram, ram, rule
        self.priority = np.zeros(n_expert)
        self.used, self.ram_used = np.zeros(n_expert), np.zeros(n_expert)
        self.vram, self.ram = np.zeros(n_expert, bool), np.zeros(n_expert, bool)
        self.n_vram = self.n_ram = 0
        self.clock = 0
        self.counts = Counts()

    def step(self, wanted: np.ndarray) -> None:
        """One layer needs these experts together."""
        here = self.vram[wanted]
        for e in wanted[here]:
            self._touch(e)
        for e in wanted[~here]:
            self._load(e, wanted)

    def _touch(self, e: int) -> None:
        self.clock += 1
        self.used[e] = self.clock

    def _load(self, e: int, wanted: np.ndarray) -> None:
        if self.ram[e]:
            self.counts.to_vram += 1
            self.clock += 1
            self.ram_used[e] = self.clock
        else:
            self.counts.disk += 1
            if not self.rule.startswith("exclusive"):
                self._enter_ram(e, always=self.rule != "passing-worth", duplicate=True)
        if self.n_vram < self.room:
            self.n_vram += 1
        else:
            keys = np.where(self.vram, self.priority + _USE * self.used, np.inf)
            keys[wanted] = np.inf
            victim = int(keys.argmin())
            self.vram[victim] = False
            leaves_copies = self.rule in ("inclusive", "duplicates") or self.ram[victim]
            if not leaves_copies and self._enter_ram(victim, always="worth" not in self.rule):
                self.counts.back += 1
        self.vram[e] = True
        self._touch(e)

    def _enter_ram(self, e: int, always: bool, duplicate: bool = False) -> bool:
        """Unless `always`, only in an empty slot, that of a duplicate, or (if no copy is in VRAM) of one that is worth
        less."""
        if self.n_ram < self.ram_room:
            self.n_ram += 1
        else:
            keys = np.where(self.ram, self.priority + _USE * self.ram_used, np.inf)
            doubles = self.ram & self.vram
            if self.rule != "inclusive" and doubles.any():
                keys[~doubles] = np.inf
                if self.rule.endswith("high"):
                    keys[doubles] *= -1
                victim = int(keys.argmin())
            else:
                victim = int(keys.argmin())
                mine = self.priority[e] + _USE * self.used[e]
                if not always and (duplicate or keys[victim] > mine):
                    return False
            self.ram[victim] = False
        self.ram[e] = True
        self.clock += 1
        self.ram_used[e] = self.clock
        return True


def replay(ids: np.ndarray, n_expert: int, policy: str, rule: str, vram: int, ram: int, warm: int) -> list[float]:
    """`ids` [token, layer, rank]. Returns reads, copies to VRAM and copies back per token after `warm`."""
    n_token, n_layer, n_used = ids.shape
    tiers = Tiers(n_layer * n_expert, vram, ram, rule)
    advice = POLICIES[policy](CacheShape(n_layer, n_expert, n_used, vram))
    first = np.arange(n_layer)[:, None] * n_expert
    for number, token in enumerate(ids):
        if number == warm:
            tiers.counts = Counts()
        for wanted in np.sort(token, axis=1) + first:
            tiers.step(wanted)
        advice.observe(token.astype(np.uint16), None)
        tiers.priority[:] = advice.priorities().ravel()
        if policy == "lfu":  # its counts grow; ties must stay ties
            tiers.priority /= max(1.0, tiers.priority.max())
    counts = tiers.counts
    return [n / (n_token - warm) for n in (counts.disk, counts.to_vram, counts.back)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--tokens", type=int, default=1200)
    parser.add_argument("--warm", type=int, default=400)
    parser.add_argument("--starts", type=int, nargs="+", default=[6000, 50000])
    parser.add_argument("--vram", type=float, nargs="+", default=[12.5, 25])
    parser.add_argument("--ram", type=float, nargs="+", default=[25, 37.5, 75])
    parser.add_argument("--policies", nargs="+", default=["lru", "lfu"], choices=POLICIES)
    parser.add_argument("--rules", nargs="+", default=list(RULES), choices=RULES)
    parser.add_argument("--csv", type=Path)
    given = parser.parse_args()
    with np.load(given.trace) as trace:
        ids, n_expert = trace["ids"].astype(np.int64), int(trace["n_expert"])
    n = ids.shape[1] * n_expert
    lines = []
    for vram, ram, policy, rule in itertools.product(given.vram, given.ram, given.policies, given.rules):
        slots = int(n * vram / 100), int(n * ram / 100)
        each = [replay(ids[at : at + given.tokens], n_expert, policy, rule, *slots, given.warm) for at in given.starts]
        mean = np.mean(each, axis=0)
        lines.append([vram, ram, policy, rule, *(f"{value:.3f}" for value in mean)])
        print(*lines[-1], flush=True)
    if given.csv:
        with given.csv.open("w", newline="") as out:
            table = csv.writer(out)
            table.writerow(("vram_percent", "ram_percent", "policy", "rule", "disk", "ram_to_vram", "vram_to_ram"))
            table.writerows(lines)


if __name__ == "__main__":
    main()
