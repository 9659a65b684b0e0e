"""Edges of the contract: shapes, infinities, masked tokens, ignored rows, NaN."""

import math

import pytest
import torch
from torch import Tensor

from etpo.kernels import (
    Stream,
    gather_q,
    kl_from_logits,
    linear_kl,
    linear_logprob,
    logprob_from_logits,
    soft_policy_kl,
    soft_value,
    vocab_stats,
)
from tests.kernels.problems import (
    TILINGS,
    assert_same,
    gradients,
    leaves,
    present,
    relative_error,
    stats_and_gradients,
    stream,
    tensor,
    tiling,
)

BACKENDS = ["reference", "chunked"]
INF = float("inf")


@pytest.fixture(params=TILINGS)
def cut(request):
    torch.manual_seed(0)
    with tiling(request.param):
        yield request.param


def logit_stream(logits: Tensor, bias: Tensor | None = None) -> Stream:
    """A stream whose logits are the given ones: hidden is the identity, the head their transpose."""
    n = logits.shape[0]
    return Stream(torch.eye(n, dtype=logits.dtype), logits.detach().T.contiguous().requires_grad_(), bias)


@pytest.mark.parametrize("v", [1, 2, 31, 32016, 32017])
def test_any_vocabulary_and_its_tail_never_counts(v):
    torch.manual_seed(v)
    streams = [stream(3, v, 2, dtype=torch.float32) for _ in range(3)]
    targets = torch.tensor([0, v - 1, v // 2])
    exact = [Stream(s.hidden.detach().double(), s.weight.detach().double()) for s in streams]
    want = present(vocab_stats(*exact, targets=targets, backend="reference"))
    got = present(vocab_stats(*streams, targets=targets, backend="chunked"))
    eager = present(vocab_stats(*streams, targets=targets, backend="reference"))
    for name, value in want.items():
        own = float((eager[name].detach().double() - value).abs().max())
        assert float((got[name].detach().double() - value).abs().max()) <= 2 * own + 1e-6


@pytest.mark.parametrize("v", [151936, 262144])
def test_a_large_vocabulary(v):
    torch.manual_seed(v)
    hidden, weight = tensor(2, 1, dtype=torch.float32), tensor(v, 1, dtype=torch.float32)
    logprob, entropy = linear_logprob(hidden, weight, torch.tensor([0, v - 1]))
    exact = (hidden.double() @ weight.double().T).log_softmax(-1)
    torch.testing.assert_close(logprob.double(), exact[[0, 1], [0, v - 1]], rtol=1e-6, atol=0.0)
    torch.testing.assert_close(entropy.double(), -(exact.exp() * exact).sum(-1), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0,), (0, 4), (2, 0)])
def test_no_tokens(shape, backend):
    streams = [
        Stream(torch.zeros(*shape, 3, requires_grad=True), tensor(5, 3, dtype=torch.float32))
        for _ in range(3)
    ]
    targets = torch.zeros(shape, dtype=torch.int64)
    stats = present(vocab_stats(*streams, targets=targets, backend=backend))
    heads = [t for s in streams for t in s[:2]]
    losses = [
        soft_policy_kl(*heads, 0.5, backend=backend),
        linear_kl(*heads[:4], backend=backend),
        soft_value(*heads[:4], 0.5, backend=backend),
        gather_q(*heads[:2], targets, backend=backend),
        kl_from_logits(heads[0], heads[2], backend=backend),
    ]
    for value in [*stats.values(), *losses]:
        assert value.shape == shape
        assert value.dtype == torch.float32
        grads = torch.autograd.grad(value.sum(), heads, allow_unused=True, retain_graph=True)
        for grad, x in zip(grads, heads, strict=True):
            assert grad is None or (grad.shape == x.shape and not grad.any())


@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_and_time_stay(backend):
    torch.manual_seed(0)
    flat = stream(6, 7)
    folded = flat._replace(hidden=flat.hidden.detach().reshape(2, 3, 3).requires_grad_())
    targets = torch.tensor([[0, 1, -100], [3, 4, 6]])
    want = present(vocab_stats(flat, targets=targets.reshape(-1), backend=backend))
    got = present(vocab_stats(folded, targets=targets.int(), backend=backend))
    for name, value in got.items():
        assert value.shape == (2, 3)
        assert torch.equal(value.reshape(-1), want[name])
    one = torch.autograd.grad(want["lse_p"].sum(), flat.hidden)[0]
    two = torch.autograd.grad(got["lse_p"].sum(), folded.hidden)[0]
    assert torch.equal(one, two.reshape(6, 3))


@pytest.mark.parametrize("level", [-1e4, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_far_from_zero(level, dtype, cut):
    """A common level of the logits is a level of lse, and nothing else."""
    n, v = 4, 13
    logits = [torch.randn(n, v, dtype=torch.float64) for _ in range(3)]
    # Multiples of 2^-9 stay exact beside 1e4 in float32, so that the level costs the inputs nothing.
    logits = [(z * 512).round() / 512 for z in logits]
    targets = torch.arange(n)
    plain = [logit_stream(z) for z in logits]
    far = [logit_stream((z + shift).to(dtype)) for z, shift in zip(logits, (level, 0.0, level), strict=True)]
    cotangents = {
        name: torch.randn(n, dtype=torch.float64) for name in ("lse_p", "e_pr", "e_pu", "e_pp", "e_q", "at_p")
    }
    want, want_grads = stats_and_gradients(plain, cotangents, targets=targets, backend="reference")
    cast = {name: g.to(dtype) for name, g in cotangents.items()}
    got, got_grads = stats_and_gradients(far, cast, targets=targets, backend="chunked")
    # Float32 logits get float64 sums, so that a level costs them nothing; float64 logits have no better.
    eps = torch.finfo(dtype).eps * (1.0 if dtype == torch.float32 else abs(level))
    for name in want:
        moved = want[name] + (level if name in ("lse_p", "lse_r", "lse_u", "at_p", "at_r") else 0.0)
        torch.testing.assert_close(got[name].double(), moved, rtol=2 * torch.finfo(dtype).eps, atol=20 * eps)
    for one, other in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(
            one.double(), other, rtol=0.0, atol=20 * eps * float(1 + other.abs().max())
        )
    kl = linear_kl(*far[0][:2], *far[2][:2])
    exact = linear_kl(*plain[0][:2], *plain[2][:2], backend="reference")
    torch.testing.assert_close(kl.double(), exact, rtol=20 * eps, atol=20 * eps)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_hot_and_equal_logits(backend, cut):
    v = 13
    logits = torch.zeros(2, v, dtype=torch.float64)
    logits[0, 4] = 1e4
    item = logit_stream(logits)
    logprob, entropy = linear_logprob(item.hidden, item.weight, torch.tensor([4, 4]), backend=backend)
    torch.testing.assert_close(logprob, torch.tensor([0.0, -math.log(v)], dtype=torch.float64))
    torch.testing.assert_close(entropy, torch.tensor([0.0, math.log(v)], dtype=torch.float64))
    grad = torch.autograd.grad((logprob + entropy).sum(), item.weight)[0].T
    assert not grad[0].any()
    want = -torch.full((v,), 1 / v, dtype=torch.float64)
    want[4] += 1.0
    torch.testing.assert_close(grad[1], want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "alive", [[0, 1, 3, 11, 12], [10, 11, 12]], ids=["a block masked", "two blocks masked"]
)
def test_tokens_masked_in_all_streams_count_for_nothing(alive, backend, cut):
    """Bias −inf on some tokens, whole blocks of them included: as if the vocabulary had no such token."""
    n, v, n_alive = 5, 13, len(alive)
    alive = torch.tensor(alive)
    mask = torch.full((v,), -INF, dtype=torch.float64)
    mask[alive] = torch.randn(n_alive, dtype=torch.float64)
    streams = [stream(n, v)._replace(bias=mask) for _ in range(3)]
    small = [s._replace(weight=s.weight.detach()[alive].requires_grad_(), bias=mask[alive]) for s in streams]
    names = ("lse_p", "lse_q", "lse_r", "lse_u", "e_pr", "e_pu", "e_pp", "e_q", "at_p", "at_q", "at_r")
    cotangents = {name: torch.randn(n, dtype=torch.float64) for name in names}
    targets = torch.tensor([0, 2, 1, 1, 0])
    mix = (1.0, 2.0)
    want, want_grads = stats_and_gradients(small, cotangents, targets=targets, mix=mix, backend="reference")
    got, got_grads = stats_and_gradients(
        streams, cotangents, targets=alive[targets], mix=mix, backend=backend
    )
    assert_same(list(got.values()), list(want.values()))
    for k in range(0, 6, 2):
        assert_same([got_grads[k]], [want_grads[k]])
        assert_same([got_grads[k + 1][alive]], [want_grads[k + 1]])
        dead = torch.ones(v, dtype=torch.bool).index_fill(0, alive, False)
        assert not got_grads[k + 1][dead].any()
    heads = [t for s in streams for t in s[:2]]
    small_heads = [t for s in small for t in s[:2]]
    biases = [{"bias": b, "q_bias": b, "ref_bias": b} for b in (mask, mask[alive])]
    kl = soft_policy_kl(*heads, 0.5, **biases[0], backend=backend)
    want_kl = soft_policy_kl(*small_heads, 0.5, **biases[1], backend="reference")
    assert_same([kl.detach()], [want_kl.detach()])
    g = torch.randn(n, dtype=torch.float64)
    for one, other in zip(gradients([kl], heads, [g]), gradients([want_kl], small_heads, [g]), strict=True):
        assert_same([one[alive] if one.shape[0] == v else one], [other])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_masked_in_the_reference_alone_makes_the_divergence_infinite(backend, cut):
    z_p, z_r = torch.randn(3, 13, dtype=torch.float64), torch.randn(3, 13, dtype=torch.float64)
    z_r[1, 7] = -INF
    z_p.requires_grad_()
    kl = kl_from_logits(z_p, z_r, backend=backend)
    assert torch.isinf(kl).tolist() == [False, True, False]
    assert kl[1] > 0
    # A user who drops that row drops its gradient too.
    grad = torch.autograd.grad(kl[[0, 2]].sum(), z_p)[0]
    assert torch.isfinite(grad).all()
    assert not grad[1].any()


@pytest.mark.parametrize("frozen", [False, True])
def test_an_infinite_divergence_that_the_user_drops_leaves_no_gradient(frozen, cut):
    policy, reference = stream(3, 13), stream(3, 13)
    bias = torch.zeros(13, dtype=torch.float64)
    bias[7] = -INF
    weight = policy.weight.detach() if frozen else policy.weight
    kl = linear_kl(policy.hidden, weight, reference.hidden.detach(), reference.weight.detach(), ref_bias=bias)
    assert torch.isposinf(kl).all()
    inputs = [policy.hidden] if frozen else [policy.hidden, policy.weight]
    for grad in torch.autograd.grad(torch.where(torch.isinf(kl), 0.0, kl).sum(), inputs):
        assert not grad.any()


def test_an_infinite_statistic_that_the_user_drops_spares_the_others_of_its_row(cut):
    """Token 7 is masked in the reference; only row 0 of the policy gives it a probability that is not 0."""
    policy, reference = stream(3, 13, 1), stream(3, 13)
    policy.hidden.data[:, 0] = torch.tensor([0.0, 1.0, 0.5])
    policy.weight.data[7] = -1e4
    bias = torch.zeros(13, dtype=torch.float64)
    bias[7] = -INF
    grads = []
    for backend in ("chunked", "reference"):
        stats = vocab_stats(
            policy, None, reference._replace(bias=bias), targets=torch.arange(3), backend=backend
        )
        assert torch.isposinf(stats.e_pr).tolist() == [True, False, False]
        total = torch.where(torch.isinf(stats.e_pr), 0.0, stats.e_pr).sum() + (stats.at_p - stats.lse_p).sum()
        grads.append(torch.autograd.grad(total, leaves(policy, reference)))
    assert_same(*grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_masked_throughout_has_no_expectation(backend, cut):
    """No token is possible there: log-sum-exp −inf, and NaN for the rest, however the sweep is cut."""
    logits = torch.randn(3, 13, dtype=torch.float64)
    logits[1] = -INF
    logprob, entropy = logprob_from_logits(logits, torch.tensor([0, 1, 12]), backend=backend)
    stats = vocab_stats(stream(3, 13)._replace(bias=logits[1]), backend=backend)
    assert torch.isneginf(stats.lse_p).all()
    assert torch.isnan(stats.e_pp).all()
    for value in (logprob, entropy):
        assert torch.isnan(value).tolist() == [False, True, False]


@pytest.mark.parametrize("backend", BACKENDS)
def test_ignored_rows_are_zero_and_leave_no_gradient_even_when_they_are_not_numbers(backend, cut):
    n, v = 6, 13
    streams = [stream(n, v, bias=True) for _ in range(3)]
    targets = torch.tensor([0, 7, -100, 3, -100, 12])
    real = targets != -100
    clean = [s._replace(hidden=s.hidden.detach()[real].requires_grad_()) for s in streams]
    for s in streams:
        s.hidden.data[~real] = float("nan")
    names = ("lse_u", "e_pr", "e_pu", "e_pp", "e_q", "at_p", "at_q", "lse_r")
    cotangents = {name: torch.randn(n, dtype=torch.float64) for name in names}
    got, got_grads = stats_and_gradients(streams, cotangents, targets=targets, backend=backend)
    few = {name: g[real] for name, g in cotangents.items()}
    want, want_grads = stats_and_gradients(clean, few, targets=targets[real], backend="reference")
    for name, value in got.items():
        assert not value[~real].any()
        assert_same([value[real]], [want[name]])
    for k, (one, other) in enumerate(zip(got_grads, want_grads, strict=True)):
        is_hidden = k % 3 == 0
        assert_same([one[real] if is_hidden else one], [other])
        assert not is_hidden or not one[~real].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("frozen", [False, True])
def test_nan_stays_in_its_row(frozen, backend, cut):
    n, v = 5, 13
    streams = [stream(n, v) for _ in range(3)]
    if frozen:
        streams = [s._replace(weight=s.weight.detach()) for s in streams]
    clean = [s._replace(hidden=s.hidden.detach().clone().requires_grad_()) for s in streams]
    streams[0].hidden.data[2, 0] = float("nan")
    others = [0, 1, 3, 4]
    for run in (
        lambda s, b: present(vocab_stats(*s, targets=torch.arange(n), backend=b)),
        lambda s, b: {"kl": soft_policy_kl(*s[0][:2], *s[1][:2], *s[2][:2], 0.5, backend=b)},
    ):
        got, want = run(streams, backend), run(clean, "reference")
        for name, value in got.items():
            assert_same([value[others].detach()], [want[name][others].detach()])
            reads_policy = name not in ("lse_q", "lse_r", "lse_u", "at_q", "at_r")
            assert bool(torch.isnan(value[2])) is reads_policy
        total, want_total = (sum(value.sum() for value in x.values()) for x in (got, want))
        grad = torch.autograd.grad(total, streams[0].hidden)[0]
        want_grad = torch.autograd.grad(want_total, clean[0].hidden)[0]
        assert torch.isnan(grad[2]).all()
        assert_same([grad[others]], [want_grad[others]])


def test_a_row_without_a_cotangent_leaves_no_gradient_even_when_it_is_not_a_number(cut):
    n, v = 5, 13
    weight_grads = []
    for poison in (0.0, float("nan")):
        torch.manual_seed(1)
        streams = [stream(n, v) for _ in range(3)]
        streams[0].hidden.data[2] += poison
        kl = soft_policy_kl(*streams[0][:2], *streams[1][:2], *streams[2][:2], 0.5)
        logprob, entropy = linear_logprob(*streams[0][:2], torch.arange(n))
        q = gather_q(*streams[0][:2], torch.arange(n))
        keep = torch.arange(n) != 2
        total = (kl[keep] + logprob[keep] * entropy[keep] + q[keep]).sum()
        hidden_grad, weight_grad = torch.autograd.grad(total, streams[0][:2])
        assert not hidden_grad[2].any()
        weight_grads.append(weight_grad)
    assert_same([weight_grads[1]], [weight_grads[0]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_results_are_float32_or_float64_and_gradients_have_their_tensors_dtype(dtype, cut):
    streams = [stream(4, 13, bias=True, lora=True, dtype=dtype) for _ in range(3)]
    exact = [
        Stream(*(t.detach().double() for t in s[:3]), (s.lora[0].double(), s.lora[1].double(), s.lora[2]))
        for s in streams
    ]
    exact = [
        Stream(
            *(t.detach().requires_grad_() for t in s[:3]),
            (*(t.detach().requires_grad_() for t in s.lora[:2]), s.lora[2]),
        )
        for s in exact
    ]
    targets = torch.tensor([0, 5, 12, -100])
    result_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    cotangents = {
        name: torch.randn(4).to(result_dtype) for name in ("lse_p", "e_pr", "e_pu", "e_q", "at_q", "lse_r")
    }
    got, got_grads = stats_and_gradients(streams, cotangents, targets=targets, backend="chunked")
    want, want_grads = stats_and_gradients(
        exact, {name: g.double() for name, g in cotangents.items()}, targets=targets, backend="reference"
    )
    for name, value in got.items():
        assert value.dtype == result_dtype
        torch.testing.assert_close(value.double(), want[name], rtol=2e-6, atol=1e-5)
    for one, x, other in zip(got_grads, leaves(*streams), want_grads, strict=True):
        assert one.dtype == x.dtype
        # Each entry is rounded once to the dtype of its tensor.
        assert relative_error(one, other) <= max(torch.finfo(dtype).eps / 2, 2e-6)
