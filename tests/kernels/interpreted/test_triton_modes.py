"""Autocast, checkpointing, compiled graphs, unusual strides and in-place gradients on the Triton backend."""

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from etpo.kernels import (
    Stream,
    backends,
    gather_q,
    kl_from_logits,
    linear_kl,
    linear_logprob,
    logprob_from_logits,
    soft_policy_kl,
    soft_value,
    vocab_stats,
)
from etpo.kernels.checks import Rows, build_problem
from etpo.kernels.operators import flatten
from etpo.kernels.streams import VocabStats
from tests.kernels.problems import OPERATORS, assert_no_other_derivatives, assert_same, present, stream

N, V = 6, 37


@pytest.fixture
def tensors():
    return [t for _ in range(3) for t in stream(N, V, 3, dtype=torch.float32)[:2]]


@pytest.fixture
def targets():
    return torch.tensor([0, 5, -100, 36, 7, 7])


def all_numbers(tensors: list[Tensor], targets: Tensor) -> dict[str, Tensor]:
    """Every kind of kernel once: hidden and weight of policy, critic, reference."""
    h, w, h_q, w_q, h_r, w_r = tensors
    streams = Stream(h, w), Stream(h_q, w_q), Stream(h_r, w_r)
    stats = vocab_stats(*streams, targets=targets, mix=(1.0, 2.0), backend="triton")
    return present(stats) | {
        "value": soft_value(h_q, w_q, h_r, w_r, 0.5, backend="triton"),
        "q": gather_q(h_q, w_q, targets, backend="triton"),
    }


def loss(tensors: list[Tensor], targets: Tensor) -> Tensor:
    numbers = all_numbers(tensors, targets)
    return sum(((k + 1) * value * value.detach().cos()).sum() for k, value in enumerate(numbers.values()))


def test_autocast_casts_the_inputs_and_rounds_no_logit(tensors, targets):
    low = [t.detach().bfloat16().requires_grad_() for t in tensors]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = all_numbers(tensors, targets)
    want = all_numbers(low, targets)
    for name, value in got.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, want[name])
    for name in ("e_pu", "value", "q"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got_grads = torch.autograd.grad(got[name].sum(), tensors, allow_unused=True)
        want_grads = torch.autograd.grad(want[name].sum(), low, allow_unused=True)
        for one, other in zip(got_grads, want_grads, strict=True):
            assert (one is None) == (other is None)
            assert one is None or (one.dtype == torch.float32 and torch.equal(one, other.float()))


@pytest.mark.parametrize("name", ["statistics", "gather", "logits in place"])
def test_derivatives_that_an_operator_lacks_are_refused(name, tensors):
    assert_no_other_derivatives(OPERATORS[name], tensors[:3], "triton")


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(tensors, targets, reentrant):
    def grads_of(total: Tensor) -> list[Tensor]:
        for t in tensors:
            t.grad = None
        total.backward()
        return [t.grad for t in tensors]

    want = grads_of(loss(tensors, targets))
    got = grads_of(checkpoint(lambda *ts: loss(list(ts), targets), *tensors, use_reentrant=reentrant))
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


def test_without_gradients_the_numbers_are_the_same(tensors, targets):
    want = all_numbers(tensors, targets)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            got = all_numbers(tensors, targets)
        for name, value in got.items():
            assert not value.requires_grad
            # With gradients a library makes the logits, without them the kernel that sums them.
            torch.testing.assert_close(value, want[name], rtol=1e-6, atol=1e-6)


def test_strides(tensors, targets):
    """Every second row of a larger tensor, transposed memory, an expanded row."""
    apart = torch.zeros(2 * N, 3)
    apart[::2] = tensors[0].detach()
    views = [apart[::2], tensors[1].detach().T.contiguous().T, *tensors[2:4],
             tensors[4].detach()[:1].expand(N, 3), tensors[5]]  # fmt: skip
    plain = [view.detach().contiguous() for view in views]
    views, plain = ([t.detach().requires_grad_() for t in ts] for ts in (views, plain))
    assert not any(views[k].is_contiguous() for k in (0, 1, 4))
    got, want = all_numbers(views, targets), all_numbers(plain, targets)
    assert_same([v.detach() for v in got.values()], [v.detach() for v in want.values()], tolerance=2e-6)
    got, want = (torch.autograd.grad(loss(ts, targets), ts) for ts in (views, plain))
    assert_same(got, want, tolerance=2e-6)


def test_compiled_graphs_keep_the_operators_whole(tensors, targets):
    """No graph break, fake tensors of the right shapes, the same numbers and gradients."""
    h, w, h_q, w_q = tensors[:4]

    def call(h: Tensor, w: Tensor) -> Tensor:
        logprob, entropy = linear_logprob(h, w, targets, backend="triton")
        kl = linear_kl(h, w, h_q.detach(), w_q.detach(), backend="triton")
        policy_kl = soft_policy_kl(h, w, h_q.detach(), w_q.detach(), h_q, w_q, 0.5, backend="triton")
        q = gather_q(h, w, targets, backend="triton")
        again = kl_from_logits(h @ w.T, (h_q @ w_q.T).detach(), inplace_backward=True, backend="triton")
        return (logprob * entropy + kl * again * q + policy_kl).sum()

    graphs = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch.compile(call, fullgraph=True, backend=keep)(h.detach(), w.detach())
    names = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert sum("etpo.triton_sweep" in name or "etpo.rowwise" in name for name in names) == 4
    assert sum("etpo.triton_gather" in name for name in names) == 1
    want = call(h, w)
    got = torch.compile(call, fullgraph=True, backend="aot_eager")(h, w)
    torch.testing.assert_close(got, want)
    got_grads, want_grads = (torch.autograd.grad(x, (h, w)) for x in (got, want))
    for one, other in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(one, other)
    torch.compiler.reset()


CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


OPERATORS_BY_NAME = {"sweep": backends.TRITON_SWEEP, "gather": backends.TRITON_GATHER}


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("name", OPERATORS_BY_NAME)
def test_the_operators_keep_the_rules_of_torch_library(name, lora):
    streams = [stream(N, V, 3, bias=True, lora=lora, dtype=torch.float32) for _ in range(2)]
    targets = torch.tensor([0, 5, -100, 36, 7, 7])
    problem, _ = build_problem(streams[0], streams[1], None, rows=Rows(targets), mix=(0.0, 1.0))
    tensors, layout, scales = flatten(problem)
    operator, task = OPERATORS_BY_NAME[name], [1]
    if name == "sweep":
        task = [VocabStats._fields.index(field) for field in ("lse_p", "lse_u", "e_pu", "at_p")]
    n_results = len(task)
    args = (tensors, targets, None, layout, scales, task, n_results, False)
    torch.library.opcheck(operator.forward, args, test_utils=(*CHECKS, "test_aot_dispatch_dynamic"))
    made = [value.detach() for value in operator.forward(*args)]
    plain = [t.detach() for t in tensors]
    active = [1, 2] if name == "sweep" else [0]
    g = [torch.randn(N).to(made[0].dtype) for _ in active]
    wanted = list(range(len(plain)))
    backward = (g, active, made, plain, targets, None, layout, scales, task, wanted)
    torch.library.opcheck(operator.backward, backward, test_utils=CHECKS)


def test_logits_that_another_backward_needs_are_not_overwritten_unseen():
    """Autograd refuses, as it does for any operation in place, rather than use the gradient as logits."""
    root = torch.randn(N, V, requires_grad=True)
    logits = root * 1.0
    other = (logits * logits).sum()
    kl = kl_from_logits(logits, torch.randn(N, V), inplace_backward=True, backend="triton")
    torch.autograd.grad(kl.sum(), logits)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(other, root)


@pytest.mark.parametrize("layout", ["expanded", "transposed", "overlapping"])
def test_rows_that_share_memory_get_a_gradient_of_their_own(layout):
    memory = torch.randn(V, N) if layout == "transposed" else torch.randn(N + V)
    views = {
        "expanded": lambda x: x[:V].expand(N, V),
        "transposed": lambda x: x.T,
        "overlapping": lambda x: x.as_strided((N, V), (1, 1)),
    }
    logits = views[layout](memory).detach().requires_grad_()
    before = logits.detach().clone()
    ref_logits = torch.randn(N, V)
    grads = []
    for backend in ("triton", "reference"):
        kl = kl_from_logits(logits, ref_logits, inplace_backward=True, backend=backend)
        grads.append(torch.autograd.grad(kl.sum(), logits)[0])
    assert torch.equal(logits.detach(), before)
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


def test_logits_of_more_than_two_to_the_31_entries():
    """Rows 2³⁰ entries apart: the third begins where 32 bits end. Memory left untouched costs nothing."""
    stride, n_rows = 1 << 30, 3
    logits = torch.empty((n_rows - 1) * stride + V, dtype=torch.float16).as_strided((n_rows, V), (stride, 1))
    rows, targets = torch.randn(n_rows, V).half(), torch.tensor([0, 5, 36])
    logits.copy_(rows)
    far = logprob_from_logits(logits, targets, backend="triton")
    near = logprob_from_logits(rows, targets, backend="triton")
    for one, other in zip(far, near, strict=True):
        assert torch.equal(one, other)
