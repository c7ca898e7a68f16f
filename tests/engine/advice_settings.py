"""Kinds of advice an engine can get, and mixtures of them in which every two kinds meet. Imports nothing of pyengine's
engine, so that the list can be made before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

#: How experts are guessed. "learned": from the model's file of predictors, as pyengine.Llama finds it. "linear" and
#: "mlp": straight to the engine, from these distances. "wild": numbers that are not finite among them.
LOOKS = ("off", "fate", "learned", "linear 2", "mlp 2", "wild 1+2")

#: Who sets priorities beside the policy, at random moments.
PRIORITIES = ("policy", "random", "nan", "infinite")

#: Shares of all experts that are resident.
BUDGETS = (0.125, 0.25, 0.5)


@dataclass(frozen=True)
class Setting:
    """One engine to make.

    policy: of pyengine.policies. look: of LOOKS. share: of the experts in RAM. priorities: of PRIORITIES. bundle: reads
    experts from the model's bundle. expecting: another thread names experts to fetch at random moments.
    """

    policy: str
    look: str
    share: float
    priorities: str
    bundle: bool
    expecting: bool

    @property
    def name(self) -> str:
        parts = [self.policy, self.look, f"{self.share:.1%}", self.priorities]
        return ", ".join([*parts, *["bundle"] * self.bundle, *["expecting"] * self.expecting])


def mixtures(policies: Sequence[str]) -> list[Setting]:
    """Every policy with every way to look ahead; what else there is goes round, so that every two kinds meet."""
    return [
        Setting(
            policy,
            look,
            BUDGETS[(p + n) % len(BUDGETS)],
            PRIORITIES[(p + n + n // len(PRIORITIES)) % len(PRIORITIES)],
            bundle=(p + n // 2) % 2 == 1,
            expecting=(p // 2 + n) % 2 == 1,
        )
        for p, policy in enumerate(policies)
        for n, look in enumerate(LOOKS)
    ]
