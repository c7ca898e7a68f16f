"""Training stage 2: the whole model, quantised as the file will be, learns the teacher's next-token distribution."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from .config import WEIGHT_BITS, DistilConfig, TrainConfig
from .dense import Rotation, rms_norm
from .mixture import MoeModel, experts_of, moe_block
from .quantisation import fake_quantise
from .schedule import TimedRun
from .teacher import Teacher
from .training_data import TrainingData

_log = logging.getLogger(__name__)

_LOG_EVERY = 100

TokenLosses = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor, Tensor]]


def token_losses(
    student: Tensor, teacher: Tensor, target: Tensor, cross_entropy_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """KL divergence and cross-entropy of each token, and the gradient of their weighted sum.

    Args:
        student: logits, [n, vocabulary].
        teacher: logits, the same shape.
        target: the next tokens, int64 [n].
        cross_entropy_weight: relative to the KL divergence.

    Returns:
        KL [n] and cross-entropy [n], float32; gradient by the student's logits, bfloat16 [n, vocabulary].
    """
    student, teacher = student.float(), teacher.float()
    student_norm = torch.logsumexp(student, -1, keepdim=True)
    teacher_norm = torch.logsumexp(teacher, -1, keepdim=True)
    p_teacher = torch.exp(teacher - teacher_norm)
    p_student = torch.exp(student - student_norm)
    kl = (p_teacher * ((teacher - teacher_norm) - (student - student_norm))).sum(-1)
    cross_entropy = student_norm.squeeze(-1) - student.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    is_target = (torch.arange(student.shape[-1], device=student.device) == target.unsqueeze(-1)).float()
    gradient = (1 + cross_entropy_weight) * p_student - p_teacher - cross_entropy_weight * is_target
    return kl, cross_entropy, gradient.to(torch.bfloat16)


class DistilHead(torch.autograd.Function):
    """Output head, losses and their gradients at once, by chunks of tokens: all logits together would fill the GPU."""

    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        student_head: Tensor,
        teacher_hidden: Tensor,
        teacher_head: Tensor,
        target: Tensor,
        losses: TokenLosses,
        config: DistilConfig,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean KL + weighted cross-entropy, mean KL, mean cross-entropy; only the first has a gradient.

        Hidden states are bfloat16 [n, width], heads bfloat16 [vocabulary, width], target int64 [n].
        """
        n = len(student_hidden)
        hidden_gradient = torch.empty_like(student_hidden)
        head_gradient = torch.zeros(student_head.shape, device=student_head.device)
        kl = torch.zeros((), device=student_hidden.device)
        cross_entropy = torch.zeros((), device=student_hidden.device)
        for start in range(0, n, config.head_chunk):
            part = slice(start, start + config.head_chunk)
            part_kl, part_ce, gradient = losses(
                student_hidden[part] @ student_head.t(),
                teacher_hidden[part] @ teacher_head.t(),
                target[part],
                config.cross_entropy_weight,
            )
            kl += part_kl.sum()
            cross_entropy += part_ce.sum()
            hidden_gradient[part] = gradient @ student_head
            head_gradient += (gradient.t() @ student_hidden[part]).float()
        ctx.save_for_backward(hidden_gradient, head_gradient)
        ctx.n = n
        kl, cross_entropy = kl / n, cross_entropy / n
        ctx.mark_non_differentiable(kl, cross_entropy)
        return kl + config.cross_entropy_weight * cross_entropy, kl, cross_entropy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients by the student's hidden states and head."""
        hidden_gradient, head_gradient = ctx.saved_tensors
        scale = gradients[0] / ctx.n
        return hidden_gradient * scale, (head_gradient * scale).to(torch.bfloat16), None, None, None, None, None


class StudentOutput(NamedTuple):
    """A forward pass of the student."""

    hidden: Tensor
    """what the output head multiplies, bfloat16 [b, l, width]"""
    head: Tensor
    """the quantised embedding, bfloat16 [vocabulary, width]"""
    balance_loss: Tensor
    """summed over layers"""
    z_loss: Tensor
    """summed over layers"""
    load: Tensor
    """share of tokens that use each expert, [n_layer, n_expert]"""


class Student:
    """Runs the MoE model with its quantised weights."""

    def __init__(self, model: MoeModel, rope: Rotation, compiled: bool) -> None:
        self.model = model
        self.rope = rope
        self._block = torch.compile(moe_block) if compiled else moe_block
        self._quantise = torch.compile(fake_quantise) if compiled else fake_quantise

    def forward(self, tokens: Tensor, eager: bool = False) -> StudentOutput:
        """Run int64 tokens [b, l]; `eager` skips the compiled blocks."""
        model = self.model
        block = moe_block if eager else self._block
        head = (fake_quantise if eager else self._quantise)(model.embedding, WEIGHT_BITS["token_embd"])
        residual = functional.embedding(tokens, head).float()
        balance, z, loads = [], [], []
        for layer in model.layers:
            output = block(residual, layer, self.rope, model.shape, model.layout)
            residual = output.output
            balance.append(output.balance_loss)
            z.append(output.z_loss)
            loads.append(output.load)
        hidden = rms_norm(residual, model.output_norm, model.shape.rms_eps).to(torch.bfloat16)
        return StudentOutput(hidden, head, torch.stack(balance).sum(), torch.stack(z).sum(), torch.stack(loads))


def _parameter_groups(model: MoeModel, config: DistilConfig) -> list[dict[str, Any]]:
    """Every weight of the model, with the peak learning rate of its kind under "peak"."""
    experts: list[Tensor] = []
    dense: list[Tensor] = [model.embedding]
    norms: list[Tensor] = [model.output_norm]
    for layer in model.layers:
        experts += experts_of(layer)
        dense += [layer.attn_q, layer.attn_k, layer.attn_v, layer.attn_output]
        norms += [layer.attn_norm, layer.ffn_norm]
    return [
        {"params": experts, "peak": config.expert_rate},
        {"params": dense, "peak": config.dense_rate},
        {"params": norms, "peak": config.norm_rate},
    ]


def distil(student: Student, teacher: Teacher, data: TrainingData, config: TrainConfig) -> None:
    """Train all of the student's weights in place, until the time is up."""
    stage = config.distil
    model = student.model
    losses: TokenLosses = torch.compile(token_losses) if config.compiled else token_losses
    groups = _parameter_groups(model, stage)
    parameters = [weight.requires_grad_(True) for group in groups for weight in group["params"]]
    optimiser = torch.optim.AdamW(
        groups, lr=stage.expert_rate, betas=config.adam_betas, weight_decay=0.0, fused=torch.cuda.is_available()
    )
    run = TimedRun(stage.seconds)
    recent: list[Tensor] = []
    while (progress := run.progress) < 1.0:
        factor = run.rate_factor(stage.warmup_steps, stage.final_rate, progress)
        for group in optimiser.param_groups:
            group["lr"] = group["peak"] * factor
        tokens = data.next_batch()
        output = student.forward(tokens)
        # a row's last target is its own first token: one in a thousand, and weighed by the cross-entropy only
        target = tokens.roll(-1, dims=1)
        loss, kl, cross_entropy = DistilHead.apply(
            output.hidden.flatten(0, 1),
            output.head,
            teacher.hidden(tokens).flatten(0, 1),
            teacher.embedding,
            target.flatten(),
            losses,
            stage,
        )
        (loss + config.balance_weight * output.balance_loss + config.z_weight * output.z_loss).backward()
        gradient = torch.nn.utils.clip_grad_norm_(parameters, stage.gradient_clip, foreach=True)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        run.finish_step()
        balance = output.balance_loss.detach() / model.shape.n_layer
        recent.append(torch.stack([kl, cross_entropy, balance, gradient]))
        if run.steps % _LOG_EVERY == 0 or run.steps <= 2:
            means = torch.stack(recent).mean(0).tolist()
            recent.clear()
            _log.info(
                "end to end, step %d: KL %.4f, cross-entropy %.3f, balance %.3f, gradient %.2f; %.0f ms a step",
                run.steps, *means, run.milliseconds_per_step,
            )  # fmt: skip
    _log.info("end to end: %d steps of %d tokens in %.0f s", run.steps, config.rows * config.length, run.elapsed)
