"""Make predictors from a trace with gate inputs: every form for every layer and distance, judged and chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from pyengine.predictors import linear, mlp
from pyengine.predictors.calibration import calibrate
from pyengine.predictors.controls import (
    CorrelationTable,
    OnlinePredictor,
    Popularity,
    RepeatLast,
    TokenTable,
    score_tokens,
)
from pyengine.predictors.fate import CORRECTED, PLAIN, correctable, fate
from pyengine.predictors.figures import Candidate, LayerReport, choose, measure
from pyengine.predictors.offsets import matched
from pyengine.predictors.predictor import Predictor, PredictorError, with_offset
from pyengine.predictors.recall import chosen, recall
from pyengine.predictors.routers import Router
from pyengine.predictors.samples import Samples

Floats = npt.NDArray[np.float32]

#: The router on its own layer's input: what a perfect predictor scores.
FRESH = "fresh-gate"
FORMS = (PLAIN, CORRECTED, linear.NAME, mlp.NAME)

#: Recall of the routers on their own inputs from which on their scores are worth imitating.
_FAITHFUL = 0.9
#: Recall of the linear form from which on the two-layer form is not tried: on the bundled model it then gains half a
#: point, for ten times the predictor's cost and minutes of training.
_ROOM = 0.9


@dataclass(frozen=True)
class Learned:
    predictors: tuple[Predictor, ...]
    """the chosen ones, by target and distance"""
    layers: tuple[LayerReport, ...]


def learn(
    samples: Samples,
    routers: Sequence[Router] | None,
    distances: Sequence[int],
    forms: Sequence[str] = FORMS,
    progress: Callable[[int, int], None] = lambda done, total: None,
    seed: int = 0,
) -> Learned:
    """Fit, judge and choose.

    Args:
        samples: of a trace with gate inputs.
        routers: of the traced model; without them Fate's forms are left out, and expert ids are what is fitted.
        distances: layers between the gate input and the target, each at least 1.
        forms: those that may be chosen.
        progress: called with (done, total).

    Raises:
        PredictorError: the routers are those of another model.
    """
    n_layer = samples.trace.model.n_layer
    routers = _fitting(samples, routers)
    pairs = [(source, d) for source in range(n_layer) for d in sorted(set(distances)) if source + d < n_layer]
    total = 2 * n_layer + len(pairs)
    reports = [_fresh(samples, routers, layer) for layer in range(n_layer)] if routers else []
    progress(n_layer, total)
    controls = _controls(samples)
    reports += [LayerReport(layer, -1, controls.held_out[layer]) for layer in range(n_layer)]
    done = 2 * n_layer
    progress(done, total)
    found: list[Predictor] = []
    for source in range(n_layer):
        targets = [source + d for s, d in pairs if s == source]
        for target, candidates in _fitted(samples, routers, source, targets, forms, seed):
            kept, report = _judged(samples, candidates, target, target - source, controls.choosing[target])
            found += kept
            reports.append(report)
            done += 1
            progress(done, total)
    found.sort(key=lambda p: (p.target, p.distance))
    reports.sort(key=lambda r: (r.distance, r.target))
    return Learned(tuple(found), tuple(reports))


def _fitting(samples: Samples, routers: Sequence[Router] | None) -> list[Router] | None:
    """The routers if they can read the trace's gate inputs."""
    if routers is None:
        return None
    model, n_embd = samples.trace.model, samples.trace.inputs.shape[2]
    if len(routers) != model.n_layer or any(len(r.weight) > model.n_expert for r in routers):
        raise PredictorError("the model's routers are not those that the trace was recorded with")
    # Experts of some models read a projection that their router does not.
    return list(routers) if all(r.weight.shape[1] == n_embd for r in routers) else None


def _fitted(
    samples: Samples, routers: list[Router] | None, source: int, targets: list[int], forms: Sequence[str], seed: int
) -> Iterator[tuple[int, list[Predictor]]]:
    """Every form for each target of one source layer."""
    if not targets:
        return
    part = samples.split
    inputs, other = samples.inputs(source, part.fit), samples.inputs(source, part.choose)
    trained = linear.NAME in forms or mlp.NAME in forms
    gram = linear.Gram(inputs) if trained else None
    for target in targets:
        ids = samples.ids(target, part.choose)
        goal, offset = _goal(samples, routers, target)
        plain = _fates(routers, source, target, offset)
        candidates = [p for p in plain if p.form in forms]
        if gram is not None:
            blank = _blank(goal.shape[1], inputs.shape[1], target, target - source)
            # With nothing better than chance to begin with, chance is where to begin.
            start = max([*plain, blank], key=lambda p: recall(p.scores(other), ids, samples.k))
            fitted = linear.fit_linear(start, gram, inputs, goal, other, ids)
            candidates += [fitted] if linear.NAME in forms else []
            if mlp.NAME in forms and (linear.NAME not in forms or recall(fitted.scores(other), ids, samples.k) < _ROOM):
                n_hidden = mlp.hidden_units(inputs.shape[1], goal.shape[1])
                candidates.append(mlp.fit_mlp(fitted, inputs, goal, other, ids, n_hidden, seed))
        yield target, candidates


def _fates(routers: list[Router] | None, source: int, target: int, offset: Floats) -> list[Predictor]:
    if routers is None:
        return []
    forms = [False, True] if correctable(routers[source], routers[target]) else [False]
    return [with_offset(fate(routers, target, target - source, corrected=c), offset) for c in forms]


def _blank(n_expert: int, n_embd: int, target: int, distance: int) -> Predictor:
    zeros = np.zeros((n_expert, n_embd), np.float32)
    return Predictor(linear.NAME, target, distance, zeros, np.zeros(n_expert, np.float32))


def _goal(samples: Samples, routers: list[Router] | None, target: int) -> tuple[Floats, Floats]:
    """(scores to imitate [n, n_expert], offset of the router's scores [n_expert])."""
    # Layers may have fewer experts than the model's number says.
    n_expert = len(routers[target].weight) if routers is not None else samples.trace.model.n_expert
    ids = samples.ids(target, samples.split.fit)
    none = np.zeros(n_expert, np.float32)
    if routers is not None:
        own = fate(routers, target, 0, corrected=False).scores(samples.inputs(target, samples.split.fit))
        offset = matched(own, ids) if routers[target].choice_bias is not None else none
        if recall(own + offset, ids, samples.k) >= _FAITHFUL:
            return own + offset, offset
    return chosen(ids, n_expert).astype(np.float32), none


def _judged(
    samples: Samples, candidates: list[Predictor], target: int, distance: int, controls: list[Candidate]
) -> tuple[list[Predictor], LayerReport]:
    source, part = target - distance, samples.split
    inputs, ids = samples.inputs(source, part.choose), samples.ids(target, part.choose)
    held, held_ids = samples.inputs(source, part.held_out), samples.ids(target, part.held_out)
    n_expert = candidates[0].n_expert if candidates else 0
    resident, held_resident = (samples.resident[t, target, :n_expert] for t in (part.choose, part.held_out))
    n = _missing(samples, part.choose, target)
    judged = [Candidate(p.form, p.multiply_adds, measure(p.scores(inputs), ids, resident), n) for p in candidates]
    choice = choose(judged, controls)
    figures = {p.form: measure(p.scores(held), held_ids, held_resident) for p in candidates}
    kept = [
        replace(p, calibration=calibrate(p.scores(inputs), ids, resident), figures=figures[p.form])
        for p in candidates
        if p.form == choice.form
    ]
    return kept, LayerReport(target, distance, figures, choice)


def _missing(samples: Samples, tokens: npt.NDArray[np.int64], layer: int) -> int:
    """How many of the experts used were not resident; all if none was missing."""
    ids = samples.ids(layer, tokens)
    hits = np.take_along_axis(samples.resident[tokens, layer], ids.astype(np.int64), axis=1)
    return int(hits.size - hits.sum()) or hits.size


def _fresh(samples: Samples, routers: list[Router], layer: int) -> LayerReport:
    tokens = samples.split.held_out
    own = fate(routers, layer, 0, corrected=False)
    if routers[layer].choice_bias is not None:
        _, offset = _goal(samples, routers, layer)
        own = with_offset(own, offset)
    scores = own.scores(samples.inputs(layer, tokens))
    resident = samples.resident[tokens, layer, : own.n_expert]
    return LayerReport(layer, 0, {FRESH: measure(scores, samples.ids(layer, tokens), resident)})


@dataclass(frozen=True)
class _Controls:
    held_out: list[dict[str, dict[str, float]]]
    """by layer: control -> figures"""
    choosing: list[list[Candidate]]
    """by layer"""


def _controls(samples: Samples) -> _Controls:
    """What can be said without gate inputs, learned online over the whole trace."""
    model, part = samples.trace.model, samples.split
    size = (model.n_layer, model.n_expert)
    predictors: dict[str, OnlinePredictor] = {
        "repeat-last": RepeatLast(*size),
        "popularity": Popularity(*size),
        "correlation": CorrelationTable(*size),
    }
    if len(samples.trace.tokens):
        predictors["token-table"] = TokenTable(*size, layers=model.n_layer)
    tokens = np.union1d(part.choose, part.held_out)
    mine = {"choose": np.isin(tokens, part.choose), "held": np.isin(tokens, part.held_out)}
    held: list[dict[str, dict[str, float]]] = [{} for _ in range(model.n_layer)]
    choosing: list[list[Candidate]] = [[] for _ in range(model.n_layer)]
    for name, predictor in predictors.items():
        scores = score_tokens(predictor, samples.trace, tokens)
        for layer in range(model.n_layer):
            figures = [
                measure(scores[at, layer], samples.ids(layer, tokens[at]), samples.resident[tokens[at], layer])
                for at in mine.values()
            ]
            choosing[layer].append(Candidate(name, 0, figures[0], _missing(samples, part.choose, layer)))
            held[layer][name] = figures[1]
    return _Controls(held, choosing)
