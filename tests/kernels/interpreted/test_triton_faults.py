"""One test for each fault seen in public vocabulary kernels, on the Triton backend."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from etpo.kernels import (
    Stream,
    gather_q,
    kl_from_logits,
    linear_kl,
    linear_logprob,
    logprob_from_logits,
    vocab_stats,
)
from tests.kernels.interpreted.cases import cutting
from tests.kernels.problems import gradients, leaves, relative_error, stream

V = 75


def test_the_running_maximum_does_not_start_at_zero(cut):
    """A row that sits at −120 underflows exp in float32 unless its own maximum is taken off."""
    logits = torch.full((3, V), -120.0) + torch.randn(3, V)
    targets = torch.tensor([0, 6, V - 1])
    want = logits.double().log_softmax(-1)[range(3), targets]
    hidden, weight = torch.eye(3), logits.T.contiguous()
    for logprob, entropy in (
        logprob_from_logits(logits, targets, backend="triton"),
        linear_logprob(hidden, weight, targets, backend="triton"),
    ):
        torch.testing.assert_close(logprob.double(), want, rtol=1e-5, atol=1e-5)
        assert torch.isfinite(entropy).all()


def test_the_tail_of_the_vocabulary_adds_nothing(cut):
    """75 entries in blocks of 32 leave a tail of 11; logits far below 0 would show an exp(0) at once."""
    logits = torch.full((2, V), -30.0)
    want = -30.0 + torch.tensor(float(V)).log().double()
    head = logits.T.contiguous()
    stats = vocab_stats(Stream(torch.eye(2), head), None, Stream(torch.eye(2), head), backend="triton")
    for value in (stats.lse_p, stats.lse_r):
        torch.testing.assert_close(value.double(), want.expand(2), rtol=1e-6, atol=0.0)
    logprob, _ = logprob_from_logits(logits, torch.tensor([0, 1]), backend="triton")
    torch.testing.assert_close(logprob.double(), -30.0 - want.expand(2), rtol=1e-5, atol=1e-5)


def test_each_token_has_its_own_cotangent():
    policy, reference = stream(4, V, 5, dtype=torch.float32), stream(4, V, 5, dtype=torch.float32)
    heads = [policy.hidden, policy.weight, reference.hidden.detach(), reference.weight.detach()]
    g = torch.randn(4)
    kl = linear_kl(*heads, backend="triton")

    def grads(cotangent: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(kl, heads[:2], cotangent, retain_graph=True)

    together = grads(g)
    alone = [grads(g * (torch.arange(4) == row)) for row in range(4)]
    for k in range(2):
        torch.testing.assert_close(together[k], sum(one[k] for one in alone), rtol=1e-4, atol=1e-5)
    for row, one in enumerate(alone):
        assert one[0][row].any()
        assert not one[0][torch.arange(4) != row].any()


def test_the_entropy_has_a_gradient(cut):
    policy = stream(4, V, 5, dtype=torch.float32)
    _, entropy = linear_logprob(*policy[:2], torch.zeros(4, dtype=torch.int64), backend="triton")
    got = torch.autograd.grad(entropy.sum(), policy[:2])
    log_p = (policy.hidden.double() @ policy.weight.double().T).log_softmax(-1)
    want = torch.autograd.grad(-(log_p.exp() * log_p).sum(), policy[:2])
    for one, other in zip(got, want, strict=True):
        assert relative_error(one, other) <= 1e-5


def test_the_gradient_of_a_bf16_head_is_summed_in_float32():
    """600 tokens of equal sign, 16 at a time: a bf16 running sum stops growing after 256."""
    n, v = 600, 13
    hidden, weight = ((torch.rand(k, 2) + 0.5).bfloat16() for k in (n, v))
    weight.requires_grad_()
    targets = torch.zeros(n, dtype=torch.int64)
    with cutting("pieces"):
        logprob, _ = linear_logprob(hidden, weight, targets, backend="triton")
        got = gradients([logprob], [weight], [torch.ones(n)])[0]
    exact = weight.detach().double().requires_grad_()
    log_p = (hidden.double() @ exact.T).log_softmax(-1)
    want = gradients([log_p[:, 0]], [exact], [torch.ones(n, dtype=torch.float64)])[0]
    assert relative_error(got, want) <= torch.finfo(torch.bfloat16).eps / 2


def test_a_token_that_repeats_sums_its_gradient_in_float32():
    n = 500
    hidden, weight = ((torch.rand(k, 4) + 0.5).bfloat16().requires_grad_() for k in (n, 13))
    targets = torch.zeros(n, dtype=torch.int64)
    targets[::7] = -100
    got = gradients([gather_q(hidden, weight, targets, backend="triton")], [weight], [torch.ones(n)])[0]
    want = hidden.detach().double()[targets == 0].sum(0)
    assert float((got[0] - want).norm() / want.norm()) <= torch.finfo(torch.bfloat16).eps / 2
    assert not got[1:].any()


@pytest.mark.parametrize("heads", ["trained", "frozen"])
def test_the_low_rank_change_of_a_head_counts(heads, cut):
    policy = stream(4, V, 5, lora=True, dtype=torch.float32)
    if heads == "frozen":
        policy = policy._replace(weight=policy.weight.detach())
    targets = torch.tensor([0, 3, 40, V - 1])
    logprob, _ = linear_logprob(*policy[:2], targets, lora=policy.lora, backend="triton")
    got = gradients([logprob], leaves(policy), [torch.ones(4)])
    a, b, scale = policy.lora
    weight = policy.weight.double() + scale * b.double() @ a.double()
    log_p = (policy.hidden.double() @ weight.T).log_softmax(-1)
    want = torch.autograd.grad(log_p[range(4), targets].sum(), leaves(policy))
    for one, other in zip(got, want, strict=True):
        assert relative_error(one, other) <= 1e-5


def test_a_divergence_of_bf16_logits_is_not_negative():
    """Log-softmax taken in bf16 is wrong by 1e-2 and more; a KL of 1e-4 then comes out with any sign."""
    hidden, weight = torch.randn(32, 16).bfloat16(), torch.randn(130, 16).bfloat16()
    near = (weight.float() + 0.02 * torch.randn(130, 16)).bfloat16()
    exact = eager_kl(*(hidden.double() @ w.double().T for w in (weight, near)))
    kl = linear_kl(hidden, weight, hidden, near, backend="triton")
    assert (kl >= 0).all()
    assert relative_error(kl, exact) <= 2e-3
    logits, near_logits = (hidden @ w.T for w in (weight, near))
    kl = kl_from_logits(logits, near_logits, backend="triton")
    assert (kl >= 0).all()
    assert relative_error(kl, eager_kl(logits.double(), near_logits.double())) <= 2e-3


def eager_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """KL(π‖π̄) as plain PyTorch writes it, in the dtype of the logits."""
    log_p, log_r = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    return F.kl_div(log_r, log_p, log_target=True, reduction="none").sum(-1)


@pytest.mark.parametrize(
    ("distance", "dtype"), [(0.012, torch.bfloat16), (0.4, torch.bfloat16), (0.012, torch.float32)]
)
def test_gradients_close_to_the_reference_are_exact_to_the_dtype(distance, dtype):
    """KL about 1e-4 and 0.1 nat. bf16: within 3e-3 of float64 on the same inputs; float32: twice eager."""
    n, v, d = 32, 160, 64
    hidden, weight = torch.randn(n, d), torch.randn(v, d) * 3 / d**0.5
    ref_hidden = hidden + 0.3 * distance * torch.randn(n, d)
    ref_weight = weight + 0.3 * distance * torch.randn(v, d) / d**0.5
    inputs = [t.to(dtype).requires_grad_() for t in (hidden, weight, ref_hidden, ref_weight)]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    g = torch.rand(n) + 0.5
    want_kl = eager_kl(exact[0] @ exact[1].T, exact[2] @ exact[3].T)
    assert 0.3 * distance**2 < float(want_kl.detach().mean()) < 3 * distance**2
    want = gradients([want_kl], exact, [g.double()])
    got = gradients([linear_kl(*inputs, backend="triton")], inputs, [g])
    limits = [3e-3] * 4
    if dtype == torch.float32:
        eager = gradients([eager_kl(inputs[0] @ inputs[1].T, inputs[2] @ inputs[3].T)], inputs, [g])
        limits = [2 * relative_error(one, other) for one, other in zip(eager, want, strict=True)]
    for one, other, limit in zip(got, want, limits, strict=True):
        assert relative_error(one, other) <= limit
