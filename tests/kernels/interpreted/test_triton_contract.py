"""Edges of the contract on the Triton backend: sizes, infinities, masked tokens, ignored rows, NaN."""

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
from etpo.kernels.chunked import sizes as chunked_sizes
from etpo.kernels.triton import sizes as triton_config
from etpo.kernels.triton.sizes import Tile
from tests.kernels.interpreted.cases import cutting
from tests.kernels.problems import (
    files_passed,
    gradients,
    leaves,
    present,
    relative_error,
    stats_and_gradients,
    stream,
)

INF = float("inf")
N, V = 5, 75
ALL = ("lse_p", "lse_q", "lse_r", "lse_u", "e_pr", "e_pu", "e_pp", "e_q", "at_p", "at_q", "at_r")


def float32_streams(n: int = N, v: int = V, d: int = 3) -> list[Stream]:
    return [stream(n, v, d, dtype=torch.float32) for _ in range(3)]


def assert_near(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    """Within `tolerance` of the largest number; infinities and NaN in place."""
    finite = torch.isfinite(want)
    size = float(want[finite].abs().max()) if finite.any() else 0.0
    torch.testing.assert_close(
        got.double(), want.double(), rtol=0.0, atol=tolerance * (1 + size), equal_nan=True
    )


@pytest.mark.parametrize("v", [1, 2, 31, 33])
def test_any_small_vocabulary(v, cut):
    streams = float32_streams(3, v)
    targets = torch.tensor([0, v - 1, v // 2])
    cotangents = {name: torch.randn(3) for name in ALL}
    got, got_grads = stats_and_gradients(streams, cotangents, targets=targets, backend="triton")
    want, want_grads = stats_and_gradients(streams, cotangents, targets=targets, backend="reference")
    for name, value in want.items():
        assert_near(got[name], value)
    for one, other in zip(got_grads, want_grads, strict=True):
        assert_near(one, other)


@pytest.mark.parametrize("v", [32017, 262144])
def test_a_large_vocabulary(v, monkeypatch):
    """A ragged end after many blocks; the target sits in the last one."""
    monkeypatch.setattr(triton_config, "INTERPRETED", Tile(16, 8192, 16, 1, 1))
    hidden, weight = torch.randn(2, 1), torch.randn(v, 1)
    exact = (hidden.double() @ weight.double().T).log_softmax(-1)
    targets = torch.tensor([0, v - 1])
    for logprob, entropy in (
        linear_logprob(hidden, weight, targets, backend="triton"),
        logprob_from_logits(hidden @ weight.T, targets, backend="triton"),
    ):
        torch.testing.assert_close(logprob.double(), exact[[0, 1], [0, v - 1]], rtol=1e-6, atol=0.0)
        torch.testing.assert_close(entropy.double(), -(exact.exp() * exact).sum(-1), rtol=1e-6, atol=0.0)


def test_offsets_beyond_int32():
    """The second row of the logits, and of their gradient, lies 2³¹ entries after the first."""
    memory = torch.empty(2**31 + V, dtype=torch.bfloat16)
    far = memory.as_strided((2, V), (2**31, 1))
    logits = torch.randn(2, V).bfloat16()
    far.copy_(logits)
    far.requires_grad_()
    # A leaf would be left as it is.
    logprob, _ = logprob_from_logits(
        far.view_as(far), torch.tensor([0, 1]), inplace_backward=True, backend="triton"
    )
    z = logits.float().requires_grad_()
    want = z.log_softmax(-1)[[0, 1], [0, 1]]
    torch.testing.assert_close(logprob.detach(), want.detach(), rtol=1e-5, atol=1e-5)
    (grad,) = torch.autograd.grad(logprob.sum(), far)
    assert grad.data_ptr() == memory.data_ptr()
    assert grad.stride(0) == 2**31
    assert relative_error(grad, torch.autograd.grad(want.sum(), z)[0]) <= torch.finfo(torch.bfloat16).eps / 2


@pytest.mark.parametrize("shape", [(0,), (0, 4), (2, 0)])
def test_no_tokens(shape):
    streams = [
        Stream(torch.zeros(*shape, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True))
        for _ in range(3)
    ]
    targets = torch.zeros(shape, dtype=torch.int64)
    heads = [t for s in streams for t in s[:2]]
    values = [
        *present(vocab_stats(*streams, targets=targets, backend="triton")).values(),
        soft_policy_kl(*heads, 0.5, backend="triton"),
        linear_kl(*heads[:4], backend="triton"),
        soft_value(*heads[:4], 0.5, backend="triton"),
        gather_q(*heads[:2], targets, backend="triton"),
        kl_from_logits(heads[0], heads[2], backend="triton"),
    ]
    for value in values:
        assert value.shape == shape
        assert value.dtype == torch.float32
        grads = torch.autograd.grad(value.sum(), heads, allow_unused=True, retain_graph=True)
        for grad, x in zip(grads, heads, strict=True):
            assert grad is None or (grad.shape == x.shape and not grad.any())


def test_batch_and_time_stay():
    flat = stream(6, 7, dtype=torch.float32)
    folded = flat._replace(hidden=flat.hidden.detach().reshape(2, 3, 3).requires_grad_())
    targets = torch.tensor([[0, 1, -100], [3, 4, 6]])
    want = present(vocab_stats(flat, targets=targets.reshape(-1), backend="triton"))
    got = present(vocab_stats(folded, targets=targets.int(), backend="triton"))
    for name, value in got.items():
        assert torch.equal(value, want[name].reshape(2, 3))


@pytest.mark.parametrize("level", [-1e4, 1e4])
def test_rows_far_from_zero(level, cut):
    """A common level of the logits is a level of lse, and nothing else."""
    # Multiples of 2^-9 stay exact beside 1e4 in float32, so that the level costs the inputs nothing.
    logits = [(torch.randn(N, V, dtype=torch.float64) * 512).round() / 512 for _ in range(3)]
    levels = (level, 0.0, level)
    eye = torch.eye(N)

    def made(z: Tensor) -> Stream:
        return Stream(eye.to(z.dtype), z.T.contiguous().requires_grad_())

    plain = [made(z) for z in logits]
    far = [made((z + shift).float()) for z, shift in zip(logits, levels, strict=True)]
    targets = torch.arange(N)
    cotangents = {name: torch.randn(N) for name in ("lse_p", "e_pr", "e_pu", "e_pp", "e_q", "at_p")}
    wide = {name: g.double() for name, g in cotangents.items()}
    want, want_grads = stats_and_gradients(plain, wide, targets=targets, backend="reference")
    got, got_grads = stats_and_gradients(far, cotangents, targets=targets, backend="triton")
    eps = torch.finfo(torch.float32).eps
    for name, value in want.items():
        moved = value + (level if name in ("lse_p", "lse_r", "lse_u", "at_p", "at_r") else 0.0)
        torch.testing.assert_close(got[name].double(), moved, rtol=2 * eps, atol=20 * eps)
    for one, other in zip(got_grads, want_grads, strict=True):
        assert_near(one, other, 20 * eps)
    kl = linear_kl(*far[0][:2], *far[2][:2], backend="triton")
    exact = linear_kl(*plain[0][:2], *plain[2][:2], backend="reference")
    torch.testing.assert_close(kl.double(), exact, rtol=20 * eps, atol=20 * eps)


def test_one_hot_and_equal_logits(cut):
    logits = torch.zeros(2, V)
    logits[0, 40] = 1e4
    head = logits.T.contiguous().requires_grad_()
    logprob, entropy = linear_logprob(torch.eye(2), head, torch.tensor([40, 40]), backend="triton")
    torch.testing.assert_close(logprob, torch.tensor([0.0, -math.log(V)]))
    torch.testing.assert_close(entropy, torch.tensor([0.0, math.log(V)]))
    grad = torch.autograd.grad((logprob + entropy).sum(), head)[0].T
    assert not grad[0].any()
    want = -torch.full((V,), 1 / V)
    want[40] += 1.0
    torch.testing.assert_close(grad[1], want)


@pytest.mark.parametrize(
    "alive", [[0, 1, 3, 40, 74], [64, 70, 74]], ids=["a block masked", "two blocks masked"]
)
def test_tokens_masked_in_all_streams_count_for_nothing(alive, cut):
    """Bias −inf on some tokens, whole blocks of them included: as if the vocabulary had no such token."""
    alive = torch.tensor(alive)
    mask = torch.full((V,), -INF)
    mask[alive] = torch.randn(len(alive))
    streams = [s._replace(bias=mask) for s in float32_streams()]
    small = [s._replace(weight=s.weight.detach()[alive].requires_grad_(), bias=mask[alive]) for s in streams]
    cotangents = {name: torch.randn(N) for name in ALL}
    targets = torch.tensor([0, 2, 1, 1, 0])
    want, want_grads = stats_and_gradients(
        small, cotangents, targets=targets, mix=(1.0, 2.0), backend="reference"
    )
    got, got_grads = stats_and_gradients(
        streams, cotangents, targets=alive[targets], mix=(1.0, 2.0), backend="triton"
    )
    for name, value in want.items():
        assert_near(got[name], value)
    dead = torch.ones(V, dtype=torch.bool).index_fill(0, alive, False)
    for k in range(0, 6, 2):
        assert_near(got_grads[k], want_grads[k])
        assert_near(got_grads[k + 1][alive], want_grads[k + 1])
        assert not got_grads[k + 1][dead].any()


def test_a_token_masked_in_the_reference_alone_makes_the_divergence_infinite(cut):
    z_p, z_r = torch.randn(3, V, requires_grad=True), torch.randn(3, V)
    z_r[1, 40] = -INF
    kl = kl_from_logits(z_p, z_r, backend="triton")
    assert torch.isposinf(kl).tolist() == [False, True, False]
    # A user who drops that row drops its gradient too.
    grad = torch.autograd.grad(kl[[0, 2]].sum(), z_p)[0]
    assert torch.isfinite(grad).all()
    assert not grad[1].any()
    policy, reference, _ = float32_streams()
    bias = torch.zeros(V)
    bias[40] = -INF
    kl = linear_kl(*policy[:2], *reference[:2], ref_bias=bias, backend="triton")
    assert torch.isposinf(kl).all()
    for grad in torch.autograd.grad(torch.where(torch.isinf(kl), 0.0, kl).sum(), policy[:2]):
        assert not grad.any()


def test_ignored_rows_are_zero_and_leave_no_gradient_even_when_they_are_not_numbers(cut):
    streams = [stream(6, V, bias=True, lora=True, dtype=torch.float32) for _ in range(3)]
    targets = torch.tensor([0, 7, -100, 3, -100, 12])
    real = targets != -100
    clean = [s._replace(hidden=s.hidden.detach()[real].requires_grad_()) for s in streams]
    for s in streams:
        s.hidden.data[~real] = float("nan")
    names = ("lse_u", "e_pr", "e_pu", "e_pp", "e_q", "at_p", "at_q", "lse_r")
    cotangents = {name: torch.randn(6) for name in names}
    got, got_grads = stats_and_gradients(streams, cotangents, targets=targets, backend="triton")
    few = {name: g[real] for name, g in cotangents.items()}
    want, want_grads = stats_and_gradients(clean, few, targets=targets[real], backend="reference")
    for name, value in got.items():
        assert not value[~real].any()
        assert_near(value[real], want[name])
    hiddens = {id(s.hidden) for s in streams}
    for x, one, other in zip(leaves(*streams), got_grads, want_grads, strict=True):
        is_hidden = id(x) in hiddens
        assert_near(one[real] if is_hidden else one, other)
        assert not is_hidden or not one[~real].any()


def test_nan_stays_in_its_row(cut):
    streams = float32_streams()
    clean = [s._replace(hidden=s.hidden.detach().clone().requires_grad_()) for s in streams]
    streams[0].hidden.data[2, 0] = float("nan")
    others = [0, 1, 3, 4]

    def totals(items: list[Stream], backend: str) -> tuple[dict[str, Tensor], Tensor]:
        stats = present(vocab_stats(*items, targets=torch.arange(N), backend=backend))
        total = sum(value.sum() for value in stats.values())
        return stats, torch.autograd.grad(total, items[0].hidden)[0]

    got, grad = totals(streams, "triton")
    want, want_grad = totals(clean, "reference")
    for name, value in got.items():
        assert_near(value[others].detach(), want[name][others].detach())
        reads_policy = name not in ("lse_q", "lse_r", "lse_u", "at_q", "at_r")
        assert bool(torch.isnan(value[2])) is reads_policy
    assert torch.isnan(grad[2]).all()
    assert_near(grad[others], want_grad[others])


def test_a_row_without_a_cotangent_leaves_no_gradient_even_when_it_is_not_a_number():
    grads = []
    keep = torch.arange(N) != 2
    for poison in (0.0, float("nan")):
        torch.manual_seed(1)
        heads = [t for s in float32_streams() for t in s[:2]]
        heads[0].data[2] += poison
        logprob, entropy = linear_logprob(*heads[:2], torch.arange(N), backend="triton")
        q = gather_q(*heads[:2], torch.arange(N), backend="triton")
        kl = soft_policy_kl(*heads, 0.5, backend="triton")
        total = (kl[keep] + logprob[keep] * entropy[keep] + q[keep]).sum()
        hidden_grad, weight_grad = torch.autograd.grad(total, heads[:2])
        assert not hidden_grad[2].any()
        grads.append(weight_grad)
    assert_near(grads[1], grads[0], 1e-6)


def test_two_runs_are_bitwise_the_same():
    streams = [stream(20, V, 19, dtype=torch.bfloat16) for _ in range(3)]
    cotangents = {name: torch.randn(20) for name in ALL}
    targets = torch.arange(20)
    with cutting("splits"):
        runs = [stats_and_gradients(streams, cotangents, targets=targets, backend="triton") for _ in range(2)]
    assert all(torch.equal(value, runs[1][0][name]) for name, value in runs[0][0].items())
    assert all(torch.equal(one, other) for one, other in zip(runs[0][1], runs[1][1], strict=True))


def test_a_frozen_head_gets_no_gradient_and_a_frozen_stream_no_derivative(monkeypatch):
    """Hidden states alone: one derivative by logits, whole rows at a time, no product for a head.

    In a sweep of registers, which takes what is too large to keep.
    """
    from etpo.kernels import gradients as sums

    policy, critic, reference = float32_streams()
    shapes: list[tuple[int, ...]] = []
    multiply = sums.multiply

    def counted(out: Tensor, a: Tensor, b: Tensor, *, fresh: bool, alpha: float = 1.0) -> None:
        shapes.append(tuple(out.shape))
        multiply(out, a, b, fresh=fresh, alpha=alpha)

    monkeypatch.setattr(sums, "multiply", counted)
    monkeypatch.setattr(chunked_sizes, "HIDDEN_BYTES", 0)
    heads = [policy.hidden, *(t.detach() for t in (policy.weight, *critic[:2], *reference[:2]))]
    got = gradients([soft_policy_kl(*heads, 0.5, backend="triton")], heads[:1], [torch.ones(N)])
    want = gradients([soft_policy_kl(*heads, 0.5, backend="reference")], heads[:1], [torch.ones(N)])
    assert_near(got[0], want[0])
    assert shapes == [(N, 3)]


def test_float64_is_refused():
    hidden, weight = torch.randn(2, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"'triton' takes float32, bfloat16 and float16, got torch\.float64"):
        linear_logprob(hidden, weight, torch.tensor([0, 1]), backend="triton")


def test_a_divergence_and_its_gradient_pass_ten_files():
    """Those of the chunked backend, whose walk over the tokens it is, and three of Triton's."""
    policy, _, reference = float32_streams()
    heads = [*policy[:2], *(t.detach() for t in reference[:2])]
    passed = files_passed(lambda: linear_kl(*heads, backend="triton").sum().backward())
    assert "losses.py" in passed
    assert len(passed) <= 10, passed
