"""Speeds of a model on a GPU, from what is missing in VRAM and in RAM and what this machine was measured to do. Pure.

A token with everything in VRAM is one graph. With a part of the experts there, each layer's ids must be looked at, and
what is missing is moved before its layer can end: nothing of the next layer can be computed meanwhile. Guesses move
some of it earlier, but over the same link. So times add up, and the link's or the disk's alone is a bound.
"""

from __future__ import annotations

from dataclasses import dataclass

#: Measured on an H100 (docs/gpu.md): what looking at a layer's ids costs, seconds, until it is measured here.
LOOK_S = 45e-6


@dataclass(frozen=True)
class TierCosts:
    """Seconds, of one model on one machine."""

    resident_s: float
    """one decoded token with every expert in VRAM"""
    look_s: float
    """more for each layer if not every expert is there, though all that are needed are"""
    move_s: float
    """one expert from RAM to VRAM"""
    read_s: float
    """one expert from disk to RAM, several at a time"""


@dataclass(frozen=True)
class TokenTime:
    """Seconds of one decoded token, by what takes them."""

    compute_s: float
    link_s: float
    disk_s: float

    @property
    def tokens_per_s(self) -> float:
        return 1.0 / (self.compute_s + self.link_s + self.disk_s)

    @property
    def bound(self) -> str:
        """What alone takes longest: "compute", "link" or "disk"."""
        times = {"compute": self.compute_s, "link": self.link_s, "disk": self.disk_s}
        return max(times, key=lambda name: times[name])

    @property
    def bound_tokens_per_s(self) -> float:
        """What no hiding of one behind the other can exceed with as many bytes to move."""
        return 1.0 / max(self.compute_s, self.link_s, self.disk_s)


def token_time(costs: TierCosts, n_layer: int, missing: float, read: float, *, everything: bool) -> TokenTime:
    """One token.

    Args:
        missing: experts that are not in VRAM, per token, all layers.
        read: of these, those that are not in RAM either.
        everything: every expert has its slot in VRAM.
    """
    looks = 0.0 if everything else n_layer * costs.look_s
    return TokenTime(costs.resident_s + looks, missing * costs.move_s, read * costs.read_s)
