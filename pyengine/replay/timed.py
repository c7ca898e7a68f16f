"""A trace replayed in time: what computes when, what moves when, who waits for whom.

A layer computes its attention and router, then its experts, those that are here first. When its router has spoken its
demand loads begin, its prefetches that have not arrived become demand loads if they are wanted and are given up if not,
and the experts that a predictor names for the layer `distance` further on are asked for. Named experts that are here
are no victims until their layer has spoken. Prompts change what is resident and take no time: the figures are for
decoding.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from pyengine.policies import Policy
from pyengine.policies.next_use import NextUsePolicy
from pyengine.replay.admission import LEAST_CHANCE, STANDINGS, Admission
from pyengine.replay.hits import Replay
from pyengine.replay.layout import Layout
from pyengine.replay.predictors import Predictor
from pyengine.replay.steps import PromptStep, Steps
from pyengine.replay.tally import Tally
from pyengine.replay.timing import Timing
from pyengine.replay.transfers import Transfer, Transfers


@dataclass(frozen=True)
class Prefetching:
    """How guesses are used."""

    distance: int = 1
    """layers that predictions look ahead, at least 1"""
    more: int = 0
    """experts that are named beyond n_expert_used"""
    least_chance: float = LEAST_CHANCE
    """see Admission"""


class TimedReplay(Replay):
    """One policy and one predictor (None: demand loads only) over one trace."""

    def __init__(
        self,
        steps: Steps,
        layout: Layout,
        policy: Policy,
        timing: Timing,
        predictor: Predictor | None = None,
        rules: Prefetching | None = None,
    ) -> None:
        super().__init__(steps, layout, policy)
        rules = rules or Prefetching()
        self._timing, self._predictor, self._distance = timing, predictor, rules.distance
        self._n_named = min(layout.n_expert, layout.n_expert_used + rules.more)
        self._admission = Admission(steps.n_layer, self._n_named, rules.least_chance)
        self._transfers = Transfers(timing, self._landed)
        layer_s = timing.layer_s(steps.n_layer)
        self._expert_s = layer_s * timing.expert_share / layout.n_expert_used
        self._router_s = layer_s * (1 - timing.expert_share)
        self._expert_bytes = float(timing.expert_bytes)
        self._named: dict[int, list[int]] = {}  # by layer to come: experts, the surest first
        self._guesses: dict[int, list[tuple[int, int, int]]] = {}  # likewise: (absent expert, rank, standing)
        self._begun = [0] * steps.n_layer  # prefetches for the layer's next step
        self._held: dict[int, dict[int, int]] = {}  # by layer to come: no victims, with the time of their last use
        self._fresh = bytearray(len(self.slots.here))  # brought by a prefetch, not used yet
        self._now = 0.0
        self.tally = Tally.of(steps.n_layer)

    def run_timed(self) -> Tally:
        steps, tally = self._steps, self.tally
        for token, wanted in enumerate(steps.numbers(self.slots.place)):
            self._between(token)
            self._look_ahead(token)
            for layer in range(min(self._distance, steps.n_layer)):
                self._predict(token, layer, 0, self._now)
            for layer in range(steps.n_layer):
                self._layer(token, layer, wanted[layer])
            if self._predictor is not None:
                self._predictor.observe(token)
            self._learn(token)
        self._between(steps.n_token)
        tally.n_token, tally.total_s = steps.n_token, self._now
        tally.bytes_wasted += self._expert_bytes * sum(self._fresh)
        for transfer in list(self._transfers.low):
            self._give_up(transfer)
        return tally

    def _layer(self, token: int, layer: int, wanted: list[int]) -> None:
        slots, tally = self.slots, self.tally
        spoken = self._now + self._router_s
        self._transfers.prefetch_until(spoken)
        self._release(layer)
        late = self._preempt(layer, set(wanted))
        hits = [e for e in wanted if slots.here[e] and e not in late]
        waiting = deque(e for e in wanted if not slots.here[e])
        self._count(layer, wanted, hits, late)

        uses = {e: slots.tick() for e in (*hits, *late)}
        for e in hits:
            slots.pin(e)
        # A demand load is (expert, bytes left, when it was asked for).
        loads = deque((e, transfer.left, spoken) for e, transfer in late.items())
        self._demand(layer, waiting, loads, uses, spoken)
        self._predict(token, layer + self._distance, layer + 1, spoken)

        now = spoken + len(hits) * self._expert_s
        computed = hits
        while loads or waiting:
            if waiting:  # fewer slots than the set: what has computed makes room
                for e in computed:
                    slots.unpin(e, uses.pop(e))
                computed = []
                self._demand(layer, waiting, loads, uses, now)
            expert, left, since = loads.popleft()
            arrived = self._transfers.demand(left, since)
            tally.bytes_demand += left
            tally.stall_s += max(0.0, arrived - now)
            now = max(now, arrived) + self._expert_s
            computed.append(expert)
        self._transfers.prefetch_until(now)
        for e in computed:
            slots.unpin(e, uses.pop(e))
        self._now = now

    def _demand(
        self, layer: int, waiting: deque[int], loads: deque[tuple[int, float, float]], uses: dict[int, int], now: float
    ) -> None:
        """Begin demand loads as far as slots go."""
        slots, group = self.slots, self.slots.group_of[layer]
        while waiting:
            if not self._claim(waiting[0], group):
                if not self._give_way(group):
                    return
                continue
            uses[waiting[0]] = slots.tick()
            loads.append((waiting.popleft(), self._expert_bytes, now))

    def _claim(self, expert: int, group: int) -> bool:
        victim = self.slots.victim(group)
        if not self.slots.claim(expert, group):
            return False
        if victim is not None and self._fresh[victim]:
            self._fresh[victim] = 0
            self.tally.bytes_wasted += self._expert_bytes
        return True

    def _give_way(self, group: int) -> bool:
        """A demand load finds no slot: what is kept for later layers may leave, then what is on its way there."""
        if self._held:
            for layer in list(self._held):
                self._release(layer)
            return True
        for transfer in reversed(self._transfers.low):
            if self.slots.group_of[transfer.layer] == group:
                self._give_up(transfer)
                self._transfers.low.remove(transfer)
                return True
        return False

    def _give_up(self, transfer: Transfer) -> None:
        moved = self._expert_bytes - transfer.left
        self.tally.bytes_prefetch += moved
        self.tally.bytes_wasted += moved
        self.slots.vacate(transfer.expert, self.slots.group_of[transfer.layer])

    def _preempt(self, layer: int, wanted: set[int]) -> dict[int, Transfer]:
        """The layer's router has spoken. Returns its prefetches that are wanted and not here."""
        mine = self._transfers.take(layer)
        self._admission.arrived(self._begun[layer], sum(t.left > 0 for t in mine))
        self._admission.judge(layer, self._guesses.pop(layer, ()), wanted)
        self._begun[layer] = 0
        for transfer in mine:
            if transfer.expert not in wanted:
                self._give_up(transfer)
            else:
                self._admission.moved(1 - transfer.left / self._expert_bytes)
                self.tally.bytes_prefetch += self._expert_bytes - transfer.left
        return {t.expert: t for t in mine if t.expert in wanted}

    def _count(self, layer: int, wanted: list[int], hits: list[int], late: dict[int, Transfer]) -> None:
        in_time = [e for e in hits if self._fresh[e]]
        for e in in_time:
            self._fresh[e] = 0
            self._admission.moved(1)
        self._missing[layer] += len(wanted) - len(hits)
        self.tally.count(layer, len(wanted), len(hits), len(in_time), len(late))
        named = self._named.pop(layer, None)
        if named is not None:
            here = [e for e in named if self.slots.here[e] and e not in late]
            self.tally.count_named(layer, set(wanted), named, here, set(in_time))

    def _predict(self, token: int, layer: int, known: int, now: float) -> None:
        """Name the experts of a layer to come: ask for those that are absent, keep those that are here."""
        if self._predictor is None or layer >= self._steps.n_layer:
            return
        scores = self._predictor.predict(token, layer, known)
        if scores is None:
            return
        slots, group = self.slots, self.slots.group_of[layer]
        best = np.argsort(-scores, kind="stable")[: self._n_named]
        named = self._named[layer] = (best[scores[best] > 0] + slots.place[layer]).tolist()
        guesses = self._guesses[layer] = []
        for rank, e in enumerate(named):
            standing = slots.n_above(layer, e) * STANDINGS // slots.n_expert
            chance = self._admission.chance(layer, rank, standing)
            if slots.here[e]:
                if self._admission.likely(chance):
                    self._hold(e, layer)
                continue
            guesses.append((e, rank, standing))
            leaves = None if slots.only_pins(group) else slots.victim(group)
            pays = self._admission.pays(chance, leaves, layer if leaves is None else slots.layer_of(leaves))
            if not (pays and self._admission.has_room(self._begun[layer])) or slots.only_pins(group):
                continue
            if self._claim(e, group):
                self._begun[layer] += 1
                self._transfers.low.append(Transfer(e, layer, now, self._expert_bytes))

    def _look_ahead(self, token: int) -> None:
        """A policy that ranks by next use may know what the predictor knows before the token begins."""
        if self._predictor is None or not isinstance(self._policy, NextUsePolicy):
            return
        scores = self._predictor.next_token(token)
        if scores is not None:
            self._policy.look_ahead(scores)
            self.slots.set_priorities(self._policy.priorities())

    def _hold(self, expert: int, layer: int) -> None:
        use = self.slots.last_use(expert)
        if use is not None:  # else it is pinned already
            self._held.setdefault(layer, {})[expert] = use
            self.slots.pin(expert)

    def _release(self, layer: int) -> None:
        for expert, use in self._held.pop(layer, {}).items():
            self.slots.unpin(expert, use)

    def _landed(self, transfer: Transfer) -> None:
        self._fresh[transfer.expert] = 1
        self.tally.bytes_prefetch += self._expert_bytes
        self._held.setdefault(transfer.layer, {})[transfer.expert] = self.slots.tick()

    def _prompt(self, prompt: PromptStep) -> None:
        """Everything that is on its way is given up."""
        for transfer in self._transfers.low:
            self._give_up(transfer)
        self._transfers.low.clear()
        for layer in list(self._held):
            self._release(layer)
        self._begun = [0] * self._steps.n_layer
        self._guesses.clear()
        self._named.clear()
        super()._prompt(prompt)
