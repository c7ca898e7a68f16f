"""Training stage 0: experts, routers and down projections from a dense model, without gradient descent."""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from torch.nn import functional

from .clustering import expert_neurons
from .config import TrainConfig, UpcycleConfig
from .dense import DenseLayer, ModelShape
from .mixture import Experts, MoeLayer, route
from .teacher import Teacher
from .training_data import TrainingData

_log = logging.getLogger(__name__)

_ROWS_AT_A_TIME = 16
_QUANTILE_STRIDE = 97
"""torch.quantile takes a limited number of elements, so it sees every so manieth"""


def upcycle(teacher: Teacher, data: TrainingData, config: TrainConfig) -> list[MoeLayer]:
    """Turn each layer of the teacher into an MoE layer, float32, on hidden states of a sample of rows."""
    numerator, denominator = config.upcycle.generated_share
    n_rows = config.upcycle.calibration_rows
    n_generated = n_rows * numerator // denominator
    tokens = data.calibration_rows(n_generated, n_rows - n_generated)
    layers = []
    with torch.no_grad():
        residual = teacher.embed(tokens)
        for i, dense_layer in enumerate(teacher.dense.layers):
            pieces = [teacher.block(part, i, eager=True) for part in residual.split(_ROWS_AT_A_TIME)]
            residual = torch.cat([piece.residual for piece in pieces])
            inputs = torch.cat([piece.ffn_input.flatten(0, 1) for piece in pieces]).float()
            outputs = torch.cat([piece.ffn_output.flatten(0, 1) for piece in pieces]).float()
            experts = _upcycle_ffn(inputs, outputs, dense_layer, config)
            layers.append(_moe_layer(dense_layer, experts, teacher.dense.shape))
            load = route(inputs, experts.router, config.experts.n_used).used.mean(0)
            load = load * config.experts.n_expert / config.experts.n_used
            _log.info("upcycled layer %d: load %.2f to %.2f of the mean", i, load.min(), load.max())
    return layers


def _moe_layer(layer: DenseLayer, experts: Experts, shape: ModelShape) -> MoeLayer:
    """The dense layer's attention with experts in place of its FFN; copies, because training changes them."""
    q, k, v = layer.attn_qkv.split([shape.q_width, shape.kv_width, shape.kv_width])
    return MoeLayer(
        attn_norm=layer.attn_norm.clone(),
        attn_q=q.clone(),
        attn_k=k.clone(),
        attn_v=v.clone(),
        attn_output=layer.attn_output.clone(),
        ffn_norm=layer.ffn_norm.clone(),
        ffn_gate_inp=experts.router,
        ffn_gate_exps=experts.gate,
        ffn_up_exps=experts.up,
        ffn_down_exps=experts.down,
    )


def _upcycle_ffn(inputs: Tensor, outputs: Tensor, layer: DenseLayer, config: TrainConfig) -> Experts:
    """Experts for one dense FFN.

    Args:
        inputs: the FFN's inputs, float32 [n_token, width].
        outputs: its outputs, the same shape.
        layer: the dense layer, float32.
        config: everything.
    """
    gated, linear = (inputs @ layer.ffn_gate_up.t()).chunk(2, -1)
    activation = functional.silu(gated) * linear
    neurons = _choose_neurons(activation, layer.ffn_down, config)
    router = _fit_router(inputs, activation, layer.ffn_down, neurons, config.upcycle)
    weights = route(inputs, router, config.experts.n_used).weights * config.experts.n_used
    down = _fit_down(activation, outputs, layer.ffn_down, neurons, weights, config)
    gate, up = layer.ffn_gate_up.chunk(2)
    flat = neurons.flatten()
    return Experts(router, gate[flat].clone(), up[flat].clone(), down)


def _choose_neurons(activation: Tensor, down: Tensor, config: TrainConfig) -> Tensor:
    """Neurons that are active together form an expert; int64 [n_expert, expert width]."""
    contribution = activation.abs() * down.norm(dim=0)
    sample = torch.randperm(len(contribution), device=contribution.device)[: config.upcycle.cluster_tokens]
    sampled = contribution[sample]
    features = ((sampled - sampled.mean(0)) / (sampled.std(0) + 1e-6)).t()
    features = features / features.norm(dim=1, keepdim=True)
    ceiling = sampled.flatten()[::_QUANTILE_STRIDE].quantile(config.upcycle.energy_clip_quantile)
    energy = (sampled.clamp(max=ceiling) ** 2).mean(0)
    return expert_neurons(features, energy, config.experts, config.upcycle).to(activation.device)


def _fit_router(inputs: Tensor, activation: Tensor, down: Tensor, neurons: Tensor, config: UpcycleConfig) -> Tensor:
    """Ridge regression from the FFN's input to the log norm of each expert's output; [n_expert, width]."""
    norms = [(activation[:, own] @ down[:, own].t()).norm(dim=-1) for own in neurons]
    energy = torch.stack(norms, 1)
    target = torch.log(energy + 1e-3 * energy.mean())
    target = (target - target.mean(0)) / target.std(0)
    router = torch.linalg.solve(_ridge(inputs, config.router_ridge), inputs.t() @ target)
    logits = inputs @ router
    return (router * (config.router_logit_std / logits.std())).t().contiguous()


def _fit_down(
    activation: Tensor, outputs: Tensor, down: Tensor, neurons: Tensor, weights: Tensor, config: TrainConfig
) -> Tensor:
    """Down projections, [width, n_expert * expert width], for routing weights [n_token, n_expert] that sum to n_used.

    Starts from the dense columns, split among a neuron's copies and scaled as a whole, and adds a least-squares
    correction in which every token counts by its relative error.
    """
    flat = neurons.flatten()
    copies = torch.bincount(flat, minlength=activation.shape[1])[flat].float()
    gated = (activation[:, flat].unflatten(-1, neurons.shape) * weights.unsqueeze(-1)).flatten(-2)
    split = down[:, flat] / copies
    start = gated @ split.t()
    square = outputs.square().sum(-1, keepdim=True)
    token_weight = 1.0 / (square + config.error_floor * square.flatten().median())
    scale = (start * outputs * token_weight).sum() / (start * start * token_weight).sum()

    root = token_weight.sqrt()
    normal = _ridge(gated * root, config.upcycle.down_ridge).double()
    right_side = ((gated * root).t() @ ((outputs - start * scale) * root)).double()
    correction = torch.linalg.solve(normal, right_side).float().t()
    return (split * scale + correction).contiguous()


def _ridge(x: Tensor, share: float) -> Tensor:
    """x^T x with a share of its mean diagonal added to the diagonal."""
    normal = x.t() @ x
    return normal + share * torch.diag(normal).mean() * torch.eye(len(normal), device=x.device)
