"""One rank of test_shards.py, python shard_worker.py RANK SIZE STORE: sharded results beside the whole."""

import os
import sys
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from etpo.kernels import Stream, gather_q, linear_kl, linear_logprob, soft_policy_kl, soft_value, vocab_stats
from etpo.kernels.losses import divergence
from etpo.kernels.shards import vocabulary_of
from etpo.kernels.streams import VocabShard

N, V, D, BETA = 7, 23, 5, 0.4
INF = float("inf")


def cut(rank: int, size: int) -> slice:
    """Rows of a rank, as torch.chunk cuts."""
    step = -(-V // size)
    return slice(min(V, rank * step), min(V, (rank + 1) * step))


def whole(dtype: torch.dtype, masked: bool) -> list[Stream]:
    """Policy, critic and reference, the same on every rank; masked: shard 0 has no token that counts."""
    g = torch.Generator().manual_seed(0)

    def make(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()

    streams = []
    for k in range(3):
        bias = make(V)
        if masked:
            bias = bias.detach().index_fill(0, torch.arange(12), -INF).requires_grad_()
        lora = (make(2, D), make(V, 2), 0.3) if k != 1 else None
        streams.append(Stream(make(N, D), make(V, D), bias, lora, 0.8, 3.0 if k == 0 else None))
    return streams


def part(stream: Stream, rows: slice, group: object) -> Stream:
    """This rank's shard of a stream, with leaves of its own."""

    def mine(x: Tensor) -> Tensor:
        return x.detach()[rows].clone().requires_grad_()

    a, b, scale = stream.lora or (None, None, 0.0)
    lora = None if a is None or b is None else (a.detach().clone().requires_grad_(), mine(b), scale)
    hidden = stream.hidden.detach().clone().requires_grad_()
    return Stream(
        hidden, mine(stream.weight), mine(stream.bias), lora, *stream[4:6], VocabShard(group, rows.start)
    )


def leaves(stream: Stream) -> list[tuple[Tensor, bool]]:
    """(tensor, whether it is cut by rows)."""
    a, b, _ = stream.lora or (None, None, 0.0)
    found = [(stream.hidden, False), (stream.weight, True), (stream.bias, True), (a, False), (b, True)]
    return [(x, by_rows) for x, by_rows in found if x is not None]


def compare(
    call: Callable[[list[Stream]], list[Tensor]],
    streams: list[Stream],
    mine: list[Stream],
    rows: slice,
    tolerance: float,
) -> None:
    """Results, and all gradients for fixed cotangents."""
    results = []
    for items in (streams, mine):
        outs = [x for x in call(items) if x is not None]
        g = torch.Generator().manual_seed(1)
        total = sum((x * torch.randn(x.shape, generator=g).to(x.dtype)).sum() for x in outs)
        tensors = [x for s in items for x, _ in leaves(s)]
        grads = torch.autograd.grad(total, tensors, allow_unused=True)
        results.append(
            (outs, [torch.zeros_like(x) if y is None else y for x, y in zip(tensors, grads, strict=True)])
        )
    by_rows = [flag for s in streams for _, flag in leaves(s)]
    for one, other in zip(results[1][0], results[0][0], strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance, equal_nan=True)
    for one, other, flag in zip(results[1][1], results[0][1], by_rows, strict=True):
        torch.testing.assert_close(one, other[rows] if flag else other, rtol=tolerance, atol=tolerance)


def main(rank: int, size: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    rows = cut(rank, size)
    targets = torch.tensor([0, 22, 12, -100, 7, 13, 21])
    many = torch.randint(0, V, (N, 3), generator=torch.Generator().manual_seed(2))
    many[1, 1] = -100
    mask = torch.tensor([True, False, True, True, True, True, True])
    weights = torch.linspace(-1, 1, N)

    def keys(s: Stream) -> dict:
        return {"bias": s.bias, "lora": s.lora, "temperature": s.temperature, "softcap": s.softcap}

    for backend in ("reference", "chunked"):
        calls = [
            lambda s, b=backend: list(vocab_stats(*s, targets=targets, mix=(0.6, 2.0), backend=b)),
            lambda s, b=backend: list(vocab_stats(*s, targets=many, backend=b))[8:],
            lambda s, b=backend: [divergence(s[0], None, s[2], (1.0, 0.0), backend=b)],
            lambda s, b=backend: [divergence(*s, (1.0, 1 / BETA), backend=b)],
        ]
        for masked in (False, True):
            for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
                streams = whole(dtype, masked)
                mine = [part(s, rows, None) for s in streams]
                for call in calls[: 3 if masked else 4]:
                    if not masked or call is calls[2]:
                        compare(call, streams, mine, rows, tolerance)
    # Heads that are DTensors sharded on dim 0, in every function.
    mesh = init_device_mesh("cpu", (size,))
    p, q, r = whole(torch.float64, False)
    heads = [distribute_tensor(s.weight.detach(), mesh, [Shard(0)]).requires_grad_() for s in (p, q, r)]
    hidden = [s.hidden.detach().clone().requires_grad_() for s in (p, q, r)]
    functions = {
        "linear_logprob": lambda h, w: linear_logprob(h[0], w[0], targets)[0],
        "several tokens": lambda h, w: linear_logprob(h[0], w[0], many)[0],
        "linear_kl": lambda h, w: linear_kl(h[0], w[0], h[2], w[2], mask=mask),
        "a weighted sum": lambda h, w: linear_kl(h[0], w[0], h[2], w[2], weights=weights.double()),
        "soft_value": lambda h, w: soft_value(h[1], w[1], h[2], w[2], BETA),
        "soft_policy_kl": lambda h, w: soft_policy_kl(h[0], w[0], h[1], w[1], h[2], w[2], BETA),
        "gather_q": lambda h, w: gather_q(h[1], w[1], targets),
    }
    for name, call in functions.items():
        got, want = call(hidden, heads), call([s.hidden for s in (p, q, r)], [s.weight for s in (p, q, r)])
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12, msg=name)
        got_grads = torch.autograd.grad(got.square().sum(), [*hidden, *heads], allow_unused=True)
        whole_inputs = [*(s.hidden for s in (p, q, r)), *(s.weight for s in (p, q, r))]
        want_grads = torch.autograd.grad(want.square().sum(), whole_inputs, allow_unused=True)
        for one, other in zip(got_grads, want_grads, strict=True):
            assert (one is None) == (other is None), name
            if one is not None and other is not None:
                one = one.full_tensor() if hasattr(one, "full_tensor") else one
                torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12, msg=name)
    # Twice the same, to the last bit.
    mine = [part(s, rows, None) for s in whole(torch.float32, False)]
    one, other = (vocab_stats(*mine, targets=targets).e_pu for _ in range(2))
    assert torch.equal(one, other)
    with pytest.raises(ValueError, match="targets: expected tokens in"):
        linear_logprob(p.hidden, heads[0], targets + 5)
    with pytest.raises(ValueError, match="shard: expected start"):
        vocabulary_of(VocabShard(None, rows.start + rank), 3, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"critic\.weight: expected VocabShard"):
        vocab_stats(mine[0], mine[1]._replace(shard=None))
    dist.barrier()  # nobody leaves while another rank still waits for it
    dist.destroy_process_group()
    # gloo's threads may outlive the group; an interpreter that then tears down ends in std::terminate.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
