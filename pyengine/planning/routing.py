"""How many experts of a layer are missing when a token needs them, for any number of slots: the engine's LRU, replayed.

Pure. The rules are the native engine's (layer_step.cpp, slot_store.cpp): one LRU over all layers of a shape class; a
layer's ids arrive as a set, of which hits are touched first, in ascending order, and no member is a victim as long as
another expert is there; the missing follow, those that most tokens chose first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from pyengine.planning.tier_replay import replay_tiers
from pyengine.traces import Prompts, Trace

#: Tokens replayed: enough for hit rates to settle within a percent, and quick.
MOST_TOKENS = 1200
_UNIFORM_TOKENS = 300
#: Fewer tokens of whatever somebody happened to talk about say less than that every expert is as likely.
_LEAST_RECENT = 200
#: Of these the first ones only fill the slots.
_WARM_UP = 0.25
#: Micro-batches of a prompt that are replayed to see what an earlier one leaves to a later one.
_PROMPTS = 3


def replay(steps: Iterable[Sequence[int]], slots: int, resident: Iterable[int] = ()) -> Iterator[int]:
    """Misses of each step.

    Args:
        steps: the experts each step needs, as numbers that are unique within a shape class; hits are touched, and the
            missing loaded, in this order.
        slots: at least 1.
        resident: experts that lie in slots at the beginning, longest unused first; at most `slots`.
    """
    used: OrderedDict[int, None] = OrderedDict.fromkeys(resident)
    touch = used.move_to_end
    for wanted in steps:
        missing = []
        for expert in wanted:
            if expert in used:
                touch(expert)
            else:
                missing.append(expert)
        for expert in missing:
            if len(used) >= slots:
                used.popitem(last=False)
            used[expert] = None
        yield len(missing)


@dataclass(frozen=True)
class Misses:
    """What a budget means for one kind of step, averages over steps. Layers are those that have experts."""

    per_layer: npt.NDArray[np.float64]
    """float64 [n_layer]: experts missing per step"""
    of_layer: npt.NDArray[np.float64]
    """float64 [n_layer, most + 1]: share of the steps in which so many experts were missing"""
    wanted: npt.NDArray[np.float64]
    """float64 [n_layer]: experts needed per step"""

    @property
    def hit_rate(self) -> float:
        return 1.0 - float(self.per_layer.sum() / self.wanted.sum())


@dataclass(frozen=True)
class Routing:
    """Which experts tokens choose: from a trace, or uniform."""

    ids: npt.NDArray[np.uint16]
    """uint16 [n_token, n_layer, n_expert_used], each set ascending"""
    n_expert: int
    traced: bool
    prompts: Prompts
    """recorded micro-batches, perhaps none"""

    def decode(self, layers: Sequence[Sequence[int]], slots: Sequence[int]) -> Misses:
        """Misses of tokens computed one at a time, once the slots are full.

        Args:
            layers: the layers of each shape class.
            slots: of each class.
        """
        n_token, n_layer, n_used = self.ids.shape
        first = int(_WARM_UP * n_token)
        counts = np.zeros((n_token, n_layer), np.int64)
        decoded = self._decoded()
        for members, n_slot in zip(layers, slots, strict=True):
            resident = self._last(members, n_slot)
            misses = np.fromiter(replay(self._steps(members), n_slot, resident), np.int64)
            counts[:, list(members)] = misses.reshape(-1, len(members))[decoded]
        return _averages(counts[first:], np.full(n_layer, float(n_used)))

    def decode_tiers(
        self, layers: Sequence[Sequence[int]], slots: Sequence[int], ram_slots: Sequence[int]
    ) -> tuple[Misses, npt.NDArray[np.float64]]:
        """As decode(), with slots in VRAM over others in RAM.

        Returns:
            What is missing in VRAM; float64 [n_layer]: of that, experts per token that are missing in RAM too.
        """
        n_token, n_layer, n_used = self.ids.shape
        first = int(_WARM_UP * n_token)
        counts, read = np.zeros((n_token, n_layer), np.int64), np.zeros((n_token, n_layer), np.int64)
        decoded = self._decoded()
        for members, n_slot, n_ram in zip(layers, slots, ram_slots, strict=True):
            resident = self._last(members, n_slot)
            there = set(resident)
            behind = [e for e in self._last(members, self.n_expert * len(members)) if e not in there][:n_ram]
            both = np.array(list(replay_tiers(self._steps(members), n_slot, n_ram, resident, behind)), np.int64)
            by_token = both.reshape(-1, len(members), 2)[decoded]
            counts[:, list(members)], read[:, list(members)] = by_token[..., 0], by_token[..., 1]
        return _averages(counts[first:], np.full(n_layer, float(n_used))), read[first:].mean(axis=0)

    def prefill(self, n_token: int, layers: Sequence[Sequence[int]], slots: Sequence[int], *, cold: bool) -> Misses:
        """Misses of one micro-batch of `n_token` tokens: the first one after loading, or (not cold) after others."""
        batches = [self._batch(n_token, seed) for seed in range(1 if cold else _PROMPTS)]
        n_layer = self.ids.shape[1]
        counts = np.zeros((1, n_layer), np.int64)
        for members, n_slot in zip(layers, slots, strict=True):
            everything = not cold and n_slot >= self.n_expert * len(members)
            resident = self._last(members, n_slot) if everything else ()
            steps = ([layer * self.n_expert + e for e in batch[layer]] for batch in batches for layer in members)
            misses = np.fromiter(replay(steps, n_slot, resident), np.int64)
            counts[0, list(members)] = misses[-len(members) :]
        wanted = np.array([len(experts) for experts in batches[-1]], np.float64)
        return _averages(counts, wanted)

    def _last(self, members: Sequence[int], n_slot: int) -> list[int]:
        """What lies in the slots after a prompt that used every expert."""
        all_of_them = [layer * self.n_expert + e for layer in members for e in range(self.n_expert)]
        return all_of_them[max(0, len(all_of_them) - n_slot) :]

    def _decoded(self) -> npt.NDArray[np.bool_]:
        """Of all steps of a layer, which are decoded tokens and not micro-batches of a prompt."""
        decoded = np.ones(len(self.ids) + len(self.prompts), np.bool_)
        decoded[self.prompts.at + np.arange(len(self.prompts))] = False
        return decoded

    def _steps(self, members: Sequence[int]) -> Iterator[list[int]]:
        """What replay() takes: layer after layer of token after token, micro-batches of prompts where they came."""
        numbers, done = self._numbers[:, list(members)].tolist(), 0
        for index, at in enumerate([*self.prompts.at.tolist(), len(numbers)]):
            for sets in numbers[done:at]:
                yield from sets
            done = at
            if index < len(self.prompts):
                yield from (self._prompt(index, layer) for layer in members)

    def _prompt(self, index: int, layer: int) -> list[int]:
        """Experts of a recorded micro-batch in one layer, those that most tokens chose first."""
        experts, pairs = self.prompts.of(index, layer, self.ids.shape[1])
        order = np.argsort(-pairs.astype(np.int64), kind="stable")
        return [layer * self.n_expert + int(expert) for expert in experts[order]]

    @cached_property
    def _numbers(self) -> npt.NDArray[np.int64]:
        offsets = np.arange(self.ids.shape[1], dtype=np.int64) * self.n_expert
        return self.ids.astype(np.int64) + offsets[None, :, None]

    def _batch(self, n_token: int, seed: int) -> list[list[int]]:
        """Experts that a micro-batch uses in each layer, most wanted first: those of as many tokens in a row, if there
        are so many, filled up to what recorded prompts of that length used."""
        chance = np.random.default_rng(seed)
        have = len(self.ids)
        start = int(chance.integers(0, max(1, have - n_token + 1)))
        picked = self.ids[start : start + n_token]
        wanted = self._recorded(n_token)
        sets = []
        for layer in range(self.ids.shape[1]):
            counts = np.bincount(picked[:, layer].ravel(), minlength=self.n_expert)
            order = np.argsort(-counts, kind="stable")
            n = int((counts > 0).sum())
            if wanted is not None:
                n = max(n, round(wanted[layer]))
            sets.append(order[: min(n, self.n_expert)].tolist())
        return sets

    def _recorded(self, n_token: int) -> npt.NDArray[np.float64] | None:
        """Distinct experts of recorded micro-batches, between the lengths next to `n_token`; None: nothing similar."""
        order = np.argsort(self.prompts.tokens, kind="stable")
        lengths = self.prompts.tokens[order]
        if not len(lengths) or not 0.5 * lengths[0] <= n_token <= 2 * lengths[-1]:
            return None
        columns = [np.interp(n_token, lengths, column) for column in self.prompts.counts(self.ids.shape[1])[order].T]
        return np.array(columns)


def _averages(counts: npt.NDArray[np.int64], wanted: npt.NDArray[np.float64]) -> Misses:
    n_step, n_layer = counts.shape
    most = int(max(counts.max(initial=0), wanted.max()))
    of_layer = np.zeros((n_layer, most + 1))
    for layer in range(n_layer):
        of_layer[layer] = np.bincount(counts[:, layer], minlength=most + 1) / max(1, n_step)
    return Misses(counts.mean(axis=0), of_layer, wanted)


def routing_of_trace(trace: Trace) -> Routing | None:
    """The routing in a trace; None if it has too few tokens to say anything. Of a long one the last tokens."""
    if len(trace.ids) < 8:
        return None
    dropped = max(0, len(trace.ids) - MOST_TOKENS)
    return Routing(
        ids=np.sort(trace.ids[dropped:], axis=2),
        n_expert=trace.model.n_expert,
        traced=True,
        prompts=_after(trace.prompts, dropped, trace.model.n_layer),
    )


def _after(prompts: Prompts, token: int, n_layer: int) -> Prompts:
    """Those at or after a token, counted from there."""
    first = int(np.searchsorted(prompts.at, token))
    begin = prompts.offsets[first * n_layer]
    return Prompts(
        at=prompts.at[first:] - token,
        tokens=prompts.tokens[first:],
        offsets=prompts.offsets[first * n_layer :] - begin,
        experts=prompts.experts[begin:],
        pairs=prompts.pairs[begin:],
    )


def routing_of_recent(recent: npt.NDArray[np.uint16], n_expert: int) -> Routing | None:
    """The routing of the last decoded tokens, uint16 [n_token, n_layer, n_expert_used], as a profile keeps them; None
    if they are too few to say anything. Nothing is known of prompts."""
    if len(recent) < _LEAST_RECENT:
        return None
    return Routing(np.sort(recent, axis=2), n_expert, True, Prompts())


def uniform_routing(n_layer: int, n_expert: int, n_expert_used: int, n_token: int = _UNIFORM_TOKENS) -> Routing:
    """Every set of experts equally likely, and no memory of the token before: what to assume without a trace."""
    chance = np.random.default_rng(0)
    ids = np.empty((n_token, n_layer, n_expert_used), np.uint16)
    for token in range(n_token):
        order = np.argpartition(chance.random((n_layer, n_expert)), n_expert_used - 1, axis=1)
        ids[token] = np.sort(order[:, :n_expert_used], axis=1)
    return Routing(ids, n_expert, False, Prompts())
