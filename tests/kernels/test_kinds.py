"""Kinds of input that once gave wrong numbers, errors of no help or refusals; each on every backend.

`interpreted/test_triton_kinds.py` runs them on Triton, in its interpreter.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor

from etpo.kernels import (
    Stream,
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
from etpo.kernels.checks import build_problem
from tests.kernels.problems import ON_TRITON, present, relative_error

BACKENDS = ("triton",) if ON_TRITON else ("reference", "chunked")
N, V, D, R = 6, 21, 8, 2
INF = float("inf")

Call = Callable[..., list[Tensor]]
# Every function of hidden states: (hidden, weight, targets, bias, lora, backend) -> results.
CALLS: dict[str, Call] = {
    "linear_logprob": lambda h, w, y, b, lora, k: list(linear_logprob(h, w, y, bias=b, lora=lora, backend=k)),
    "linear_kl": lambda h, w, y, b, lora, k: [linear_kl(h, w, h.detach().flip(0), w, bias=b, backend=k)],
    "soft_value": lambda h, w, y, b, lora, k: [soft_value(h, w, h.flip(0), w, 0.5, q_bias=b, backend=k)],
    "soft_policy_kl": lambda h, w, y, b, lora, k: [
        soft_policy_kl(h, w, h.flip(0), w, h.roll(1, 0), w, 0.5, bias=b, backend=k)
    ],
    "gather_q": lambda h, w, y, b, lora, k: [gather_q(h, w, y, bias=b, backend=k)],
    "vocab_stats": lambda h, w, y, b, lora, k: list(
        present(
            vocab_stats(Stream(h, w, b, lora), Stream(h.flip(0), w), Stream(h, w, b), targets=y, backend=k)
        ).values()
    ),
    "logprob_from_logits": lambda h, w, y, b, lora, k: list(logprob_from_logits(h @ w.T, y, backend=k)),
    "kl_from_logits": lambda h, w, y, b, lora, k: [kl_from_logits(h @ w.T, h.flip(0) @ w.T, backend=k)],
    "soft_value_from_logits": lambda h, w, y, b, lora, k: [
        soft_value_from_logits(h @ w.T, h.flip(0) @ w.T, 0.5, backend=k)
    ],
    "soft_policy_kl_from_logits": lambda h, w, y, b, lora, k: [
        soft_policy_kl_from_logits(h @ w.T, h.flip(0) @ w.T, h.roll(1, 0) @ w.T, 0.5, backend=k)
    ],
}


@pytest.fixture
def parts() -> list[Tensor]:
    """hidden, weight, targets, bias, lora A, lora B."""
    torch.manual_seed(0)
    shapes = [(N, D), (V, D), (V,), (R, D), (V, R)]
    hidden, weight, bias, a, b = (torch.randn(*shape, requires_grad=True) for shape in shapes)
    return [hidden, weight, torch.tensor([0, 5, -100, 20, 7, 7]), bias, a, b]


def results(call: Call, parts: list[Tensor], backend: str) -> list[Tensor]:
    """The results of a call and the gradients of its leaves for fixed cotangents."""
    h, w, y, bias, a, b = parts
    outs = call(h, w, y, bias, (a, b, 0.7), backend)
    g = torch.Generator().manual_seed(1)
    total = sum((out * torch.randn(out.shape, generator=g)).sum() for out in outs)
    leaves = [x for x in parts if x.requires_grad]
    grads = torch.autograd.grad(total, leaves, allow_unused=True)
    zeros = [torch.zeros_like(x) if grad is None else grad for x, grad in zip(leaves, grads, strict=True)]
    return [*(out.detach() for out in outs), *zeros]


def assert_near(got: list[Tensor], want: list[Tensor], tolerance: float = 2e-5) -> None:
    for one, other in zip(got, want, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one.double(), other.double(), rtol=tolerance, atol=tolerance)


def strided(x: Tensor) -> Tensor:
    """The same values, every second entry of a larger memory in each dimension."""
    wide = torch.zeros([2 * n for n in x.shape], dtype=x.dtype)
    view = wide[tuple(slice(None, None, 2) for _ in x.shape)]
    view.copy_(x.detach())
    return view.requires_grad_(x.requires_grad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CALLS)
def test_views_are_read_as_what_they_are(name, backend, parts):
    """Targets, hidden states, heads, biases and low-rank parts that are columns of something larger."""
    views = [strided(part) for part in parts]
    assert not any(view.is_contiguous() for view in views)
    assert_near(results(CALLS[name], views, backend), results(CALLS[name], parts, backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_expanded_parts_are_read_as_what_they_are(dtype, backend, parts):
    h, w, _, bias, a, b = parts
    views = [
        h[:1].detach().expand(N, D),
        w,
        torch.tensor(5, dtype=dtype).expand(N),
        bias[:1].detach().expand(V),
        a,
        b,
    ]
    plain = [view.detach().clone().requires_grad_(view.requires_grad) for view in views]
    for name in ("linear_logprob", "gather_q", "vocab_stats"):
        assert_near(results(CALLS[name], views, backend), results(CALLS[name], plain, backend))
    cotangent = torch.tensor(2.0).expand(N)
    got, want = (
        torch.autograd.grad(linear_logprob(h, w, y, backend=backend)[0], h, g)[0]
        for y, g in ((views[2], cotangent), (plain[2], cotangent.clone()))
    )
    assert torch.equal(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["linear_logprob", "linear_kl", "soft_policy_kl", "gather_q", "kl by roles"])
def test_one_tensor_in_two_roles_gets_the_sum_of_both(name, dtype, backend):
    torch.manual_seed(0)
    square = torch.randn(12, D).to(dtype).requires_grad_()
    other, targets, g = torch.randn(12, D).to(dtype), torch.randint(0, 12, (12,)), torch.randn(12)
    calls = {
        "linear_logprob": lambda x, o, k: linear_logprob(x, x, targets, backend=k)[0],
        "linear_kl": lambda x, o, k: linear_kl(x, x, o, o, backend=k),
        "soft_policy_kl": lambda x, o, k: soft_policy_kl(x, o, o, x, x, x, 0.5, backend=k),
        "gather_q": lambda x, o, k: gather_q(x, x, targets, backend=k),
        "kl by roles": lambda x, o, k: linear_kl(o, x, x, o, backend=k),
    }
    call = calls[name]
    (got,) = torch.autograd.grad((call(square, other, backend) * g).sum(), square)
    exact, exact_other = square.detach().double().requires_grad_(), other.double()
    (want,) = torch.autograd.grad((call(exact, exact_other, "reference") * g).sum(), exact)
    assert relative_error(got, want) <= (1e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_forgotten_targets_are_named(backend):
    h, w = torch.randn(N, D), torch.randn(V, D)
    for call in (
        lambda: linear_logprob(h, w, None, backend=backend),
        lambda: gather_q(h, w, None, backend=backend),
        lambda: logprob_from_logits(h @ w.T, None, backend=backend),
    ):
        with pytest.raises(ValueError, match=r"targets: expected .* got None"):
            call()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("made", range(6))
@pytest.mark.parametrize("name", list(CALLS)[:6])
def test_tensors_of_inference_mode_are_inputs_like_others(name, made, backend, parts):
    """One part at a time comes from inference code; the others train."""
    with torch.inference_mode():
        inferred = parts[made].detach().clone()
    plain = [inferred.clone() if k == made else part for k, part in enumerate(parts)]
    mixed = [inferred if k == made else part for k, part in enumerate(parts)]
    assert_near(results(CALLS[name], mixed, backend), results(CALLS[name], plain, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_real_number_is_a_number(backend, parts):
    h, w, y, *_, a, b = (part.detach() for part in parts)
    for kind in (np.float32, np.float64, np.int64, int):
        one = kind(2)
        pairs = [
            (
                soft_value(h, w, h, w, x, backend=backend),
                linear_kl(h, w, h.flip(0), w, temperature=x, backend=backend),
                linear_logprob(h, w, y, softcap=x, lora=(a, b, x), backend=backend)[0],
            )
            for x in (one, 2.0)
        ]
        assert all(torch.equal(got, want) for got, want in zip(*pairs, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("frozen", [False, True])
def test_an_infinite_divergence_gives_no_gradient_and_spares_other_rows(frozen, backend, parts):
    """Token 3 is masked in the reference alone; rows 0 and 1 are all but certain that it does not come."""
    h, w, *_ = parts
    bias = torch.zeros(V)
    bias[3] = -INF
    rows = torch.zeros(V)
    rows[3] = -1e5
    head = w.detach() if frozen else w
    inputs = [h] if frozen else [h, w]
    for masked, infinite in ((None, True), (rows, False)):
        kl = linear_kl(h, head, h.detach().flip(0), w.detach(), bias=masked, ref_bias=bias, backend=backend)
        assert torch.isposinf(kl).all() == infinite
        grads = torch.autograd.grad(kl.sum(), inputs)
        assert all(torch.isfinite(grad).all() for grad in grads)
        assert any(grad.any() for grad in grads) != infinite
    logits = (h @ w.T).detach().requires_grad_()
    kl = kl_from_logits(logits, logits.detach() + bias, backend=backend)
    assert not torch.autograd.grad(kl.sum(), logits)[0].any()
    stats = vocab_stats(Stream(h, w), None, Stream(h.detach(), w.detach(), bias), backend=backend)
    total = sum(x.sum() for x in (stats.e_pr, stats.e_pu) if x is not None)
    assert not torch.autograd.grad(total, h)[0].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("frozen", [False, True])
def test_a_float32_head_beside_bf16_hidden_states_is_not_rounded(frozen, backend, parts):
    h, w, y, *_ = parts
    hidden, weight = h.detach().bfloat16().requires_grad_(), w.detach().requires_grad_(not frozen)
    exact = [hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()]
    calls = (
        lambda x, m, k: linear_logprob(x, m, y, backend=k)[0],
        lambda x, m, k: linear_kl(x, m, x.detach().flip(0), m.detach(), backend=k),
        lambda x, m, k: gather_q(x, m, y, backend=k),
    )
    for call in calls:
        got, want = call(hidden, weight, backend), call(*exact, "reference")
        assert relative_error(got.detach(), want.detach()) <= 1e-5
        inputs = [hidden] if frozen else [hidden, weight]
        grads = torch.autograd.grad(got.sum(), inputs)
        for grad, x, one in zip(
            grads, inputs, torch.autograd.grad(want.sum(), exact[: len(inputs)]), strict=True
        ):
            assert grad.dtype == x.dtype
            assert relative_error(grad, one) <= (4e-3 if x.dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_softcap_leaves_a_masked_token_masked(backend, parts):
    h, w, *_ = parts
    bias = torch.zeros(V)
    bias[[3, 20]] = -INF
    alive = torch.isfinite(bias)
    targets = torch.tensor([0, 5, -100, 19, 7, 7])
    logprob, entropy = linear_logprob(h, w, targets, bias=bias, softcap=2.0, backend=backend)
    few = w.detach()[alive].requires_grad_()
    place = torch.where(targets < 0, -100, targets - (targets > 3).long())
    want = linear_logprob(h, few, place, softcap=2.0, backend="reference")
    assert_near([logprob.detach(), entropy.detach()], [x.detach() for x in want])
    got_grads = torch.autograd.grad((logprob + entropy).sum(), [h, w])
    want_grads = torch.autograd.grad((want[0] + want[1]).sum(), [h, few])
    assert not got_grads[1][~alive].any()
    assert_near([got_grads[0], got_grads[1][alive]], list(want_grads))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", list(CALLS)[:6])
def test_what_is_saved_for_backward_is_not_written_to(name, backend, parts):
    h, w, y, bias, a, b = parts
    for head in (w, w.detach()):
        saved: list[tuple[Tensor, Tensor]] = []

        def keep(x: Tensor, saved: list[tuple[Tensor, Tensor]] = saved) -> Tensor:
            saved.append((x.detach(), x.detach().clone()))
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            outs = CALLS[name](h, head, y, bias.detach(), (a.detach(), b.detach(), 0.7), backend)
        sum(out.sum() for out in outs).backward()
        assert all(torch.equal(x.nan_to_num(), before.nan_to_num()) for x, before in saved)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CALLS)
def test_tensors_without_values_have_results_of_the_right_shape(name, backend, parts):
    """In FakeTensorMode, as whoever plans memory runs a model; with gradients."""
    mode = FakeTensorMode()
    h, w, y, bias, a, b = (mode.from_tensor(part) for part in parts)
    with mode:
        outs = CALLS[name](h, w, y, bias, (a, b, 0.7), backend)
        grads = torch.autograd.grad(sum(out.sum() for out in outs), [h, w])
    assert all(out.shape == (N,) and out.dtype == torch.float32 for out in outs)
    assert [grad.shape for grad in grads] == [(N, D), (V, D)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CALLS)
def test_meta_tensors_have_results_of_the_right_shape(name, backend, parts):
    if backend == "triton":
        pytest.skip("refused: the kernels run where the tensors are")
    h, w, y, bias, a, b = (part.detach().to("meta") for part in parts)
    outs = CALLS[name](h, w, y, bias, (a, b, 0.7), backend)
    assert all(out.shape == (N,) and out.dtype == torch.float32 and out.is_meta for out in outs)


def test_a_distributed_tensor_is_refused_by_name(tmp_path):
    """An operator would see neither the whole tensor nor where its parts lie."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        plain = [torch.randn(N, D), torch.randn(V, D)]
        hidden, weight = (distribute_tensor(x, mesh, [Replicate()]) for x in plain)
        for call, name in (
            (lambda: linear_kl(hidden, plain[1], *plain), "hidden"),
            (lambda: linear_logprob(plain[0], weight, torch.zeros(N, dtype=torch.int64)), "weight"),
            (lambda: kl_from_logits(hidden, plain[0]), "logits"),
        ):
            with pytest.raises(ValueError, match=f"{name}: expected a plain tensor .* got a DTensor"):
                call()
    finally:
        torch.distributed.destroy_process_group()


def test_frozen_views_of_one_head_are_one_head():
    """As `weight.detach()` for each role makes them."""
    w = torch.randn(V, D, requires_grad=True)
    streams = [Stream(torch.randn(N, D), w.detach()) for _ in range(3)]
    problem, _ = build_problem(*streams)
    assert len({id(source.weight) for source in problem.sources}) == 1
    apart, _ = build_problem(streams[0], streams[1]._replace(weight=w.detach().clone()), None)
    assert len({id(source.weight) for source in apart.streams.values()}) == 2
    # One that trains stays itself, for its gradient.
    trained, _ = build_problem(streams[0]._replace(weight=w), streams[1], None)
    assert trained.streams[0].weight is w
