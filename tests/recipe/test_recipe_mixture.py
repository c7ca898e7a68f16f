"""Routing and experts against plain loops."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from smolmoe.config import WEIGHT_BITS, ExpertLayout
from smolmoe.mixture import Experts, MoeLayer, expert_ffn, route

LAYOUT = ExpertLayout(n_expert=4, n_used=2, width=64)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def experts() -> Experts:
    neurons = LAYOUT.n_expert * LAYOUT.width
    shapes = ((LAYOUT.n_expert, 32), (neurons, 32), (neurons, 32), (32, neurons))
    return Experts(*(torch.randn(shape) / 5 for shape in shapes))


def test_routing() -> None:
    hidden, router = torch.randn(3, 7, 32), torch.randn(32, 32)
    routing = route(hidden, router, 8)
    probabilities = torch.softmax(hidden @ router.t(), -1)
    best, chosen = probabilities.topk(8, -1)
    expected = torch.zeros_like(probabilities).scatter(-1, chosen, best / best.sum(-1, keepdim=True))
    torch.testing.assert_close(routing.weights, expected)
    assert torch.equal(routing.used, (expected > 0).float())


def test_only_the_chosen_experts_compute(experts: Experts) -> None:
    hidden = torch.randn(2, 5, 32)
    output = expert_ffn(hidden, experts, LAYOUT, quantised=False).output.float()
    weights = route(hidden, experts.router, LAYOUT.n_used).weights * LAYOUT.n_used
    expected = torch.zeros(2, 5, 32)
    for row, token in np.ndindex(2, 5):
        for expert in torch.nonzero(weights[row, token]).flatten().tolist():
            own = slice(expert * LAYOUT.width, (expert + 1) * LAYOUT.width)
            x = hidden[row, token]
            activation = torch.nn.functional.silu(experts.gate[own] @ x) * (experts.up[own] @ x)
            expected[row, token] += weights[row, token, expert] * (experts.down[:, own] @ activation)
    error = (output - expected).norm() / expected.norm()
    assert error < 0.02  # bfloat16
    assert (weights > 0).sum() == 2 * 5 * LAYOUT.n_used


def test_even_load_has_the_least_balance_loss(experts: Experts) -> None:
    hidden = torch.randn(4, 500, 32) + 0.5
    router = experts.router - experts.router.mean(1, keepdim=True)
    even = expert_ffn(hidden, experts._replace(router=router * 0.05), LAYOUT, quantised=False)
    router[0] += 0.2
    skewed = expert_ffn(hidden, experts._replace(router=router), LAYOUT, quantised=False)
    assert float(even.balance_loss) == pytest.approx(1.0, abs=0.02)
    assert skewed.balance_loss > 1.2
    assert skewed.load[0] > even.load[0]


def test_every_quantised_name_is_a_weight() -> None:
    assert set(WEIGHT_BITS) <= {"token_embd", *MoeLayer._fields}
