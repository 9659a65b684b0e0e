"""The reference backend: it is what the equations say, and autograd's gradients of it are right."""

import pytest
import torch
from torch import Tensor

from etpo.kernels import (
    Stream,
    gather_q,
    linear_kl,
    linear_logprob,
    soft_policy_kl,
    soft_value,
    vocab_stats,
)
from tests.kernels.problems import leaves, present, stream, tensor

N, V, BETA = 4, 6, 0.3


def logits(item: Stream) -> Tensor:
    """z = cap·tanh((h·Wᵀ + scale·(h·Aᵀ)·Bᵀ + bias)/cap)/T, written down once more."""
    weight = item.weight
    if item.lora is not None:
        weight = weight + item.lora[2] * item.lora[1] @ item.lora[0]
    z = item.hidden @ weight.T + (0.0 if item.bias is None else item.bias)
    if item.softcap is not None:
        z = item.softcap * torch.tanh(z / item.softcap)
    return z / item.temperature


@pytest.fixture
def streams() -> tuple[Stream, Stream, Stream]:
    torch.manual_seed(0)
    return (
        stream(N, V, 3, bias=True, lora=True, temperature=0.7, softcap=2.0),
        stream(N, V, 2, bias=True),
        stream(N, V, 5, temperature=1.3),
    )


def test_every_statistic_is_its_definition(streams):
    targets = torch.tensor([0, 5, 2, 2])
    stats = vocab_stats(*streams, targets=targets, mix=(0.5, 2.0), backend="reference")
    z_p, z_q, z_r = (logits(item) for item in streams)
    u = 0.5 * z_r + 2.0 * z_q
    p = z_p.softmax(-1)
    want = {
        "lse_p": z_p.logsumexp(-1),
        "lse_q": z_q.logsumexp(-1),
        "lse_r": z_r.logsumexp(-1),
        "lse_u": u.logsumexp(-1),
        "e_pr": (p * (z_p - z_r)).sum(-1),
        "e_pu": (p * (z_p - u)).sum(-1),
        "e_pp": (p * z_p.log_softmax(-1)).sum(-1),
        "e_q": (p * z_q).sum(-1),
        "at_p": z_p[range(N), targets],
        "at_q": z_q[range(N), targets],
        "at_r": z_r[range(N), targets],
    }
    got = present(stats)
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_losses_are_their_definitions(streams, backend):
    policy, critic, reference = streams
    policy = policy._replace(lora=None, temperature=1.0, softcap=None)
    reference = reference._replace(temperature=1.0)
    z_p, z_q, z_r = logits(policy), logits(critic), logits(reference)
    heads = (policy.hidden, policy.weight, critic.hidden, critic.weight, reference.hidden, reference.weight)
    p, pi_q = z_p.softmax(-1), (z_r + z_q / BETA).softmax(-1)
    torch.testing.assert_close(
        soft_policy_kl(*heads, BETA, bias=policy.bias, q_bias=critic.bias, backend=backend),
        (p * (p / pi_q).log()).sum(-1),
    )
    torch.testing.assert_close(
        soft_value(*heads[2:], BETA, q_bias=critic.bias, backend=backend),
        BETA * (z_r.softmax(-1) * (z_q / BETA).exp()).sum(-1).log(),
    )
    p_cool, r_cool = (z_p / 0.4).softmax(-1), (z_r / 0.4).softmax(-1)
    torch.testing.assert_close(
        linear_kl(*heads[:2], *heads[4:], bias=policy.bias, temperature=0.4, backend=backend),
        (p_cool * (p_cool / r_cool).log()).sum(-1),
    )
    targets = torch.tensor([1, 0, 5, 3])
    logprob, entropy = linear_logprob(*heads[:2], targets, bias=policy.bias, backend=backend)
    torch.testing.assert_close(logprob, p[range(N), targets].log())
    torch.testing.assert_close(entropy, -(p * p.log()).sum(-1))
    torch.testing.assert_close(
        gather_q(*heads[2:4], targets, bias=critic.bias, backend=backend), z_q[range(N), targets]
    )


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_value_of_a_policy_is_the_soft_value_less_its_distance_to_the_optimum(streams, backend):
    """V_π = E_π[Q] − β·KL(π‖π̄) = V* − β·KL(π‖π_Q)."""
    policy, critic, reference = (s._replace(lora=None, temperature=1.0, softcap=None) for s in streams)
    stats = vocab_stats(policy, critic, reference, backend=backend)
    kl_ref = stats.e_pr - stats.lse_p + stats.lse_r
    v_pi = stats.e_q - BETA * kl_ref
    heads = (policy.hidden, policy.weight, critic.hidden, critic.weight, reference.hidden, reference.weight)
    kl = soft_policy_kl(*heads, BETA, bias=policy.bias, q_bias=critic.bias, backend=backend)
    v_star = soft_value(*heads[2:], BETA, q_bias=critic.bias, backend=backend)
    torch.testing.assert_close(v_pi, v_star - BETA * kl, rtol=1e-12, atol=1e-12)
    assert (v_pi <= v_star + 1e-12).all()


def test_gradients_of_every_statistic(streams):
    inputs = leaves(*streams)
    targets = torch.tensor([0, -100, 2, 5])

    def all_statistics(*tensors: Tensor) -> tuple[Tensor, ...]:
        # The closure reads the leaves themselves; gradcheck perturbs them in place.
        return tuple(
            present(vocab_stats(*streams, targets=targets, mix=(1.0, 2.0), backend="reference")).values()
        )

    assert torch.autograd.gradcheck(all_statistics, inputs)


def test_u_is_there_when_every_stream_that_it_mixes_is():
    policy, critic, reference = stream(N, V), stream(N, V), stream(N, V)
    cases = {
        (None, reference, (1.0, 1.0)): False,
        (None, reference, (1.0, 0.0)): True,
        (critic, None, (1.0, 1.0)): False,
        (critic, None, (0.0, 2.0)): True,
        (critic, reference, (0.0, 0.0)): False,
        (critic, reference, (1.0, 1.0)): True,
    }
    for backend in ("reference", "chunked"):
        for (q, r, mix), there in cases.items():
            stats = vocab_stats(policy, q, r, mix=mix, backend=backend)
            assert (stats.lse_u is not None) is there
            assert (stats.e_pu is not None) is there
            assert (stats.lse_q is None) is (q is None)
            assert stats.at_p is None


def test_temperature_and_softcap_by_hand():
    hidden, weight = tensor(1, 1).detach().fill_(1.0), torch.tensor([[8.0], [-8.0]], dtype=torch.float64)
    for backend in ("reference", "chunked"):
        stats = vocab_stats(
            Stream(hidden, weight, temperature=0.5, softcap=4.0), targets=torch.tensor([0]), backend=backend
        )
        want = torch.tensor([4.0 * torch.tanh(torch.tensor(2.0, dtype=torch.float64)) / 0.5])
        torch.testing.assert_close(stats.at_p, want.double(), rtol=1e-12, atol=0.0)
