"""How slots are divided: which layers share them, and how many there are. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from pyengine.policies import CacheShape


@dataclass(frozen=True)
class Layout:
    """Groups of layers that share slots; every layer is in one."""

    n_layer: int
    n_expert: int
    """in each layer"""
    n_expert_used: int
    groups: tuple[tuple[int, ...], ...]
    slots: tuple[int, ...]
    """of each group, at least 1"""

    @property
    def total(self) -> int:
        return sum(self.slots)

    @property
    def per_layer(self) -> bool:
        return len(self.groups) == self.n_layer > 1

    @property
    def cache_shape(self) -> CacheShape:
        return CacheShape(self.n_layer, self.n_expert, self.n_expert_used, self.total, self.per_layer)


def own_slots(n_layer: int, n_expert: int, n_expert_used: int, each: int) -> Layout:
    """`each` slots for every layer alone, as the papers' caches have them."""
    groups = tuple((layer,) for layer in range(n_layer))
    return Layout(n_layer, n_expert, n_expert_used, groups, (min(each, n_expert),) * n_layer)


def shared_slots(n_layer: int, n_expert: int, n_expert_used: int, total: int) -> Layout:
    """One pool for all layers, as in the native engine when all experts have one shape."""
    most = n_layer * n_expert
    return Layout(n_layer, n_expert, n_expert_used, (tuple(range(n_layer)),), (max(1, min(total, most)),))
