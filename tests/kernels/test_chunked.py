"""The chunked backend against the reference in float64: every statistic and loss, however a sweep is cut."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from etpo.kernels import (
    Stream,
    VocabStats,
    gather_q,
    kl_from_logits,
    linear_kl,
    linear_logprob,
    logprob_from_logits,
    soft_policy_kl,
    soft_policy_kl_from_logits,
    soft_value,
    soft_value_from_logits,
    vocab_stats,
)
from etpo.kernels.chunked import rowwise, sizes
from tests.kernels.problems import (
    MIXTURES,
    TILINGS,
    assert_same,
    gradients,
    leaves,
    mixture,
    stats_and_gradients,
    stream,
    tensor,
    tiling,
)

N, V = 8, 13


def rich_streams() -> list:
    return [
        stream(N, V, 3, bias=True, lora=True, temperature=0.7, softcap=2.0),
        stream(N, V, 2, bias=True, softcap=3.0),
        stream(N, V, 5, lora=True, temperature=1.3),
    ]


@pytest.mark.parametrize("cut", TILINGS)
@pytest.mark.parametrize("field", VocabStats._fields)
def test_each_statistic_alone(field, cut):
    torch.manual_seed(1)
    streams, targets = rich_streams(), torch.randint(0, V, (N,))
    targets[3] = -100
    cotangents = {field: torch.randn(N, dtype=torch.float64)}
    want = stats_and_gradients(streams, cotangents, targets=targets, mix=(0.6, 2.0), backend="reference")
    with tiling(cut):
        got = stats_and_gradients(streams, cotangents, targets=targets, mix=(0.6, 2.0), backend="chunked")
    assert got[0].keys() == want[0].keys()
    assert_same(list(got[0].values()), list(want[0].values()))
    assert_same(got[1], want[1])


@given(
    seed=st.integers(0, 2**20),
    n=st.integers(0, 7),
    v=st.integers(1, 12),
    cut=st.sampled_from(sorted(TILINGS)),
    **MIXTURES,
)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_mixtures_of_statistics(seed, n, v, cut, there, mix, share, rich):
    torch.manual_seed(seed)
    streams, targets = mixture(n, v, 3, there, share, rich)
    stats, _ = (
        stats_and_gradients(streams, {}, targets=targets, mix=mix, backend="reference") if n else ({}, [])
    )
    cotangents = {
        name: torch.randn(n, dtype=torch.float64) * (torch.rand(n) < 0.7)
        for name in stats
        if torch.rand(()) < 0.5
    }
    want = stats_and_gradients(streams, cotangents, targets=targets, mix=mix, backend="reference")
    with tiling(cut):
        got = stats_and_gradients(streams, cotangents, targets=targets, mix=mix, backend="chunked")
    assert_same(list(got[0].values()), list(want[0].values()))
    assert_same(got[1], want[1])


def loss_calls(frozen: bool, shared: bool) -> tuple[dict, list[Tensor]]:
    """Each loss on hidden states as backend -> outputs, and the leaves of all of them."""
    p, q, r = (stream(N, V, 3, bias=True) for _ in range(3))
    if shared:
        r = q._replace(hidden=r.hidden)
    if frozen:
        p, q, r = (s._replace(weight=s.weight.detach(), bias=s.bias.detach()) for s in (p, q, r))
        if shared:
            r = r._replace(weight=q.weight, bias=q.bias)
    targets = torch.randint(0, V, (N,))
    targets[5] = -100
    pair = (p.hidden, p.weight, r.hidden, r.weight)
    critic = (q.hidden, q.weight, r.hidden, r.weight)
    biases = {"q_bias": q.bias, "ref_bias": r.bias}
    calls = {
        "linear_logprob": lambda b: linear_logprob(
            p.hidden, p.weight, targets, bias=p.bias, temperature=0.7, softcap=2.0, backend=b
        ),
        "linear_kl": lambda b: (linear_kl(*pair, bias=p.bias, ref_bias=r.bias, temperature=0.7, backend=b),),
        "soft_value": lambda b: (soft_value(*critic, 0.4, **biases, backend=b),),
        "soft_policy_kl": lambda b: (
            soft_policy_kl(p.hidden, p.weight, *critic, 0.4, bias=p.bias, **biases, backend=b),
        ),
        "gather_q": lambda b: (gather_q(q.hidden, q.weight, targets, bias=q.bias, backend=b),),
    }
    return calls, leaves(p, q, r)


@pytest.mark.parametrize("cut", TILINGS)
@pytest.mark.parametrize("shared", [False, True], ids=["own heads", "one head"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained heads", "frozen heads"])
def test_losses(frozen, shared, cut):
    torch.manual_seed(2)
    calls, inputs = loss_calls(frozen, shared)
    for call in calls.values():
        want = call("reference")
        cotangents = [torch.randn(N, dtype=torch.float64) * (torch.arange(N) != 2) for _ in want]
        want_grads = gradients(want, inputs, cotangents)
        with tiling(cut):
            got = call("chunked")
            assert_same([x.detach() for x in got], [x.detach() for x in want])
            assert_same(gradients(got, inputs, cotangents), want_grads)


@pytest.mark.parametrize("cut", TILINGS)
@pytest.mark.parametrize("inplace", [False, True], ids=["new gradient", "in place"])
def test_losses_from_logits(inplace, cut):
    torch.manual_seed(3)
    roots = [tensor(N, V) for _ in range(3)]
    targets = torch.randint(0, V, (N,))
    targets[0] = -100
    calls = {
        "logprob": lambda z, **kw: logprob_from_logits(z[0], targets, temperature=0.7, **kw),
        "kl": lambda z, **kw: (kl_from_logits(z[0], z[1], temperature=0.7, **kw),),
        "value": lambda z, **kw: (soft_value_from_logits(z[0], z[1], 0.4, **kw),),
        "policy kl": lambda z, **kw: (soft_policy_kl_from_logits(*z, 0.4, **kw),),
    }
    for call in calls.values():
        want = call(roots, backend="reference")
        cotangents = [torch.randn(N, dtype=torch.float64) * (torch.arange(N) != 2) for _ in want]
        want_grads = gradients(want, roots, cotangents)
        with tiling(cut):
            # The logits of a trainer are the output of a product, not leaves.
            got = call([root * 1.0 for root in roots], inplace_backward=inplace, backend="chunked")
            assert_same([x.detach() for x in got], [x.detach() for x in want])
            assert_same(gradients(got, roots, cotangents), want_grads)


def test_gradient_in_place_lies_in_the_memory_of_the_logits():
    root = tensor(N, V)
    logits = root * 1.0
    grads = []
    logits.register_hook(grads.append)
    ref_logits = tensor(N, V).detach()
    kl_from_logits(logits, ref_logits, inplace_backward=True).sum().backward()
    assert grads[0].data_ptr() == logits.data_ptr()
    # A gradient that is kept must not keep the graph of the logits.
    assert not grads[0].requires_grad
    want = kl_from_logits(root, ref_logits, backend="reference")
    assert_same([root.grad], gradients([want], [root], [torch.ones_like(want)]))


@pytest.mark.parametrize("shape", [(N, V), (2, N // 2, V)])
def test_gradient_in_place_leaves_a_leaf_as_it_is(shape):
    logits, ref_logits = tensor(*shape), torch.randn(*shape, dtype=torch.float64)
    before = logits.detach().clone()
    kl_from_logits(logits, ref_logits, inplace_backward=True, backend="chunked").sum().backward()
    assert torch.equal(logits.detach(), before)
    want = kl_from_logits(logits, ref_logits, backend="reference")
    assert_same([logits.grad], gradients([want], [logits], [torch.ones_like(want)]))


def test_gradient_in_place_is_refused_where_two_streams_share_the_logits():
    root = tensor(N, V)
    logits = root * 1.0
    value = soft_value_from_logits(logits, logits, 0.5, inplace_backward=True)
    want = gradients(
        [soft_value_from_logits(root, root, 0.5, backend="reference")], [root], [torch.ones_like(value)]
    )
    assert_same(gradients([value], [root], [torch.ones_like(value)]), want)


def test_a_second_backward_gives_the_same():
    torch.manual_seed(4)
    for frozen in (False, True):
        calls, inputs = loss_calls(frozen, shared=False)
        for call in calls.values():
            outputs = call("chunked")
            total = sum((k + 1) * out.pow(2).sum() for k, out in enumerate(outputs))
            first = torch.autograd.grad(total, inputs, retain_graph=True, allow_unused=True)
            second = torch.autograd.grad(total, inputs, allow_unused=True)
            for one, other in zip(first, second, strict=True):
                assert (one is None) == (other is None)
                assert one is None or torch.equal(one, other)


def test_one_head_for_all_streams_gets_one_gradient():
    """The sum over the three streams, as autograd makes it, from one buffer."""
    torch.manual_seed(5)
    policy = stream(N, V, 3, bias=True, lora=True)
    streams = [policy, policy._replace(hidden=tensor(N, 3)), policy._replace(hidden=tensor(N, 3))]
    cotangents = {
        name: torch.randn(N, dtype=torch.float64) for name in ("lse_u", "e_pr", "at_q", "lse_r", "e_q")
    }
    targets = torch.randint(0, V, (N,))
    want = stats_and_gradients(streams, cotangents, targets=targets, backend="reference")
    with tiling("ragged"):
        got = stats_and_gradients(streams, cotangents, targets=targets, backend="chunked")
    assert len(got[1]) == 7
    assert_same(got[1], want[1])


@pytest.mark.parametrize(
    ("n_rows", "n_vocab", "wanted"),
    [
        (0, 7, 1),
        (5, 7, 5),
        (400, 7, 208),
        (128, 32016, 128),
        (256, 32016, 96),
        (512, 32016, 176),
        (1024, 32016, 352),
        (8192, 32016, 384),
        (1024, 151936, 208),
    ],
)
def test_chunks_are_of_one_size_and_within_the_workspace(n_rows, n_vocab, wanted):
    assert rowwise.chunk_rows(n_rows, n_vocab, 4, "cpu") == wanted


def test_a_vocabulary_larger_than_a_plane_goes_row_by_row():
    assert rowwise.chunk_rows(100, sizes.PLANE_ELEMENTS["cpu"] + 1, 4, "cpu") == 1


def test_a_mean_of_the_critic_near_zero_keeps_its_digits():
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 256, 8), torch.randn(2, 4096, 8) * 8**-0.5
    exact, plain = (
        ((h[0] @ w[0].T).softmax(-1) * (h[1] @ w[1].T)).sum(-1)
        for h, w in ((hidden.double(), weight.double()), (hidden, weight))
    )
    e_q = vocab_stats(*(Stream(*pair) for pair in zip(hidden, weight, strict=True)), backend="chunked").e_q
    assert (e_q - exact).norm() <= 2 * (plain - exact).norm()
