"""Training stage 3: the figures of the finished model, on held-out text."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .config import WEIGHT_BITS
from .dense import rms_norm
from .distil import Student
from .mixture import Routing, expert_ffn, experts_of, moe_attention, route
from .quantisation import fake_quantise
from .teacher import Teacher

_log = logging.getLogger(__name__)

_ROWS_AT_A_TIME = 16
_ROUTED_ROWS = 8
"""of these, how many are used for the figures about routing"""

Figures = dict[str, dict[str, dict[str, Any]]]


def measure(student: Student, teacher: Teacher, evaluation_sets: dict[str, Tensor]) -> Figures:
    """Compare student and teacher, and describe the student's routing, on each set of windows, int64 [n, l].

    Returns:
        Under "ppl" and the set's name: number of predicted tokens, perplexities of the teacher and of the student
        ("moe"), mean KL divergence, share of tokens on whose likeliest successor both agree. Under "routing" and the
        set's name, lists with one value per layer: see `RoutingCounts.figures`.
    """
    figures: Figures = {"ppl": {}, "routing": {}}
    with torch.no_grad():
        for name, windows in evaluation_sets.items():
            figures["ppl"][name] = agreement = _agreement(student, teacher, windows)
            figures["routing"][name] = _routing(student, windows)
            _log.info(
                "%s: perplexity of the teacher %.3f, of the student %.3f, KL %.4f, same top-1 %.3f",
                name, *(agreement[key] for key in ("teacher", "moe", "kl", "top1_agreement")),
            )  # fmt: skip
    return figures


def _agreement(student: Student, teacher: Teacher, windows: Tensor) -> dict[str, float]:
    sums = torch.zeros(4, device=windows.device, dtype=torch.float64)
    n_token = 0
    for tokens in windows.split(_ROWS_AT_A_TIME):
        teacher_hidden = teacher.hidden(tokens, eager=True)
        output = student.forward(tokens, eager=True)
        for row in range(len(tokens)):
            student_log = (output.hidden[row, :-1] @ output.head.t()).float().log_softmax(-1)
            teacher_log = (teacher_hidden[row, :-1] @ teacher.embedding.t()).float().log_softmax(-1)
            following = tokens[row, 1:, None]
            n_token += len(following)
            sums += torch.stack(
                [
                    -student_log.gather(1, following).sum(),
                    -teacher_log.gather(1, following).sum(),
                    (teacher_log.exp() * (teacher_log - student_log)).sum(),
                    (student_log.argmax(-1) == teacher_log.argmax(-1)).sum(),
                ]
            ).double()
    student_nll, teacher_nll, kl, agreed = (sums / n_token).tolist()
    return {
        "tokens": n_token,
        "teacher": math.exp(teacher_nll),
        "moe": math.exp(student_nll),
        "kl": kl,
        "top1_agreement": agreed,
    }


class RoutingCounts:
    """Sums over pieces of text, one value or row per layer."""

    def __init__(self, n_layer: int, n_expert: int, n_used: int, device: torch.device) -> None:
        self._n_expert = n_expert
        self._n_used = n_used
        self._n_piece = 0
        self._uses = torch.zeros(n_layer, n_expert, device=device)
        self._overlap = torch.zeros(n_layer, device=device)
        self._recall_input = torch.zeros(n_layer, device=device)
        self._recall_residual = torch.zeros(n_layer, device=device)
        self._weights = torch.zeros(n_layer, n_used, device=device)

    def finish_piece(self) -> None:
        """Call after all layers of a piece of text."""
        self._n_piece += 1

    def add_layer(self, layer: int, routing: Routing) -> None:
        """Count one layer's decisions for tokens [b, l]."""
        used = routing.used
        self._uses[layer] += used.sum((0, 1))
        self._overlap[layer] += self._found(used[:, :-1], used[:, 1:])
        self._weights[layer] += routing.weights.topk(self._n_used, -1).values.mean((0, 1))

    def add_prediction(self, layer: int, routing: Routing, from_input: Routing, from_residual: Routing) -> None:
        """Count how many of a layer's experts its router finds from the layer before."""
        self._recall_input[layer] += self._found(from_input.used, routing.used)
        self._recall_residual[layer] += self._found(from_residual.used, routing.used)

    def figures(self) -> dict[str, list[float]]:
        """Lists with one value per layer, the last with one per rank.

        entropy: of the experts' shares of the load, 1 = even; max_share, min_share: an expert's share, 1 = even;
        overlap: share of a token's experts that the token before used, too; recall_prev_input: share of the experts
        that the router finds from the router input of the layer before; recall_prev_residual: the same from the
        residual of the layer before with this layer's norm; mean_sorted_weights: routing weights, largest first.
        """
        share = self._uses / self._uses.sum(1, keepdim=True)
        entropy = -(share * share.clamp_min(1e-12).log()).sum(1) / math.log(self._n_expert)
        n = self._n_piece

        def rounded(values: Tensor, digits: int = 3) -> list[float]:
            return [round(value, digits) for value in values.tolist()]

        return {
            "entropy": rounded(entropy, 4),
            "max_share": rounded(share.max(1).values * self._n_expert),
            "min_share": rounded(share.min(1).values * self._n_expert),
            "overlap": rounded(self._overlap / n),
            "recall_prev_input": rounded(self._recall_input / n),
            "recall_prev_residual": rounded(self._recall_residual / n),
            "mean_sorted_weights": rounded((self._weights / n).mean(0)),
        }

    def _found(self, candidates: Tensor, used: Tensor) -> Tensor:
        return (candidates * used).sum(-1).mean() / self._n_used


def _routing(student: Student, windows: Tensor) -> dict[str, list[float]]:
    model = student.model
    layout = model.layout
    counts = RoutingCounts(model.shape.n_layer, layout.n_expert, layout.n_used, windows.device)
    embedding = fake_quantise(model.embedding, WEIGHT_BITS["token_embd"])
    for tokens in windows.split(_ROWS_AT_A_TIME):
        residual = functional.embedding(tokens[:_ROUTED_ROWS], embedding).float()
        previous: tuple[Tensor, Tensor] | None = None
        for i, layer in enumerate(model.layers):
            middle = residual + moe_attention(residual, layer, student.rope, model.shape)
            hidden = rms_norm(middle, layer.ffn_norm, model.shape.rms_eps)
            routing = route(hidden, layer.ffn_gate_inp, layout.n_used)
            counts.add_layer(i, routing)
            if previous is not None:
                previous_hidden, previous_middle = previous
                renormed = rms_norm(previous_middle, layer.ffn_norm, model.shape.rms_eps)
                from_input = route(previous_hidden, layer.ffn_gate_inp, layout.n_used)
                from_residual = route(renormed, layer.ffn_gate_inp, layout.n_used)
                counts.add_prediction(i, routing, from_input, from_residual)
            previous = hidden, middle
            residual = middle + expert_ffn(hidden, experts_of(layer), layout, quantised=True).output.float()
        counts.finish_piece()
    return counts.figures()
