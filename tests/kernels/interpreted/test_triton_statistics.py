"""The Triton backend against float64: every statistic, loss and gradient, however a sweep is cut."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from etpo.kernels import (
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
)
from tests.kernels.interpreted.cases import CUTS, as_float64, check, check_losses, cutting
from tests.kernels.problems import MIXTURES, gradients, mixture, relative_error, stream, tensor

N, V = 20, 75


def rich_streams(dtype: torch.dtype = torch.float32) -> list:
    return [
        stream(N, V, 19, bias=True, lora=True, temperature=0.7, softcap=2.0, dtype=dtype),
        stream(N, V, 24, bias=True, softcap=3.0, dtype=dtype),
        stream(N, V, 5, lora=True, temperature=1.3, dtype=dtype),
    ]


def some_targets() -> torch.Tensor:
    targets = torch.randint(0, V, (N,))
    targets[3] = -100
    return targets


@pytest.mark.parametrize("field", VocabStats._fields)
def test_each_statistic_alone(field):
    name = list(CUTS)[VocabStats._fields.index(field) % 3]
    with cutting(name):
        check(rich_streams(), {field: torch.randn(N)}, targets=some_targets(), mix=(0.6, 2.0))


@pytest.mark.parametrize(
    ("dtype", "cut"),
    [
        (torch.float32, "whole"),
        (torch.float32, "splits"),
        (torch.float32, "pieces"),
        (torch.bfloat16, "pieces"),
        (torch.float16, "splits"),
    ],
)
def test_all_statistics_together(dtype, cut):
    cotangents = {field: torch.randn(N) for field in VocabStats._fields}
    with cutting(cut):
        check(rich_streams(dtype), cotangents, targets=some_targets(), mix=(0.6, 2.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensor_descriptors(dtype):
    """Rows of a multiple of 16 bytes and a ragged end in every direction: the descriptors are really used."""
    streams = [stream(N, V, d, dtype=dtype, bias=True) for d in (24, 40, 8)]
    with cutting("maps"):
        check(streams, {field: torch.randn(N) for field in VocabStats._fields}, targets=some_targets())


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_float32_stream_beside_bf16_keeps_its_precision(order):
    inputs = [t for dtype in (torch.bfloat16, torch.float32) for t in stream(N, V, 8, dtype=dtype)[:2]]
    limits = [4e-3, 4e-3, 1e-6, 1e-6]

    def kl(tensors, backend):
        first, second = (tensors[2 * k : 2 * k + 2] for k in order)
        return [linear_kl(*first, *second, backend=backend)]

    wide = [as_float64(t) for t in inputs]
    got = gradients(kl(inputs, "triton"), inputs, [torch.ones(N)])
    want = gradients(kl(wide, "reference"), wide, [torch.ones(N, dtype=torch.float64)])
    for one, other, limit in zip(got, want, limits, strict=True):
        assert relative_error(one, other) <= limit


@pytest.mark.parametrize(
    ("together", "cut"),
    [("pq", "pieces"), ("pr", "splits"), ("qr", "maps"), ("pqr", "whole"), ("pqr", "pieces")],
)
def test_shared_heads(together, cut):
    streams = dict(zip("pqr", (stream(N, V, 24, bias=True) for _ in range(3)), strict=True))
    streams = {k: stream(N, V, 24, bias=True, dtype=torch.float32) for k in streams}
    head = streams[together[0]]
    for k in together[1:]:
        streams[k] = streams[k]._replace(weight=head.weight)
    names = ("lse_u", "e_pr", "e_q", "at_q", "lse_r", "e_pu")
    with cutting(cut):
        check(
            list(streams.values()), {k: torch.randn(N) for k in names}, targets=some_targets(), mix=(1.0, 2.0)
        )


@given(
    seed=st.integers(0, 2**20),
    n=st.integers(1, 18),
    v=st.integers(1, 70),
    cut=st.sampled_from(sorted(CUTS)),
    **MIXTURES,
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
# Shrinking a failure in the interpreter takes minutes.
@settings(
    max_examples=15, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
def test_mixtures_of_statistics(seed, n, v, cut, there, mix, share, rich, dtype):
    torch.manual_seed(seed)
    streams, targets = mixture(n, v, 17, there, share, rich, dtype=dtype)
    names = {"lse_p", "e_pp", "at_p"}
    names |= {"lse_q", "e_q", "at_q"} if there[0] else set()
    names |= {"lse_r", "e_pr", "at_r"} if there[1] else set()
    used = [here for here, share_of_u in zip(there, mix[::-1], strict=True) if share_of_u != 0]
    names |= {"lse_u", "e_pu"} if all(used) else set()
    asked = [name for name in sorted(names) if torch.rand(()) < 0.5]
    with cutting(cut):
        check(streams, {name: torch.randn(n) for name in asked}, targets=targets, mix=mix)


@pytest.mark.parametrize(
    ("heads", "shared", "cut"),
    [
        ("trained", False, "pieces"),
        ("trained", True, "splits"),
        ("frozen", False, "maps"),
        ("frozen", True, "pieces"),
        ("frozen", False, "whole"),
    ],
)
def test_losses(heads, shared, cut):
    inputs = [t for d in (24, 24, 24) for t in stream(N, V, d, bias=True, dtype=torch.float32)[:3]]
    if heads == "frozen":
        inputs = [t.detach().requires_grad_(k % 3 == 0) for k, t in enumerate(inputs)]
    targets = some_targets()

    def split(t):
        (h, w, b), (h_q, w_q, b_q), (h_r, w_r, b_r) = t[:3], t[3:6], t[6:]
        return h, w, b, h_q, w_q, b_q, h_r, (w_q if shared else w_r), b_r

    def logprob(t, backend):
        h, w, b, *_ = split(t)
        return linear_logprob(h, w, targets, bias=b, temperature=0.7, softcap=2.0, backend=backend)

    def kl(t, backend):
        h, w, b, h_q, w_q, b_q, *_ = split(t)
        return (linear_kl(h, w, h_q, w_q, bias=b, ref_bias=b_q, temperature=0.7, backend=backend),)

    def value(t, backend):
        _, _, _, h_q, w_q, b_q, h_r, w_r, b_r = split(t)
        return (soft_value(h_q, w_q, h_r, w_r, 0.4, q_bias=b_q, ref_bias=b_r, backend=backend),)

    def policy_kl(t, backend):
        h, w, b, h_q, w_q, b_q, h_r, w_r, b_r = split(t)
        biases = {"bias": b, "q_bias": b_q, "ref_bias": b_r}
        return (soft_policy_kl(h, w, h_q, w_q, h_r, w_r, 0.4, **biases, backend=backend),)

    def q(t, backend):
        return (gather_q(t[3], t[4], targets, bias=t[5], backend=backend),)

    calls = {"logprob": logprob, "kl": kl, "value": value, "policy kl": policy_kl, "q": q}
    with cutting(cut):
        check_losses(calls, inputs, N)


@pytest.mark.parametrize(
    ("inplace", "dtype", "cut"),
    [
        (False, torch.float32, "splits"),
        (False, torch.bfloat16, "whole"),
        (True, torch.float32, "whole"),
        (True, torch.bfloat16, "splits"),
    ],
)
def test_losses_from_logits(inplace, dtype, cut):
    roots = [tensor(N, V, dtype=dtype) for _ in range(3)]
    targets = some_targets()
    options = {"inplace_backward": inplace}

    def made(tensors):
        # The logits of a trainer are the output of a product, not leaves.
        return [x * 1.0 for x in tensors]

    calls = {
        "logprob": lambda t, b: logprob_from_logits(
            made(t)[0], targets, temperature=0.7, **options, backend=b
        ),
        "kl": lambda t, b: (kl_from_logits(*made(t)[:2], temperature=0.7, **options, backend=b),),
        "value": lambda t, b: (soft_value_from_logits(*made(t)[:2], 0.4, **options, backend=b),),
        "policy kl": lambda t, b: (soft_policy_kl_from_logits(*made(t), 0.4, **options, backend=b),),
    }
    with cutting(cut):
        check_losses(calls, roots, N)


def test_gradient_in_place_lies_in_the_memory_of_the_logits():
    root = tensor(N, V, dtype=torch.float32)
    logits = root * 1.0
    grads = []
    logits.register_hook(grads.append)
    kl = kl_from_logits(logits, torch.randn(N, V), inplace_backward=True, backend="triton")
    kl.sum().backward()
    assert grads[0].data_ptr() == logits.data_ptr()
    # A gradient that is kept must not keep the graph of the logits.
    assert not grads[0].requires_grad


def test_logits_that_two_streams_share_get_both_gradients():
    inputs = [tensor(N, V, dtype=torch.float32)]
    check_losses(
        {"value": lambda t, b: (soft_value_from_logits(t[0], t[0], 0.5, inplace_backward=True, backend=b),)},
        inputs,
        N,
    )
