"""Which neurons form an expert."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from smolmoe.clustering import balanced_clusters, expert_neurons
from smolmoe.config import ExpertLayout, UpcycleConfig


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def test_finds_planted_groups() -> None:
    centres = torch.nn.functional.normalize(torch.randn(8, 40), dim=1)
    planted = torch.arange(8).repeat_interleave(12)[torch.randperm(96)]
    features = torch.nn.functional.normalize(centres[planted] + 0.02 * torch.randn(96, 40), dim=1)
    group = balanced_clusters(features, 8, 12, UpcycleConfig())
    assert np.bincount(group).tolist() == [12] * 8
    mixed = sum(len(set(group[planted.numpy() == cluster])) - 1 for cluster in range(8))
    assert mixed <= 2  # the start is random: two centres may fall into one group


def test_experts_hold_every_neuron_and_copies_of_the_strongest() -> None:
    features = torch.nn.functional.normalize(torch.randn(192, 30), dim=1)
    energy = torch.rand(192)
    layout = ExpertLayout(n_expert=8, n_used=2, width=32)
    neurons = expert_neurons(features, energy, layout, UpcycleConfig())
    assert neurons.shape == (8, 32)
    assert neurons[:, :24].flatten().sort().values.tolist() == list(range(192))
    assert all(len(set(row)) == 32 for row in neurons.tolist())
    copies = torch.bincount(neurons[:, 24:].flatten(), minlength=192)
    strongest = torch.zeros(192, dtype=torch.bool)
    strongest[energy.topk(8 * 8 // 4).indices] = True
    assert copies[strongest].float().mean() > 3
    assert copies[~strongest].float().mean() < 0.2
