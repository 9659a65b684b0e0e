"""Peak memory: a workspace and the gradients themselves, whatever the number of tokens."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from etpo.kernels import (
    Stream,
    gather_q,
    linear_kl,
    linear_logprob,
    soft_policy_kl,
    vocab_stats,
)
from etpo.kernels.chunked import sizes

V, D = 600, 8
TILE, BLOCK, ROWS = 1 << 14, 256, 32
# Nine tiles at most, and two planes of whole rows with their scratch; per-token numbers come on top.
WORKSPACE = 4 * max(9 * TILE, 2 * ROWS * V + 2 * TILE)


@pytest.fixture(autouse=True)
def small_workspace(monkeypatch):
    """So small a workspace that a few thousand tokens dwarf it."""
    monkeypatch.setitem(sizes.TILE_ELEMENTS, "cpu", TILE)
    monkeypatch.setitem(sizes.BLOCK_COLUMNS, "cpu", BLOCK)
    monkeypatch.setitem(sizes.KEEP_BYTES, "cpu", WORKSPACE)
    monkeypatch.setattr(sizes, "CHUNK_ROWS", ROWS)
    monkeypatch.setattr(sizes, "GATHER_ELEMENTS", TILE)


def peak_bytes(run: Callable[[], object]) -> int:
    """Most bytes that `run` held at a time, as the allocator of CPU tensors saw it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        run()
    held = peak = 0
    events = trace.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def test_the_gauge_sees_what_is_held():
    def run() -> None:
        a = torch.empty(1000)
        b = torch.empty(500)
        del a
        torch.empty(250)
        del b

    assert peak_bytes(run) == 6000


def inputs(n: int, frozen: bool) -> list[Tensor]:
    torch.manual_seed(0)
    made = [torch.randn(*shape) for _ in range(3) for shape in ((n, D), (V, D))]
    return [t.requires_grad_(not frozen or k % 2 == 0) for k, t in enumerate(made)]


def sweep_all(t: list[Tensor], targets: Tensor) -> Tensor:
    stats = vocab_stats(Stream(*t[:2]), Stream(*t[2:4]), Stream(*t[4:]), targets=targets)
    return sum(value.sum() for value in stats)


CALLS = {
    "vocab_stats": sweep_all,
    "linear_logprob": lambda t, targets: sum(linear_logprob(*t[:2], targets)).sum(),
    "linear_kl": lambda t, targets: linear_kl(*t[:4]).sum(),
    "soft_policy_kl": lambda t, targets: soft_policy_kl(*t, 0.5).sum(),
    "gather_q": lambda t, targets: gather_q(*t[:2], targets).sum(),
}


@pytest.mark.parametrize("frozen", [False, True], ids=["trained heads", "frozen heads"])
@pytest.mark.parametrize("name", CALLS)
def test_peak_is_a_workspace_beside_the_gradients(name, frozen):
    for n in (1500, 4500):
        tensors = inputs(n, frozen)
        targets = torch.randint(0, V, (n,))

        def run(tensors: list[Tensor] = tensors, targets: Tensor = targets) -> None:
            CALLS[name](tensors, targets).backward()

        run()
        gradients = sum(t.grad.nbytes for t in tensors if t.grad is not None)
        for t in tensors:
            t.grad = None
        # Tables of statistics and of cotangents, what autograd makes of them, indices: numbers a token.
        per_token = 8 * 60 * n
        assert peak_bytes(run) <= gradients + 1.5 * WORKSPACE + per_token
        # A plane of logits would not fit into that.
        assert 4 * n * V > 2 * (1.5 * WORKSPACE + per_token)
