"""How many matrix products a function makes, forward and backward together: as few as there must be.

`interpreted/test_triton_products.py` runs it on Triton, in its interpreter.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from etpo.kernels import linear_kl, linear_logprob, soft_policy_kl, soft_value
from etpo.kernels.chunked import sizes
from tests.kernels.problems import ON_TRITON, assert_same, gradients

BACKEND = "triton" if ON_TRITON else "chunked"
DTYPE = torch.float32 if ON_TRITON else torch.float64
N, V, D, BETA = 12, 40, 8, 0.4
TOLERANCE = 3e-5 if ON_TRITON else 1e-11


def given(trained: bool) -> list[Tensor]:
    """hidden and head of policy, critic and reference; the policy learns, and its head too if `trained`."""
    torch.manual_seed(0)
    made = [torch.randn(n, D, dtype=torch.float64).to(DTYPE) for _ in range(3) for n in (N, V)]
    made[0].requires_grad_()
    made[1].requires_grad_(trained)
    return made


def logprob(x: list[Tensor], backend: str) -> Tensor:
    return linear_logprob(*x[:2], torch.arange(N), entropy_gradient=False, backend=backend)[0]


# Products with a frozen head and with a trained one: each stream's logits, and one for each gradient.
FUNCTIONS: dict[str, tuple[Callable[[list[Tensor], str], Tensor], int, int]] = {
    "linear_logprob": (logprob, 2, 3),
    "linear_kl": (lambda x, b: linear_kl(*x[:2], *x[4:], backend=b), 3, 4),
    "soft_value": (lambda x, b: soft_value(*x[:4], BETA, backend=b), 3, 4),
    "soft_policy_kl": (lambda x, b: soft_policy_kl(*x, BETA, backend=b), 4, 5),
}


def count_products(run: Callable[[], object]) -> float:
    """Matrix products of the size N·V·D that `run` makes, whatever pieces they are cut into."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True
    ) as trace:
        run()
    total = 0
    for event in trace.events():
        if event.name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            (n, k), (_, m) = event.input_shapes[event.name != "aten::mm" :][:2]
            total += n * k * m
    return total / (N * V * D)


def test_the_count_counts():
    a, b = torch.randn(N, D), torch.randn(D, V)
    assert count_products(lambda: (a @ b, torch.randn(N, V).addmm_(a, b), b.T @ a.T)) == 3


def measured(
    function: Callable[[list[Tensor], str], Tensor], trained: bool
) -> tuple[float, list[Tensor], list[Tensor]]:
    """(products, gradients, gradients of the reference) of one backward."""
    x = given(trained)
    asking = [t for t in x if t.requires_grad]
    cotangent = torch.randn(function(x, "reference").shape, dtype=DTYPE)
    want = gradients([function(x, "reference")], asking, [cotangent])
    got: list[Tensor] = []
    n = count_products(lambda: got.extend(gradients([function(x, BACKEND)], asking, [cotangent])))
    return n, got, want


@pytest.mark.parametrize("trained", [False, True], ids=["frozen heads", "trained head"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_as_few_products_as_there_must_be(name, trained):
    function, *fewest = FUNCTIONS[name]
    n, got, want = measured(function, trained)
    assert n == fewest[trained]
    assert_same(got, want, TOLERANCE)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen heads", "trained head"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_beyond_its_budget_a_derivative_is_not_kept(name, trained, monkeypatch):
    """Then logits are made once more, on Triton by a kernel, which no count sees; gradients stay the same."""
    function, *fewest = FUNCTIONS[name]
    monkeypatch.setitem(sizes.KEEP_BYTES, "cpu", 0)
    monkeypatch.setattr(sizes, "HIDDEN_BYTES", 0)
    n, got, want = measured(function, trained)
    assert n != fewest[trained]
    assert_same(got, want, TOLERANCE)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen heads", "trained head"])
def test_a_weighted_sum_keeps_no_logits_and_makes_none_twice(trained, monkeypatch):
    monkeypatch.setitem(sizes.KEEP_BYTES, "cpu", 0)
    weights = torch.randn(N, dtype=DTYPE)
    n, got, want = measured(lambda x, b: linear_kl(*x[:2], *x[4:], weights=weights, backend=b), trained)
    assert n == 3 + trained
    assert_same(got, want, TOLERANCE)


def test_a_low_rank_head_makes_few_products_too():
    lora = (torch.randn(1, D, dtype=DTYPE), torch.randn(V, 1, dtype=DTYPE), 0.7)

    def loss(x: list[Tensor], backend: str) -> Tensor:
        return linear_kl(*x[:2], *x[4:], lora=lora, temperature=0.7, backend=backend)

    n, got, want = measured(loss, False)
    assert 3 < n < 4
    assert_same(got, want, TOLERANCE)


def test_an_entropy_without_a_gradient_says_so():
    x = given(False)
    want = linear_logprob(*x[:2], torch.arange(N), backend="reference")
    for targets in (torch.arange(N), torch.arange(2 * N).reshape(N, 2) % V):
        logprob, entropy = linear_logprob(*x[:2], targets, entropy_gradient=False, backend=BACKEND)
        assert logprob.requires_grad
        assert not entropy.requires_grad
        assert_same([entropy], [want[1].detach()], TOLERANCE)
