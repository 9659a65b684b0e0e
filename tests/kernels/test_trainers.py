"""What trainers bring: K tokens a row, masks, weights, and heads with softcap, low rank and temperature.

`interpreted/test_triton_trainers.py` runs it on Triton, in its interpreter.
"""

from collections.abc import Callable

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
    soft_policy_kl_from_logits,
    soft_value,
    soft_value_from_logits,
    vocab_stats,
)
from tests.kernels.problems import ON_TRITON, TILINGS, tiling

BACKENDS = ("triton",) if ON_TRITON else ("reference", "chunked")
DTYPE = torch.float32 if ON_TRITON else torch.float64
TOLERANCE = 3e-5 if ON_TRITON else 1e-11
N, V, D, K, R, BETA = 6, 21, 8, 3, 2, 0.4
NAN, INF = float("nan"), float("inf")


def made(*shape: int, grad: bool = True) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(DTYPE).requires_grad_(grad)


def same(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    torch.testing.assert_close(got.double(), want.double(), rtol=TOLERANCE, atol=TOLERANCE)


def same_gradients(got: Tensor, want: Tensor, inputs: list[Tensor], want_inputs: list[Tensor]) -> None:
    """For one random cotangent of both."""
    g = torch.randn(got.shape, dtype=torch.float64)
    pairs = ((got, inputs), (want, want_inputs))
    found = [
        torch.autograd.grad(x, xs, g.to(x.dtype), allow_unused=True, retain_graph=True) for x, xs in pairs
    ]
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            same(one, other)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=TILINGS if not ON_TRITON else ["one tile"])
def cut(request):
    with tiling(request.param):
        yield request.param


def rich() -> dict:
    """bias, lora, temperature, softcap."""
    return {"bias": made(V), "lora": (made(R, D), made(V, R), 0.7), "temperature": 0.8, "softcap": 3.0}


def log_softmax_of(hidden: Tensor, weight: Tensor, x: dict) -> tuple[Tensor, Tensor]:
    """(logits, log-probabilities), written down once more."""
    a, b, scale = x["lora"]
    z = hidden @ (weight + scale * b @ a).T + x["bias"]
    z = x["softcap"] * torch.tanh(z / x["softcap"]) / x["temperature"]
    return z, z.log_softmax(-1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch", [(N,), (2, N // 2)])
def test_log_probabilities_at_several_tokens(batch, backend, cut):
    hidden, weight, x = made(*batch, D), made(V, D), rich()
    targets = torch.randint(0, V, (*batch, K))
    targets.reshape(-1, K)[1] = -100
    targets.reshape(-1, K)[2, 1] = -100
    targets.reshape(-1, K)[3] = 7
    inputs = [hidden, weight, x["bias"], *x["lora"][:2]]
    logprob, entropy = linear_logprob(hidden, weight, targets, **x, backend=backend)
    z, log_p = log_softmax_of(hidden, weight, x)
    real = targets != -100
    tokens = targets.masked_fill(~real, 0)
    want = torch.where(real, log_p.gather(-1, tokens), 0.0)
    want_entropy = torch.where(real.any(-1), -(log_p.exp() * log_p).sum(-1), 0.0)
    same(logprob, want)
    same(entropy, want_entropy)
    same_gradients(logprob, want, inputs, inputs)
    q = gather_q(hidden, weight, targets, **x, backend=backend)
    want_q = torch.where(real, z.gather(-1, tokens), 0.0)
    same(q, want_q)
    same_gradients(q, want_q, inputs, inputs)
    logits = (hidden @ weight.T).detach().requires_grad_()
    got, _ = logprob_from_logits(logits, targets, temperature=0.7, backend=backend)
    want = torch.where(real, (logits / 0.7).log_softmax(-1).gather(-1, tokens), 0.0)
    same(got, want)
    same_gradients(got, want, [logits], [logits])


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_at_several_tokens(backend):
    streams = [Stream(made(N, D), made(V, D), made(V)) for _ in range(3)]
    targets = torch.randint(0, V, (N, K))
    stats = vocab_stats(*streams, targets=targets, backend=backend)
    one = vocab_stats(*streams, targets=targets[:, 1], backend=backend)
    for name in ("at_p", "at_q", "at_r"):
        assert getattr(stats, name).shape == (N, K)
        same(getattr(stats, name)[:, 1], getattr(one, name))
    same(stats.e_pu, one.e_pu)


def test_one_token_of_several_is_that_token():
    """K = 1 keeps its dimension, no rows stay no rows."""
    hidden, weight, targets = made(N, D), made(V, D), torch.randint(0, V, (N,))
    for backend in BACKENDS:
        logprob, entropy = linear_logprob(hidden, weight, targets[:, None], backend=backend)
        want, want_entropy = linear_logprob(hidden, weight, targets, backend=backend)
        assert logprob.shape == (N, 1)
        same(logprob[:, 0], want)
        same(entropy, want_entropy)
        empty, _ = linear_logprob(hidden[:0], weight, targets[:0, None].expand(0, K), backend=backend)
        assert empty.shape == (0, K)


# Each one-number function: (hidden p, q, r, heads p, q, r, keywords) -> numbers.
Numbers = Callable[..., Tensor]
LINEAR: dict[str, Numbers] = {
    "linear_kl": lambda h, w, **k: linear_kl(h[0], w[0], h[2], w[2], **k),
    "soft_value": lambda h, w, **k: soft_value(h[1], w[1], h[2], w[2], BETA, **k),
    "soft_policy_kl": lambda h, w, **k: soft_policy_kl(h[0], w[0], h[1], w[1], h[2], w[2], BETA, **k),
}
LOGITS: dict[str, Numbers] = {
    "kl_from_logits": lambda h, w, **k: kl_from_logits(h[0] @ w[0].T, h[2] @ w[2].T, **k),
    "soft_value_from_logits": lambda h, w, **k: soft_value_from_logits(
        h[1] @ w[1].T, h[2] @ w[2].T, BETA, **k
    ),
    "soft_policy_kl_from_logits": lambda h, w, **k: soft_policy_kl_from_logits(
        *(x @ y.T for x, y in zip(h, w, strict=True)), BETA, **k
    ),
}
NUMBERS = LINEAR | LOGITS


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("frozen", [False, True], ids=["trained heads", "frozen heads"])
@pytest.mark.parametrize("name", NUMBERS)
def test_a_masked_row_is_zero_and_leaves_no_gradient(name, frozen, backend, cut):
    hidden, heads = [made(N, D) for _ in range(3)], [made(V, D, grad=not frozen) for _ in range(3)]
    mask = torch.tensor([True, False, True, True, False, True])
    inputs = [*hidden, *(w for w in heads if w.requires_grad)]
    want = torch.where(mask, NUMBERS[name](hidden, heads, backend="reference"), 0.0)
    got = NUMBERS[name](hidden, heads, mask=mask, backend=backend)
    same(got, want)
    same_gradients(got, want, inputs, inputs)
    if name in LINEAR:
        poisoned = [h.detach().masked_fill(~mask[:, None], NAN).requires_grad_() for h in hidden]
        got = NUMBERS[name](poisoned, heads, mask=mask, backend=backend)
        same_gradients(got, want, [*poisoned, *inputs[3:]], inputs)
    none = NUMBERS[name](hidden, heads, mask=torch.zeros_like(mask), backend=backend)
    assert not none.any()
    assert not any(
        x is not None and x.any() for x in torch.autograd.grad(none.sum(), inputs, allow_unused=True)
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained heads", "frozen heads"])
@pytest.mark.parametrize("name", NUMBERS)
def test_a_weighted_sum_is_the_sum_of_weighted_numbers(name, frozen, masked, backend, cut):
    hidden, heads = [made(N, D) for _ in range(3)], [made(V, D, grad=not frozen) for _ in range(3)]
    weights = torch.randn(N, dtype=torch.float64).to(DTYPE)
    weights[4] = 0.0
    mask = torch.tensor([True, False, True, True, True, True]) if masked else None
    inputs = [*hidden, *(w for w in heads if w.requires_grad)]
    got = NUMBERS[name](hidden, heads, weights=weights, mask=mask, backend=backend)
    want = (NUMBERS[name](hidden, heads, mask=mask, backend="reference") * weights).sum()
    assert got.shape == ()
    same(got, want)
    same_gradients(got, want, inputs, inputs)
    # A row without a weight may hold anything.
    if name in LINEAR:
        poisoned = [h.detach().index_fill(0, torch.tensor(4), NAN).requires_grad_() for h in hidden]
        got = NUMBERS[name](poisoned, heads, weights=weights, mask=mask, backend=backend)
        same(got, want)
        same_gradients(got, want, [*poisoned, *inputs[3:]], inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("frozen", [False, True])
def test_an_infinite_number_of_a_weighted_sum_spares_the_others(frozen, backend):
    hidden, head = made(N, D), made(V, D, grad=not frozen)
    ref_hidden, bias = made(N, D, grad=False), torch.zeros(V, dtype=DTYPE)
    bias[3] = -INF
    policy_bias = bias.clone()
    weights = torch.rand(N).to(DTYPE)
    inputs = [hidden] if frozen else [hidden, head]

    def sum_of(policy_bias: Tensor) -> Tensor:
        k = {"bias": policy_bias, "ref_bias": bias, "weights": weights, "backend": backend}
        return linear_kl(hidden, head, ref_hidden, head.detach(), **k)

    assert torch.isfinite(sum_of(policy_bias))
    total = sum_of(torch.zeros_like(bias))
    assert torch.isposinf(total)
    assert not any(x.any() for x in torch.autograd.grad(total, inputs))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LINEAR)
def test_heads_of_any_kind(name, backend, cut):
    """Softcap and temperature of all heads, a bias and a low-rank change of each."""
    hidden, heads = [made(N, D) for _ in range(3)], [made(V, D) for _ in range(3)]
    biases, loras = [made(V) for _ in range(3)], [(made(R, D), made(V, R), 0.3) for _ in range(3)]
    keys = {"linear_kl": ("", "ref_"), "soft_value": ("q_", "ref_"), "soft_policy_kl": ("", "q_", "ref_")}[
        name
    ]
    k = {f"{key}bias": biases[("", "q_", "ref_").index(key)] for key in keys}
    k |= {f"{key}lora": loras[("", "q_", "ref_").index(key)] for key in keys}
    got = LINEAR[name](hidden, heads, **k, temperature=0.8, softcap=3.0, backend=backend)
    parts = [
        {"bias": b, "lora": x, "temperature": 0.8, "softcap": 3.0} for b, x in zip(biases, loras, strict=True)
    ]
    z = [log_softmax_of(*head)[0] for head in zip(hidden, heads, parts, strict=True)]
    optimal = (z[2] + z[1] / BETA).log_softmax(-1)
    log_p, log_r = z[0].log_softmax(-1), z[2].log_softmax(-1)
    want = {
        "linear_kl": (log_p.exp() * (log_p - log_r)).sum(-1),
        "soft_value": BETA * ((log_r + z[1] / BETA).logsumexp(-1)),
        "soft_policy_kl": (log_p.exp() * (log_p - optimal)).sum(-1),
    }[name]
    same(got, want)
    inputs = [*hidden, *heads, *biases, *(x for lora in loras for x in lora[:2])]
    same_gradients(got, want, inputs, inputs)


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"mask": torch.ones(N)}, "mask: expected a tensor of torch.bool, got torch.float32"),
        ({"mask": torch.ones(N - 1).bool()}, r"mask: expected shape \(6,\)"),
        ({"mask": True}, "mask: expected a tensor of torch.bool, got bool"),
        ({"weights": torch.ones(N).long()}, "weights: expected a tensor of .* got torch.int64"),
        ({"weights": torch.ones(N, 1)}, r"weights: expected shape \(6,\) .* got \(6, 1\)"),
        ({"weights": torch.ones(N, requires_grad=True)}, "weights: .* asks for no gradient"),
        ({"softcap": -1.0}, "softcap"),
        ({"ref_lora": (torch.ones(2, 3), torch.ones(V, 2), 1.0)}, "ref_lora A"),
    ],
)
def test_bad_masks_and_weights_are_named(keywords, words):
    hidden, weight = torch.randn(N, D), torch.randn(V, D)
    with pytest.raises(ValueError, match=words):
        linear_kl(hidden, weight, hidden, weight, **keywords)
