"""The figures by which predictors are compared, and the choice between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pyengine.predictors.recall import BEYOND, Flags, Ids, Scores, exact_set, miss_precision, miss_recall, recall

#: What a form that costs several times as much must recall more, on the miss stream.
WORTH = 0.01
#: What gate inputs must recall more than the best control, or nothing is predicted; and so many standard errors more.
GAIN = 0.02
_ERRORS = 2.0

#: The figure that decides.
DECISIVE = "miss_recall@k"


def key(name: str, beyond: int) -> str:
    """E.g. "recall@k+2"."""
    return f"{name}@k+{beyond}" if beyond else f"{name}@k"


def measure(scores: Scores, ids: Ids, resident: Flags) -> dict[str, float]:
    """All figures of one layer: recall and miss_recall at k and beyond, exact, miss_precision@k. NaN (nothing was ever
    missing) is left out.

    Args:
        scores: float32 [n, n_expert].
        ids: [n, k].
        resident: bool [n, n_expert].
    """
    k = ids.shape[1]
    found = {key("recall", m): recall(scores, ids, k + m) for m in BEYOND}
    found["exact"] = exact_set(scores, ids)
    found |= {key("miss_recall", m): miss_recall(scores, ids, resident, k + m) for m in BEYOND}
    found["miss_precision@k"] = miss_precision(scores, ids, resident, k)
    return {name: round(value, 6) for name, value in found.items() if not np.isnan(value)}


@dataclass(frozen=True)
class Candidate:
    """A form as it did on the tokens that choose."""

    form: str
    multiply_adds: int
    figures: dict[str, float]
    n: int
    """experts that the decisive figure counts"""

    @property
    def value(self) -> float:
        """The decisive figure; plain recall where nothing was missing."""
        return self.figures.get(DECISIVE, self.figures["recall@k"])

    @property
    def error(self) -> float:
        """Standard error of the value."""
        return float(np.sqrt(self.value * (1 - self.value) / max(1, self.n)))


@dataclass(frozen=True)
class Choice:
    form: str | None
    """None: nothing is predicted"""
    why: str
    """a few words"""


def choose(candidates: list[Candidate], controls: list[Candidate]) -> Choice:
    """The form that recalls most of the experts that are missing; a dearer one only if it is WORTH it; none if a
    control, which needs no gate input, does nearly as well.

    Args:
        candidates: forms of one layer and distance, simplest first.
        controls: what needs no gate inputs.
    """
    if not candidates:
        return Choice(None, "no gate input comes before")
    best = candidates[0]
    for candidate in candidates[1:]:
        dearer = candidate.multiply_adds > best.multiply_adds
        if candidate.value > best.value + (WORTH if dearer else 0.0):
            best = candidate
    rival = max(controls, key=lambda c: c.value, default=None)
    if rival is not None and best.value < rival.value + GAIN + _ERRORS * float(np.hypot(best.error, rival.error)):
        return Choice(None, f"{best.form} {best.value:.2f}, {rival.form} {rival.value:.2f} without gate inputs")
    others = [c for c in candidates if c.form != best.form]
    second = max(others, key=lambda c: c.value, default=None)
    return Choice(best.form, f"{best.value:.2f}" + (f", {second.form} {second.value:.2f}" if second else ""))


@dataclass(frozen=True)
class LayerReport:
    """One target layer at one distance; distance 0 is the fresh gate, -1 the controls."""

    target: int
    distance: int
    figures: dict[str, dict[str, float]]
    """form -> figures on held-out tokens, see figures.measure"""
    choice: Choice | None = None

    @property
    def auto(self) -> dict[str, float] | None:
        """Figures of the form chosen; None if none was."""
        return self.figures.get(self.choice.form) if self.choice is not None and self.choice.form else None


def means(reports: Sequence[LayerReport]) -> dict[int, dict[str, dict[str, float]]]:
    """distance -> form -> figure -> mean over the layers that have it; "auto" is the choice, where there is one."""
    found: dict[int, dict[str, dict[str, list[float]]]] = {}
    for report in reports:
        rows = dict(report.figures) | ({"auto": report.auto} if report.auto is not None else {})
        for form, figures in rows.items():
            for name, value in figures.items():
                found.setdefault(report.distance, {}).setdefault(form, {}).setdefault(name, []).append(value)
    return {
        distance: {form: {n: float(np.mean(v)) for n, v in figures.items()} for form, figures in forms.items()}
        for distance, forms in sorted(found.items())
    }
