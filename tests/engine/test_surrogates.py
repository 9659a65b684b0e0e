"""Surrogate losses by hand, and their gradients where they are clipped."""

import math

import pytest
import torch

from etpo.engine.surrogates import clipped, grpo_loss, k3, leave_one_out, normalised


def test_a_clipped_ratio_gives_no_gradient_past_its_bound() -> None:
    log_ratio = torch.tensor([0.0, 0.5, -0.5, 0.5, -0.5], requires_grad=True)
    advantage = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0])
    loss = clipped(log_ratio, advantage, 0.2, 0.2)
    want = [-1.0, -1.2, -math.exp(-0.5), math.exp(0.5), 0.8]
    assert loss.tolist() == pytest.approx(want)
    (gradient,) = torch.autograd.grad(loss.sum(), log_ratio)
    assert gradient.tolist() == pytest.approx([-1.0, 0.0, -math.exp(-0.5), math.exp(0.5), 0.0])


def test_k3_is_the_kl_on_average_and_never_negative() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(50, generator=generator).double().log_softmax(0) for _ in range(2))
    assert (k3(p, q) >= 0).all()
    assert (p.exp() * k3(p, q)).sum().item() == pytest.approx((p.exp() * (p - q)).sum().item())


def test_leave_one_out_is_each_return_less_the_others_mean() -> None:
    returns = torch.tensor([1.0, 2.0, 6.0])
    assert leave_one_out(returns).tolist() == pytest.approx([1.0 - 4.0, 2.0 - 3.5, 6.0 - 1.5])
    assert leave_one_out(returns[:1]).tolist() == [0.0]


def test_normalised_returns() -> None:
    x = normalised(torch.tensor([1.0, 2.0, 3.0]))
    assert x.tolist() == pytest.approx([-1.0, 0.0, 1.0], abs=2e-4)
    assert normalised(torch.tensor([3.0])).tolist() == [0.0]


@pytest.mark.parametrize(("form", "want"), [
    ("grpo", -(1.0 + (-2.0)) / 2), ("dapo", -(1.0 - 2.0 - 2.0 - 2.0) / 4), ("dr", -(1.0 - 6.0) / (2 * 3)),
    ("gspo", -(1.0 + (-2.0)) / 2),
])  # fmt: skip
def test_forms_of_grpo_average_differently(form, want) -> None:
    """On policy without a KL term every token's loss is −A."""
    logprob = torch.full((4,), -1.0)
    loss = grpo_loss(
        logprob, logprob, logprob, torch.tensor([1.0, -2.0]), [1, 3], form, beta=0.0, low=0.2, high=0.2
    )
    assert loss.item() == pytest.approx(want)


def test_gspo_has_one_ratio_an_action() -> None:
    logprob = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    mu = torch.tensor([-1.1, -2.0, -3.2])
    loss = grpo_loss(logprob, mu, mu, torch.tensor([1.0]), [3], "gspo", beta=0.0, low=0.2, high=0.2)
    ratio = math.exp((0.1 + 0.0 + 0.2) / 3)
    assert loss.item() == pytest.approx(-ratio, rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, logprob)
    assert gradient.tolist() == pytest.approx([-ratio / 3] * 3, rel=1e-5)
