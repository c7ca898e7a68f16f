"""The distillation loss and the learning rate."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

import torch
from smolmoe.config import DistilConfig
from smolmoe.distil import DistilHead, token_losses
from smolmoe.schedule import TimedRun


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def test_head_has_the_gradient_of_its_loss() -> None:
    n, width, vocabulary = 12, 16, 40
    hidden, head, teacher_hidden, teacher_head = (
        torch.randn(size, width).bfloat16() for size in (n, vocabulary, n, vocabulary)
    )
    target = torch.randint(vocabulary, (n,))
    settings = DistilConfig(cross_entropy_weight=0.3, head_chunk=5)
    mine = [part.clone().requires_grad_(True) for part in (hidden, head)]
    loss, kl, cross_entropy = DistilHead.apply(*mine, teacher_hidden, teacher_head, target, token_losses, settings)
    (loss * 2).backward()

    plain = [part.float().requires_grad_(True) for part in (hidden, head)]
    logits = plain[0] @ plain[1].t()
    teacher_log = (teacher_hidden.float() @ teacher_head.float().t()).log_softmax(-1)
    expected_kl = torch.nn.functional.kl_div(
        logits.log_softmax(-1), teacher_log, reduction="batchmean", log_target=True
    )
    expected_ce = torch.nn.functional.cross_entropy(logits, target)
    ((expected_kl + 0.3 * expected_ce) * 2).backward()
    assert kl.item() == pytest.approx(expected_kl.item(), rel=0.02)
    assert cross_entropy.item() == pytest.approx(expected_ce.item(), rel=0.02)
    for got, expected in zip(mine, plain, strict=True):
        assert (got.grad.float() - expected.grad).norm() < 0.02 * expected.grad.norm()


def test_learning_rate() -> None:
    run = TimedRun(seconds=1000)
    assert run.progress == 0
    assert run.rate_factor(warmup_steps=10, final=0.2, progress=0.0) == pytest.approx(0.1)
    for _ in range(20):
        run.finish_step()
    assert 0 < run.progress < 0.01
    factors = [run.rate_factor(10, 0.2, progress) for progress in (0.0, 0.5, 1.0)]
    assert factors == pytest.approx([1.0, 0.6, 0.2])
