"""One test for each fault seen in public vocabulary kernels, and precision close to a reference."""

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
    soft_policy_kl,
    vocab_stats,
)
from etpo.kernels.chunked import sizes
from tests.kernels.problems import (
    COARSE_TILINGS,
    TILINGS,
    gradients,
    leaves,
    relative_error,
    stream,
    tensor,
    tiling,
)


@pytest.fixture(params=TILINGS)
def cut(request):
    torch.manual_seed(0)
    with tiling(request.param):
        yield request.param


@pytest.fixture(params=COARSE_TILINGS)
def coarse_cut(request):
    torch.manual_seed(0)
    with tiling(request.param):
        yield request.param


def test_the_running_maximum_does_not_start_at_zero(cut):
    """A row that sits at −120 underflows exp in float32 unless its own maximum is taken off."""
    logits = torch.full((3, 13), -120.0) + torch.randn(3, 13)
    targets = torch.tensor([0, 6, 12])
    want = logits.double().log_softmax(-1)[range(3), targets]
    hidden, weight = torch.eye(3), logits.T.contiguous()
    for logprob, entropy in (logprob_from_logits(logits, targets), linear_logprob(hidden, weight, targets)):
        torch.testing.assert_close(logprob.double(), want, rtol=1e-5, atol=1e-5)
        assert torch.isfinite(entropy).all()


def test_the_tail_of_the_vocabulary_adds_nothing(cut):
    """13 entries in blocks of 5 leave a tail of 3; logits far below 0 would show an exp(0) at once."""
    logits = torch.full((2, 13), -30.0)
    stats = vocab_stats(Stream(torch.eye(2), logits.T.contiguous()))
    want = -30.0 + torch.tensor(13.0).log().double()
    torch.testing.assert_close(stats.lse_p.double(), want.expand(2), rtol=1e-6, atol=0.0)


def test_each_token_has_its_own_cotangent(cut):
    policy, reference = stream(8, 13), stream(8, 13)
    heads = [policy.hidden, policy.weight, reference.hidden.detach(), reference.weight.detach()]
    g = torch.randn(8, dtype=torch.float64)
    together = gradients([linear_kl(*heads)], heads[:2], [g])
    alone = [gradients([linear_kl(*heads)], heads[:2], [g * (torch.arange(8) == row)]) for row in range(8)]
    for k in range(2):
        torch.testing.assert_close(together[k], sum(one[k] for one in alone))
    for row, one in enumerate(alone):
        assert one[0][row].any()
        assert not one[0][torch.arange(8) != row].any()


def test_the_entropy_has_a_gradient(cut):
    policy = stream(4, 13)
    _, entropy = linear_logprob(policy.hidden, policy.weight, torch.zeros(4, dtype=torch.int64))
    got = torch.autograd.grad(entropy.sum(), policy[:2])
    log_p = (policy.hidden @ policy.weight.T).log_softmax(-1)
    want = torch.autograd.grad(-(log_p.exp() * log_p).sum(), policy[:2])
    for one, other in zip(got, want, strict=True):
        assert one.any()
        torch.testing.assert_close(one, other)


def test_gradients_of_bf16_tensors_are_summed_in_float32(coarse_cut, monkeypatch):
    """1000 tokens of equal sign: a bf16 running sum stops growing after a few hundred."""
    n, v = 1000, 13
    policy = Stream(*((torch.rand(k, 2) + 0.5).bfloat16().requires_grad_() for k in (n, v)))
    exact = Stream(*(t.detach().double().requires_grad_() for t in policy[:2]))
    targets = torch.zeros(n, dtype=torch.int64)
    got = gradients(linear_logprob(*policy[:2], targets)[:1], policy[:2], [torch.ones(n)])
    log_p = (exact.hidden @ exact.weight.T).log_softmax(-1)
    want = gradients([log_p[:, 0]], exact[:2], [torch.ones(n, dtype=torch.float64)])
    for one, other in zip(got, want, strict=True):
        assert relative_error(one, other) <= torch.finfo(torch.bfloat16).eps / 2
    monkeypatch.setattr(sizes, "GATHER_ELEMENTS", 1)
    got = gradients([gather_q(*policy[:2], targets)], policy[1:2], [torch.ones(n)])
    want = gradients(
        [(exact.hidden * exact.weight[0]).sum(1)], exact[1:2], [torch.ones(n, dtype=torch.float64)]
    )
    assert relative_error(got[0], want[0]) <= torch.finfo(torch.bfloat16).eps / 2


def test_the_low_rank_change_of_a_head_counts(cut):
    policy = stream(4, 13, lora=True)
    a, b, scale = policy.lora
    targets = torch.tensor([0, 3, 7, 12])
    got = gradients(
        linear_logprob(policy.hidden, policy.weight, targets, lora=policy.lora)[:1],
        leaves(policy),
        [torch.ones(4, dtype=torch.float64)],
    )
    log_p = (policy.hidden @ (policy.weight + scale * b @ a).T).log_softmax(-1)
    want = torch.autograd.grad(log_p[range(4), targets].sum(), leaves(policy))
    for one, other in zip(got, want, strict=True):
        assert one.any()
        torch.testing.assert_close(one, other)


def test_a_divergence_of_bf16_logits_is_not_negative(coarse_cut):
    """Log-softmax taken in bf16 is wrong by 1e-2 and more; a KL of 1e-4 then comes out with any sign."""
    hidden = torch.randn(64, 16).bfloat16()
    weight = torch.randn(130, 16).bfloat16()
    near = (weight.float() + 0.02 * torch.randn(130, 16)).bfloat16()
    exact = eager_kl(hidden.double(), weight.double(), hidden.double(), near.double())
    kl = linear_kl(hidden, weight, hidden, near)
    assert (kl >= 0).all()
    assert relative_error(kl, exact) <= 2e-3
    logits, near_logits = (hidden @ w.T for w in (weight, near))
    exact = eager_kl_of(logits.double(), near_logits.double())
    kl = kl_from_logits(logits, near_logits)
    assert (kl >= 0).all()
    assert relative_error(kl, exact) <= 2e-3


def eager_kl(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor) -> Tensor:
    """KL(π‖π̄) as plain PyTorch writes it, in the dtype of the inputs."""
    return eager_kl_of(hidden @ weight.T, ref_hidden @ ref_weight.T)


def eager_kl_of(logits: Tensor, ref_logits: Tensor) -> Tensor:
    log_p, log_r = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    return F.kl_div(log_r, log_p, log_target=True, reduction="none").sum(-1)


def near_pair(distance: float, dtype: torch.dtype) -> list[Tensor]:
    """hidden, weight, ref_hidden, ref_weight with a divergence of about 0.7·distance² nats."""
    n, v, d = 40, 300, 64
    hidden, weight = torch.randn(n, d), torch.randn(v, d) * 3 / d**0.5
    ref_hidden = hidden + 0.3 * distance * torch.randn(n, d)
    ref_weight = weight + 0.3 * distance * torch.randn(v, d) / d**0.5
    return [t.to(dtype).requires_grad_() for t in (hidden, weight, ref_hidden, ref_weight)]


@pytest.mark.parametrize("distance", [0.012, 0.04, 0.12, 0.4, 1.2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_close_to_the_reference_are_exact_to_the_dtype(dtype, distance, coarse_cut):
    """KL from 1e-4 to 1 nat. bf16 inputs: 3e-3, of which about 1.7e-3 is the rounding of the gradient itself.
    Float32 inputs: twice the error of float32 eager.
    """
    inputs = near_pair(distance, dtype)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    weights = torch.rand(40) + 0.5
    want_kl = eager_kl(*exact)
    assert 0.3 * distance**2 < float(want_kl.detach().mean()) < 3 * distance**2
    want = gradients([want_kl], exact, [weights.double()])
    got = gradients([linear_kl(*inputs)], inputs, [weights])
    limits = [3e-3] * 4
    if dtype == torch.float32:
        eager = gradients([eager_kl(*inputs)], inputs, [weights])
        limits = [2 * relative_error(one, other) for one, other in zip(eager, want, strict=True)]
    for one, other, limit in zip(got, want, limits, strict=True):
        assert relative_error(one, other) <= limit


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_close_to_the_optimal_policy_are_exact_to_bf16(frozen, coarse_cut):
    """soft_policy_kl with a critic whose logits the policy has nearly absorbed."""
    hidden, weight, ref_hidden, ref_weight = near_pair(0.012, torch.bfloat16)
    q_hidden, q_weight = (
        t.bfloat16().requires_grad_() for t in (0.1 * torch.randn(40, 8), torch.randn(300, 8))
    )
    heads = [hidden, weight, q_hidden, q_weight, ref_hidden, ref_weight]
    if frozen:
        heads = [t.detach().requires_grad_(k % 2 == 0) for k, t in enumerate(heads)]
    inputs = [t for t in heads if t.requires_grad]
    exact = [t.detach().double().requires_grad_(t.requires_grad) for t in heads]
    z, z_q, z_r = (exact[k] @ exact[k + 1].T for k in (0, 2, 4))
    want_kl = eager_kl_of(z, z_r + z_q / 0.3)
    want = gradients([want_kl], [t for t in exact if t.requires_grad], [torch.ones(40, dtype=torch.float64)])
    got = gradients([soft_policy_kl(*heads, 0.3)], inputs, [torch.ones(40)])
    for one, other in zip(got, want, strict=True):
        assert relative_error(one, other) <= 3e-3


def test_float32_statistics_are_no_worse_than_eager(coarse_cut):
    policy, reference = stream(16, 130, dtype=torch.float32), stream(16, 130, dtype=torch.float32)
    targets = torch.randint(0, 130, (16,))
    exact = [Stream(*(t.detach().double() for t in s[:2])) for s in (policy, reference)]
    names = ("lse_p", "e_pr", "e_pp", "lse_r")
    want = vocab_stats(exact[0], None, exact[1], targets=targets, backend="reference")
    eager = vocab_stats(policy, None, reference, targets=targets, backend="reference")
    got = vocab_stats(policy, None, reference, targets=targets, backend="chunked")
    for name in names:
        limit = 2 * relative_error(getattr(eager, name).detach(), getattr(want, name))
        assert relative_error(getattr(got, name).detach(), getattr(want, name)) <= limit


def test_random_normal_inputs_hide_nothing(cut):
    """Per-token weights, all leaves at once, a tight tolerance: where a uniform draw hides faults."""
    policy = Stream(tensor(16, 3, scale=3.0), tensor(13, 3, scale=3.0))
    g = torch.randn(16, dtype=torch.float64)
    targets = torch.randint(0, 13, (16,))
    logprob, entropy = linear_logprob(*policy[:2], targets)
    log_p = (policy.hidden @ policy.weight.T).log_softmax(-1)
    want = gradients([log_p[range(16), targets], -(log_p.exp() * log_p).sum(-1)], policy[:2], [g, g.flip(0)])
    for one, other in zip(gradients([logprob, entropy], policy[:2], [g, g.flip(0)]), want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)
