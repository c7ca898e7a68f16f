"""Training stage 1: each layer's experts learn their dense FFN's output on the teacher's hidden states."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from .config import TrainConfig
from .mixture import Experts, MoeLayer, expert_ffn, experts_of
from .schedule import TimedRun
from .teacher import Teacher
from .training_data import TrainingData

_log = logging.getLogger(__name__)

_LOG_EVERY = 50
_MEDIAN_STRIDE = 31
"""the median of every so manieth token is near enough"""


def layer_loss(hidden: Tensor, target: Tensor, experts: Experts, config: TrainConfig) -> tuple[Tensor, Tensor]:
    """Loss of one layer, and its mean relative squared error without gradient.

    Args:
        hidden: the FFN's input, [b, l, width].
        target: the dense FFN's output, the same shape.
        experts: float32 weights, used unquantised.
        config: weights of the loss's parts.
    """
    ffn = expert_ffn(hidden, experts, config.experts, quantised=False)
    target = target.float()
    square = target.square().sum(-1)
    error = (ffn.output.float() - target).square().sum(-1)
    relative = error / (square + config.error_floor * square.flatten()[::_MEDIAN_STRIDE].median())
    loss = relative.mean() + config.layerwise.first_token_weight * relative[:, 0].mean()
    loss = loss + config.balance_weight * ffn.balance_loss + config.z_weight * ffn.z_loss
    return loss, relative.mean().detach()


def train_layerwise(layers: list[MoeLayer], teacher: Teacher, data: TrainingData, config: TrainConfig) -> None:
    """Train routers and experts of all layers in place, until the time is up."""
    stage = config.layerwise
    loss_of = torch.compile(layer_loss) if config.compiled else layer_loss
    parameters = [weight.requires_grad_(True) for layer in layers for weight in experts_of(layer)]
    optimiser = torch.optim.AdamW(
        parameters, lr=stage.learning_rate, betas=config.adam_betas, weight_decay=0.0, fused=torch.cuda.is_available()
    )
    run = TimedRun(stage.seconds)
    while (progress := run.progress) < 1.0:
        rate = stage.learning_rate * run.rate_factor(stage.warmup_steps, stage.final_rate, progress)
        for group in optimiser.param_groups:
            group["lr"] = rate
        residual = teacher.embed(data.next_batch())
        errors = []
        for i, layer in enumerate(layers):
            residual, ffn_input, ffn_output = teacher.block(residual, i)
            loss, error = loss_of(ffn_input, ffn_output, experts_of(layer), config)
            loss.backward()
            errors.append(error)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        run.finish_step()
        if run.steps % _LOG_EVERY == 0 or run.steps <= 2:
            means = torch.stack(errors)
            _log.info(
                "layer by layer, step %d: relative error mean %.3f, least %.3f, most %.3f; %.0f ms a step",
                run.steps, means.mean(), means.min(), means.max(), run.milliseconds_per_step,
            )  # fmt: skip
    _log.info("layer by layer: %d steps of %d tokens", run.steps, config.rows * config.length)
