"""Autocast, checkpointing, no_grad, compiled graphs, unusual strides: the same numbers as without."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from etpo.kernels import (
    Stream,
    gather_q,
    kl_from_logits,
    linear_kl,
    linear_logprob,
    soft_policy_kl,
    soft_value,
    vocab_stats,
)
from etpo.kernels.checks import build_problem
from tests.kernels.problems import (
    OPERATORS,
    TILINGS,
    assert_no_other_derivatives,
    assert_same,
    present,
    stream,
    tiling,
)

N, V = 6, 13


def all_numbers(tensors: list[Tensor], targets: Tensor, frozen: bool = False) -> dict[str, Tensor]:
    """Every kind of sweep once: hidden and weight of policy, critic, reference."""
    h, w, h_q, w_q, h_r, w_r = tensors
    if frozen:
        w, w_q, w_r = w.detach(), w_q.detach(), w_r.detach()
    stats = vocab_stats(Stream(h, w), Stream(h_q, w_q), Stream(h_r, w_r), targets=targets, mix=(1.0, 2.0))
    logprob, entropy = linear_logprob(h, w, targets)
    return present(stats) | {
        "logprob": logprob,
        "entropy": entropy,
        "kl": linear_kl(h, w, h_r, w_r),
        "policy kl": soft_policy_kl(h, w, h_q, w_q, h_r, w_r, 0.5),
        "value": soft_value(h_q, w_q, h_r, w_r, 0.5),
        "q": gather_q(h_q, w_q, targets),
    }


def loss(tensors: list[Tensor], targets: Tensor, frozen: bool = False) -> Tensor:
    numbers = all_numbers(tensors, targets, frozen)
    return sum(((k + 1) * value * value.detach().cos()).sum() for k, value in enumerate(numbers.values()))


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    return [t for _ in range(3) for t in stream(N, V, 3, dtype=torch.float32)[:2]]


@pytest.fixture
def targets():
    return torch.tensor([0, 5, -100, 12, 7, 7])


@pytest.mark.parametrize("frozen", [False, True])
def test_autocast_casts_the_inputs_and_rounds_no_logit(tensors, targets, frozen):
    lora = (torch.randn(2, 3), torch.randn(V, 2))
    low = [t.detach().bfloat16().requires_grad_() for t in tensors]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = all_numbers(tensors, targets, frozen)
        got["lora"] = linear_logprob(*tensors[:2], targets, lora=(*lora, 0.5))[0]
    want = all_numbers(low, targets, frozen)
    want["lora"] = linear_logprob(*low[:2], targets, lora=(lora[0].bfloat16(), lora[1].bfloat16(), 0.5))[0]
    for name, value in got.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, want[name])
        got_grads = torch.autograd.grad(value.sum(), tensors, retain_graph=True, allow_unused=True)
        want_grads = torch.autograd.grad(want[name].sum(), low, retain_graph=True, allow_unused=True)
        for one, other in zip(got_grads, want_grads, strict=True):
            assert (one is None) == (other is None)
            assert one is None or (one.dtype == torch.float32 and torch.equal(one, other.float()))


def test_autocast_casts_a_shared_head_once(tensors):
    """Streams that share a tensor share its cast, so that a head is still read once for all of them."""
    h, w, h_q, _, h_r, _ = tensors
    with torch.autocast("cpu", dtype=torch.bfloat16):
        problem, _ = build_problem(Stream(h, w), Stream(h_q, w), Stream(h_r, w))
    policy, critic, reference = problem.sources
    assert policy.weight.dtype == torch.bfloat16
    assert policy.weight is critic.weight is reference.weight


def test_autocast_leaves_float64_alone(tensors, targets):
    exact = [t.detach().double() for t in tensors]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = all_numbers(exact, targets)
    for name, value in all_numbers(exact, targets).items():
        assert torch.equal(got[name], value)


@pytest.mark.parametrize("cut", TILINGS)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(tensors, targets, frozen, reentrant, cut):
    with tiling(cut):
        inputs = tensors[::2] if frozen else tensors

        def grads_of(total: Tensor) -> list[Tensor]:
            for t in tensors:
                t.grad = None
            total.backward()
            return [t.grad for t in inputs]

        want = grads_of(loss(tensors, targets, frozen))
        got = grads_of(
            checkpoint(lambda *ts: loss(list(ts), targets, frozen), *tensors, use_reentrant=reentrant)
        )
        assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


@pytest.mark.parametrize("cut", TILINGS)
def test_without_gradients_the_numbers_are_the_same(tensors, targets, cut):
    with tiling(cut):
        want = all_numbers(tensors, targets)
        for context in (torch.no_grad(), torch.inference_mode()):
            with context:
                got = all_numbers(tensors, targets)
            for name, value in got.items():
                assert not value.requires_grad
                torch.testing.assert_close(value, want[name].detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("cut", TILINGS)
def test_strides(tensors, targets, cut):
    """Every second row of a larger tensor, transposed memory, an expanded row."""
    apart = torch.zeros(2 * N, 3)
    with torch.no_grad():
        apart[::2] = tensors[0]
    views = [
        apart[::2],
        tensors[1].detach().T.contiguous().T,
        *tensors[2:4],
        tensors[4][:1].expand(N, 3),
        tensors[5],
    ]
    plain = [view.detach().contiguous() for view in views]
    views, plain = ([t.detach().requires_grad_() for t in ts] for ts in (views, plain))
    assert not any(views[k].is_contiguous() for k in (0, 1, 4))
    with tiling(cut):
        got, want = all_numbers(views, targets), all_numbers(plain, targets)
        assert_same([v.detach() for v in got.values()], [v.detach() for v in want.values()], tolerance=2e-6)
        got, want = (torch.autograd.grad(loss(ts, targets), ts) for ts in (views, plain))
        assert_same(got, want, tolerance=2e-6)


@pytest.mark.parametrize("name", OPERATORS)
def test_derivatives_that_an_operator_lacks_are_refused(name, tensors):
    """Second derivatives and forward mode: where they were dropped without a word, a penalty would be 0."""
    assert_no_other_derivatives(OPERATORS[name], tensors[:3], "chunked")


def test_two_runs_are_bitwise_the_same(tensors, targets):
    with tiling("ragged"):
        runs = [torch.autograd.grad(loss(tensors, targets), tensors) for _ in range(2)]
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


@pytest.mark.parametrize("frozen", [False, True])
def test_compiled_graphs_keep_the_sweeps_whole(tensors, targets, frozen):
    """No graph break, fake tensors of the right shapes, the same numbers and gradients."""
    h, w, h_q, w_q = tensors[:4]

    def call(h: Tensor, w: Tensor) -> Tensor:
        head = w.detach() if frozen else w
        logprob, entropy = linear_logprob(h, head, targets)
        kl = linear_kl(h, head, h_q.detach(), w_q.detach())
        q = gather_q(h, head, targets)
        again = kl_from_logits(h @ w.T, (h_q @ w_q.T).detach(), inplace_backward=True)
        return (logprob * entropy + kl * again * q).sum()

    want = call(h, w)
    got = torch.compile(call, fullgraph=True, backend="aot_eager")(h, w)
    torch.testing.assert_close(got, want)
    got_grads, want_grads = (torch.autograd.grad(x, (h, w)) for x in (got, want))
    for one, other in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(one, other)
    torch.compiler.reset()


def test_import_is_light():
    """etpo.kernels imports torch, and nothing that torch alone would not have imported."""
    code = (
        "import sys, torch; before = set(sys.modules); import etpo.kernels; "
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) - set(sys.stdlib_module_names) <= {"etpo", "torch"}
