"""The losses against definitions written out, in float64, for LM heads with bias, softcap and temperature."""

import itertools

import pytest
import torch
from torch import Tensor

from etpo.engine.losses import critic_at_tokens, critic_loss, policy_loss, q_of_tokens, stream_kl
from etpo.engine.targets import mix_of, token_stats, token_values
from etpo.kernels import Stream

BETA = 0.3
HEADS = {"plain": (1.0, None), "Gemma's": (1.0, 1.5), "Granite's": (4.0, None), "both": (0.5, 1.5)}
CASES = list(itertools.product(("logits", "residual", "normalised"), HEADS))


def streams_of(head: str, n: int = 5, vocab: int = 11) -> list[Stream]:
    """Policy, critic and reference of one kind of head."""
    temperature, softcap = HEADS[head]
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    return [
        Stream(draw(n, d).requires_grad_(), draw(vocab, d), draw(vocab), None, temperature, softcap)
        for d in (4, 5, 3)
    ]


def logits_of(stream: Stream) -> Tensor:
    assert stream.bias is not None
    z = stream.hidden @ stream.weight.T + stream.bias
    if stream.softcap is not None:
        z = stream.softcap * torch.tanh(z / stream.softcap)
    return z / stream.temperature


@pytest.mark.parametrize(("q_form", "head"), CASES)
def test_the_policys_loss_is_its_kl_to_the_critics_policy(q_form, head):
    policy, critic, reference = streams_of(head)
    log_pi, z_q = logits_of(policy).log_softmax(-1), logits_of(critic).detach()
    u = logits_of(reference).detach() + z_q / BETA if q_form == "logits" else z_q
    want = (log_pi.exp() * (log_pi - u.log_softmax(-1))).sum(-1).mean()
    loss = policy_loss(policy, critic, reference, q_form, BETA)
    torch.testing.assert_close(loss, want, rtol=1e-10, atol=1e-10)
    (got,) = torch.autograd.grad(loss, policy.hidden, retain_graph=True)
    torch.testing.assert_close(got, *torch.autograd.grad(want, policy.hidden), rtol=1e-9, atol=1e-10)
    assert torch.autograd.grad(loss, critic.hidden, allow_unused=True) == (None,)


def test_the_critics_loss_is_a_mean_of_weighted_huber_errors():
    q = torch.tensor([1.0, 0.0, -3.0, 0.5], dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0.0, 0.5, 1.0, 0.5], dtype=torch.float64)
    weight = torch.tensor([1.0, 0.5, 0.25, 1.0], dtype=torch.float64)
    huber = [0.5, 0.125, 2.0 * (4.0 - 1.0), 0.0]  # δ = 2: e²/2 up to 2, then 2·(|e| − 1)
    loss = critic_loss(q, y, 2.0, weight)
    assert loss.item() == pytest.approx((0.5 + 0.5 * 0.125 + 0.25 * 6.0) / 4)
    assert critic_loss(q, y, 2.0).item() == pytest.approx(sum(huber) / 4)
    (grad,) = torch.autograd.grad(loss, q)
    assert grad.tolist() == pytest.approx([0.25, -0.0625, -0.125, 0.0])
    with pytest.raises(ValueError, match=r"expected one shape, got \(4,\) and \(4,\) and \(3,\)"):
        critic_loss(q, y, 2.0, weight[:3])


@pytest.mark.parametrize("head", HEADS)
def test_the_bound_of_an_update_reads_the_heads_own_logits(head):
    before, _, _ = streams_of(head)
    after = before._replace(hidden=before.hidden + 0.1)
    log_p, log_r = (logits_of(s).log_softmax(-1) for s in (before, after))
    want = (log_p.exp() * (log_p - log_r)).sum(-1)
    torch.testing.assert_close(stream_kl(before, after), want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("q_form", "head"), CASES)
def test_what_the_critic_learns_is_what_the_targets_read(q_form, head):
    """Q of the loss is Q of `token_values`, for the same weights."""
    _, critic, reference = streams_of(head)
    tokens = torch.tensor([0, 3, 10, 3, 7])
    v_head = None if q_form == "logits" else torch.linspace(-1, 1, 5, dtype=torch.float64)
    stats = token_stats(None, critic, reference, tokens, mix_of(q_form, BETA))
    values = token_values(stats, v_head, q_form, BETA)
    at_ref = stats.at_r - stats.lse_r if q_form == "normalised" else stats.at_r
    q = q_of_tokens(critic_at_tokens(critic, tokens, q_form), at_ref, v_head, q_form, BETA)
    torch.testing.assert_close(q, values.q, rtol=1e-10, atol=1e-10)
