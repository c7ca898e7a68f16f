"""Which neurons of a dense FFN form which expert."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from .config import ExpertLayout, UpcycleConfig


def balanced_clusters(features: Tensor, n_cluster: int, size: int, config: UpcycleConfig) -> NDArray[np.int64]:
    """Cluster rows of unit length into groups of exactly `size` rows each.

    K-means on the sphere whose assignments are balanced by Sinkhorn's iteration, soft in the first half of the rounds;
    in the end pairs of row and centre are taken greedily, the most similar first.

    Args:
        features: float32 [n, n_feature], n = n_cluster * size.
        n_cluster: number of groups.
        size: rows per group.
        config: rounds and temperature.

    Returns:
        The group of each row, shape [n].
    """
    n = features.shape[0]
    centres = features[torch.randperm(n, device=features.device)[:n_cluster]].clone()
    for round_number in range(config.cluster_rounds):
        share = torch.exp((features @ centres.t() - 1.0) / config.cluster_temperature) + 1e-30
        for _ in range(config.sinkhorn_rounds):
            share = share / share.sum(0, keepdim=True) * (n / n_cluster)
            share = share / share.sum(1, keepdim=True)
        if round_number >= config.cluster_rounds // 2:
            share = functional.one_hot(share.argmax(1), n_cluster).float() + 1e-6
        centres = share.t() @ features
        centres = centres / centres.norm(dim=1, keepdim=True)
    best_pairs = torch.argsort((features @ centres.t()).flatten(), descending=True).tolist()
    group = np.full(n, -1, dtype=np.int64)
    filled = np.zeros(n_cluster, dtype=np.int64)
    for pair in best_pairs:
        row, cluster = divmod(pair, n_cluster)
        if group[row] < 0 and filled[cluster] < size:
            group[row] = cluster
            filled[cluster] += 1
    return group


def expert_neurons(features: Tensor, energy: Tensor, layout: ExpertLayout, config: UpcycleConfig) -> Tensor:
    """Choose the neurons of each expert: a partition of all of them, and copies of the strongest.

    Args:
        features: float32 [ffn_width, n_feature] of unit length; neurons with similar rows belong together.
        energy: float32 [ffn_width], how much each neuron contributes.
        layout: the experts' number and size.
        config: how to cluster, and how many experts get a copy of a strong neuron.

    Returns:
        Neuron numbers, int64 [n_expert, width]: each expert's own, ascending, then the copies.
    """
    own = features.shape[0] // layout.n_expert
    n_copy = layout.width - own
    group = balanced_clusters(features, layout.n_expert, own, config)
    members = [set(np.flatnonzero(group == expert).tolist()) for expert in range(layout.n_expert)]
    copies: list[list[int]] = [[] for _ in range(layout.n_expert)]

    by_energy = torch.argsort(energy, descending=True).tolist()
    strongest = by_energy[: n_copy * layout.n_expert // config.copies_per_neuron]
    turn = 0
    # all neurons once more at the end: a neuron that finds no room leaves a place open
    for neuron in strongest * config.copies_per_neuron + by_energy:
        for step in range(layout.n_expert):
            expert = (turn + step) % layout.n_expert
            has_room = len(copies[expert]) < n_copy
            if has_room and neuron not in members[expert] and neuron not in copies[expert]:
                copies[expert].append(neuron)
                turn = expert + 1
                break
    return torch.tensor([sorted(mine) + extra for mine, extra in zip(members, copies, strict=True)])
