"""Values and targets against definitions written out, in float64."""

import itertools

import pytest
import torch

from etpo.engine.targets import (
    expected_value,
    mix_of,
    prefix_sums,
    replay_weights,
    retrace_targets,
    token_stats,
    token_values,
    trace_coefficients,
)
from etpo.kernels import Stream

FORMS = ("logits", "residual", "normalised")


def random_streams(seed: int, n: int = 6, vocab: int = 11):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    streams = [Stream(draw(n, d), draw(vocab, d)) for d in (4, 5, 3)]
    return streams, draw(n), torch.randint(0, vocab, (n,), generator=g)


@pytest.mark.parametrize(("q_form", "beta", "seed"), list(itertools.product(FORMS, (0.05, 1.0), (0, 1))))
def test_values_are_their_definitions(q_form, beta, seed):
    (policy, critic, reference), v_head, tokens = random_streams(seed)
    z_p, z_q, z_r = (s.hidden @ s.weight.T for s in (policy, critic, reference))
    log_pi, log_ref = z_p.log_softmax(-1), z_r.log_softmax(-1)
    if q_form == "logits":
        q_NV = z_q
    elif q_form == "residual":
        q_NV = v_head[:, None] + beta * (z_q - z_r)
    else:
        q_NV = v_head[:, None] + beta * (z_q.log_softmax(-1) - log_ref)
    v_soft = beta * (log_ref + q_NV / beta).logsumexp(-1)
    v_expected = (log_pi.exp() * (q_NV - beta * (log_pi - log_ref))).sum(-1)
    logprob_soft = (log_ref + q_NV / beta).log_softmax(-1)

    stats = token_stats(policy, critic, reference, tokens, mix_of(q_form, beta))
    assert stats.policy is not None
    values = token_values(stats, None if q_form == "logits" else v_head, q_form, beta)
    v_policy = expected_value(values.v_soft, stats.policy, beta)
    at = lambda x: x.gather(1, tokens[:, None]).squeeze(1)  # noqa: E731
    for got, want in ((values.q, at(q_NV)), (values.v_soft, v_soft), (v_policy, v_expected),
                      (values.logprob_soft, at(logprob_soft)),
                      (stats.policy.logprob, at(log_pi))):  # fmt: skip
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    assert (v_policy <= values.v_soft + 1e-12).all()


def test_forms_with_a_scalar_head_ask_for_it():
    (policy, critic, reference), _, tokens = random_streams(0)
    stats = token_stats(policy, critic, reference, tokens, mix_of("residual", 1.0))
    with pytest.raises(ValueError, match="scalar head"):
        token_values(stats, None, "residual", 1.0)


def test_one_step_targets_are_reward_plus_discounted_value():
    k = 7
    g = torch.Generator().manual_seed(0)
    reward, v_next, q = (torch.randn(k, generator=g) for _ in range(3))
    discount = torch.tensor([1.0, 1.0, 0.99, 1.0, 0.0, 1.0, 0.9])
    y = retrace_targets(reward, discount, v_next, q, torch.zeros(k), torch.ones(k, dtype=torch.bool))
    torch.testing.assert_close(y, reward + discount * v_next)


def test_a_full_trace_is_the_discounted_return():
    """c = 1 everywhere and a terminal end: y is the sum of the discounted rewards, whatever Q̄ and V̄ are,
    where V̄(x) = Q̄(x, w)."""
    g = torch.Generator().manual_seed(1)
    reward, q = torch.randn(6, generator=g), torch.randn(6, generator=g)
    discount = torch.tensor([1.0, 1.0, 0.9, 1.0, 1.0, 0.0])
    v_next = torch.cat((q[1:], torch.tensor([5.0])))
    goes_on = torch.tensor([True, True, True, True, True, False])
    y = retrace_targets(reward, discount, v_next, q, torch.ones(6), goes_on)
    want, total = [], 0.0
    for r, d in zip(reward.flip(0).tolist(), discount.flip(0).tolist(), strict=True):
        total = r + d * total
        want.insert(0, total)
    torch.testing.assert_close(y, torch.tensor(want))


def test_a_trace_stops_at_the_end_of_a_segment():
    """The second segment's rewards do not reach the first, even when they are infinite."""
    reward = torch.tensor([0.0, 1.0, 0.0, float("inf")])
    discount = torch.tensor([1.0, 0.99, 1.0, 0.0])
    v_next = torch.tensor([0.5, 2.0, 0.5, 0.0])
    goes_on = torch.tensor([True, False, True, False])
    y = retrace_targets(reward, discount, v_next, torch.full((4,), 0.5), torch.ones(4), goes_on)
    assert y[:2].tolist() == pytest.approx([2.98, 2.98])


def test_trace_coefficients_cut_at_one():
    c = trace_coefficients(torch.tensor([-1.0, -3.0, -float("inf")]), torch.tensor([-2.0, -2.0, -2.0]), 0.9)
    torch.testing.assert_close(c, torch.tensor([0.9, 0.9 * torch.e**-1, 0.0]))


def test_a_replayed_actions_weight_is_its_ratio_cut_at_one():
    """−1 + 2 − 3 = −2; +1 is cut; a token never drawn takes its own action's weight alone."""
    mu = torch.tensor([-2.0, -2.0, -4.0, -2.0, -1.0, -1.0])
    ratio = torch.tensor([-1.0, 2.0, -3.0, 1.0, -float("inf"), 5.0])
    weight = replay_weights(mu + ratio, mu, [3, 1, 2])
    torch.testing.assert_close(weight, torch.tensor([torch.e**-2] * 3 + [1.0, 0.0, 0.0]))


def test_shapes_are_checked():
    with pytest.raises(ValueError, match="one length"):
        retrace_targets(*[torch.zeros(3)] * 5, torch.ones(2, dtype=torch.bool))


def test_prefix_sums_start_anew_in_every_action():
    x = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    assert prefix_sums(x, [3, 1, 2]).tolist() == [0.0, 1.0, 3.0, 0.0, 0.0, 16.0]
