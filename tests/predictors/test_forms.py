"""Fate's forms, what is learned, the controls and the choice, on a synthetic model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pyengine.predictors import CONTROLS, FORMS, PredictorError
from pyengine.predictors import learn as learning
from pyengine.predictors.fate import fate
from pyengine.predictors.figures import Candidate, choose
from pyengine.predictors.linear import Gram, fit_linear
from pyengine.predictors.mlp import fit_mlp
from pyengine.predictors.offsets import matched
from pyengine.predictors.predictor import Predictor
from pyengine.predictors.recall import recall
from pyengine.predictors.samples import make_samples, split

from .synthetic import N_EMBD, N_EXPERT, N_LAYER, K, routers, trace

CHANCE = K / N_EXPERT


def test_names_agree() -> None:
    assert set(FORMS) == set(learning.FORMS)
    assert learning.FRESH in CONTROLS


def test_the_router_on_its_own_input_recalls_everything() -> None:
    of = routers()
    samples = make_samples(trace(of))
    learned = learning.learn(samples, of, [1], ["fate"])
    fresh = [r for r in learned.layers if r.distance == 0]
    assert [r.target for r in fresh] == list(range(N_LAYER))
    assert all(r.figures[learning.FRESH]["recall@k"] == r.figures[learning.FRESH]["exact"] == 1.0 for r in fresh)


def test_the_correction_folds_exactly_into_the_matrix() -> None:
    of = routers(3)
    random = np.random.default_rng(5)
    of = [replace(r, input_shift=random.standard_normal(N_EMBD).astype(np.float32)) for r in of]
    residual = random.standard_normal((50, N_EMBD)).astype(np.float32)
    source, target = of[1], of[3]
    assert source.input_gain is not None and target.input_gain is not None
    seen = residual * source.input_gain + source.input_shift
    wanted = (residual * target.input_gain + target.input_shift) @ target.weight.T + target.bias
    np.testing.assert_allclose(fate(of, 3, 2, corrected=True).scores(seen), wanted, rtol=1e-3, atol=1e-3)
    plain = fate(of, 3, 2, corrected=False)
    np.testing.assert_array_equal(plain.w2, target.weight)
    assert plain.source == 1


def test_a_vanishing_gain_is_left_out() -> None:
    of = routers(3)
    assert of[0].input_gain is not None
    of[0].input_gain[4] = 0.0
    folded = fate(of, 1, 1, corrected=True)
    assert not folded.w2[:, 4].any() and np.isfinite(folded.w2).all()


def test_unknown_gains_are_an_error() -> None:
    of = [replace(r, input_gain=None, router_gain=None) for r in routers()]
    with pytest.raises(PredictorError, match="norm"):
        fate(of, 1, 1, corrected=True)


def test_a_router_that_reads_the_residual_with_other_gains() -> None:
    of = routers(7)
    own = np.exp(np.random.default_rng(0).uniform(-1, 1, N_EMBD)).astype(np.float32)
    of = [replace(r, router_gain=own) for r in of]
    residual = np.random.default_rng(1).standard_normal((40, N_EMBD)).astype(np.float32)
    gain = of[2].input_gain
    assert gain is not None
    wanted = (residual * own) @ of[2].weight.T + of[2].bias
    np.testing.assert_allclose(fate(of, 2, 0, corrected=False).scores(residual * gain), wanted, rtol=1e-3, atol=1e-3)


def test_the_correction_recalls_more_where_gains_differ() -> None:
    of = routers()
    samples = make_samples(trace(of))
    learned = learning.learn(samples, of, [1], ["fate", "fate-corrected"])
    for report in (r for r in learned.layers if r.distance == 1):
        assert report.figures["fate-corrected"]["recall@k"] > report.figures["fate"]["recall@k"] + 0.2
        assert report.choice is not None and report.choice.form == "fate-corrected"


def test_learning_recalls_what_routers_cannot_foresee() -> None:
    of = routers()
    samples = make_samples(trace(of, mix=True))
    learned = learning.learn(samples, of, [1, 2])
    reports = [r for r in learned.layers if r.distance > 0]
    assert sorted((r.target, r.distance) for r in reports) == [(1, 1), (2, 1), (2, 2), (3, 1), (3, 2)]
    for report in reports:
        best_fate = max(report.figures[form]["recall@k"] for form in ("fate", "fate-corrected"))
        assert report.figures["linear"]["recall@k"] > max(best_fate, CHANCE) + 0.15
        if "mlp" in report.figures:  # it is tried where the linear form leaves something to gain
            assert report.figures["mlp"]["recall@k"] > best_fate + 0.15
    assert any("mlp" in report.figures for report in reports)
    assert {(p.target, p.distance) for p in learned.predictors} == {(r.target, r.distance) for r in reports}
    for p in learned.predictors:
        report = next(r for r in reports if (r.target, r.distance) == (p.target, p.distance))
        assert p.form in ("linear", "mlp") and p.figures == report.auto
        assert p.calibration is not None and p.calibration.by_rank[0] > 0.5 > p.calibration.by_rank[-1]


def test_without_routers_expert_ids_are_learned_from() -> None:
    samples = make_samples(trace(routers(), mix=True))
    learned = learning.learn(samples, None, [1])
    reports = [r for r in learned.layers if r.distance > 0]
    assert all(set(r.figures) == {"linear", "mlp"} for r in reports)
    assert all(r.figures["linear"]["recall@k"] > CHANCE + 0.3 for r in reports)


def test_routing_that_inputs_do_not_tell_is_not_predicted() -> None:
    of = routers()
    told = trace(of)
    random = np.random.default_rng(9)
    ids = np.argsort(random.random((len(told.ids), N_LAYER, N_EXPERT)), axis=2)[:, :, :K].astype(np.uint16)
    learned = learning.learn(make_samples(replace(told, ids=ids)), of, [1], ["fate", "fate-corrected", "linear"])
    assert learned.predictors == ()
    assert all(r.choice is not None and r.choice.form is None for r in learned.layers if r.distance == 1)


def test_routers_of_another_model_are_refused() -> None:
    with pytest.raises(PredictorError, match="routers"):
        learning.learn(make_samples(trace(routers())), routers()[:-1], [1])


def test_layers_may_have_fewer_experts() -> None:
    of = routers()
    of[2] = replace(of[2], weight=of[2].weight[:10], bias=of[2].bias[:10])
    learned = learning.learn(make_samples(trace(of)), of, [1])
    assert [(p.target, p.n_expert) for p in learned.predictors] == [(1, N_EXPERT), (2, 10), (3, N_EXPERT)]


def test_learning_twice_gives_the_same() -> None:
    of = routers()
    samples = make_samples(trace(of, n_token=400, mix=True))
    first, second = (learning.learn(samples, of, [1]) for _ in range(2))
    for a, b in zip(first.predictors, second.predictors, strict=True):
        assert a.form == b.form and np.array_equal(a.w2, b.w2) and np.array_equal(a.b2, b.b2)


def test_the_two_layer_form_begins_as_the_linear_one() -> None:
    random = np.random.default_rng(2)
    x = random.standard_normal((300, N_EMBD)).astype(np.float32)
    w2 = random.standard_normal((N_EXPERT, N_EMBD)).astype(np.float32)
    linear = Predictor("linear", 1, 1, w2, random.standard_normal(N_EXPERT).astype(np.float32))
    ids = np.argsort(-linear.scores(x), axis=1)[:, :K].astype(np.uint16)
    # Nothing recalls better than everything, so training can only return where it began.
    mlp = fit_mlp(linear, x, linear.scores(x), x, ids, 2 * N_EXPERT + 10)
    assert mlp.w1 is not None and mlp.w1.shape == (2 * N_EXPERT + 10, N_EMBD)
    scale = linear.scores(x).std()
    np.testing.assert_allclose(mlp.scores(x) * scale, linear.scores(x), rtol=1e-3, atol=1e-3)


def test_the_two_layer_form_learns_what_no_matrix_can() -> None:
    random = np.random.default_rng(4)
    x = random.standard_normal((4000, 6)).astype(np.float32)
    goal = np.abs(x @ random.standard_normal((6, N_EXPERT)).astype(np.float32))
    ids = np.argsort(-goal, axis=1)[:, :K].astype(np.uint16)
    blank = Predictor("linear", 1, 1, np.zeros((N_EXPERT, 6), np.float32), np.zeros(N_EXPERT, np.float32))
    linear = fit_linear(blank, Gram(x[:3000]), x[:3000], goal[:3000], x[3000:], ids[3000:])
    mlp = fit_mlp(linear, x[:3000], goal[:3000], x[3000:], ids[3000:], 2 * N_EXPERT + 64)
    by_linear, by_mlp = (recall(p.scores(x[3000:]), ids[3000:], K) for p in (linear, mlp))
    assert by_linear < 0.45 and by_mlp > 0.8


def test_offsets_come_near_a_bias_on_the_choice() -> None:
    random = np.random.default_rng(6)
    scores = random.standard_normal((3000, N_EXPERT)).astype(np.float32)
    bias = 0.3 * random.standard_normal(N_EXPERT)
    ids = np.argsort(-(1 / (1 + np.exp(-scores)) + bias), axis=1)[:, :K].astype(np.uint16)
    offset = matched(scores, ids)
    assert recall(scores, ids, K) < 0.75
    assert recall(scores + offset, ids, K) > 0.9
    assert not matched(scores, np.argsort(-scores, axis=1)[:, :K].astype(np.uint16)).any()


def test_the_dearer_form_must_be_worth_it() -> None:
    def candidate(form: str, cost: int, value: float, n: int = 10**6) -> Candidate:
        return Candidate(form, cost, {"miss_recall@k": value, "recall@k": 1.0}, n)

    forms = [candidate("fate", 1, 0.70), candidate("linear", 1, 0.80), candidate("mlp", 9, 0.805)]
    assert choose(forms, []).form == "linear"
    assert choose([*forms[:2], candidate("mlp", 9, 0.83)], []).form == "mlp"
    assert choose(forms, [candidate("popularity", 0, 0.795)]).form is None
    assert choose(forms, [candidate("popularity", 0, 0.5)]).form == "linear"
    assert choose([], []).form is None
    # Of few experts no such difference is certain.
    few = [candidate("fate", 1, 0.60, n=50)]
    assert choose(few, [candidate("popularity", 0, 0.5, n=50)]).form is None


def test_the_split_keeps_sequences_whole() -> None:
    whole = trace(routers())
    parts = split(whole)
    together = np.concatenate([parts.fit, parts.choose, parts.held_out])
    assert parts.by_sequence and sorted(together.tolist()) == list(range(len(whole.ids)))
    for part in (parts.choose, parts.held_out):
        assert 0.1 * len(whole.ids) <= len(part) <= 0.2 * len(whole.ids)
        assert set(part // 60) == {i for i in set(part // 60) if np.isin(np.arange(60 * i, 60 * i + 60), part).all()}
    single = split(replace(whole, starts=np.zeros(1, np.int64)))
    assert not single.by_sequence and single.held_out[-1] == len(whole.ids) - 1
    assert single.fit[-1] < single.choose[0] <= single.choose[-1] < single.held_out[0]


def test_traces_that_cannot_be_learned_from() -> None:
    whole = trace(routers(), n_token=60)
    with pytest.raises(PredictorError, match="no gate inputs"):
        make_samples(replace(whole, inputs=np.zeros((0, 0, 0), np.float16)))
    bad = whole.inputs.copy()
    bad[3, 1, 2] = np.inf
    with pytest.raises(PredictorError, match="not finite"):
        make_samples(replace(whole, inputs=bad))
    with pytest.raises(PredictorError, match="10 tokens"):
        make_samples(
            replace(
                whole, ids=whole.ids[:10], inputs=whole.inputs[:10], tokens=whole.tokens[:10], starts=whole.starts[:1]
            )
        )
