"""Small problems for the kernel tests: random streams, their leaves, and ways to cut a sweep."""

import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad

from etpo import kernels
from etpo.kernels import (
    Stream,
    VocabStats,
    gather_q,
    kl_from_logits,
    linear_kl,
    linear_logprob,
    vocab_stats,
)
from etpo.kernels.chunked import sizes

# True where the tests that all backends share run on Triton: interpreted, or on a GPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_TRITON = INTERPRETED or os.environ.get("ETPO_TEST_DEVICE", "cpu") != "cpu"

# Tile elements, block columns, rows of a chunk, bytes that may be kept: from one tile to many ragged ones.
TILINGS = {
    "one tile": (1 << 18, 1 << 10, 256, 1 << 26),
    "recomputed": (1 << 18, 1 << 10, 256, 0),
    "ragged": (20, 5, 3, 0),
    "ragged, kept": (20, 5, 3, 1 << 26),
}
# For some hundred tokens and vocabulary entries, which the ragged ones would cut into too many tiles.
COARSE_TILINGS = {
    "one tile": TILINGS["one tile"],
    "some tiles": (2100, 70, 7, 0),
}


# Each way through the operators: (hidden, weight, other hidden, backend) -> a number.
OPERATORS: dict[str, Callable[[Tensor, Tensor, Tensor, str], Tensor]] = {
    "statistics": lambda h, w, _, b: linear_logprob(h, w, torch.arange(len(h)), backend=b)[0].sum(),
    "trained heads": lambda h, w, r, b: linear_kl(h, w, r, w.detach(), backend=b).sum(),
    "frozen heads": lambda h, w, r, b: linear_kl(h, w.detach(), r, w.detach(), backend=b).sum(),
    "gather": lambda h, w, _, b: gather_q(h, w, torch.arange(len(h)), backend=b).sum(),
    "logits in place": lambda h, w, r, b: kl_from_logits(
        h @ w.T, (r @ w.T).detach(), inplace_backward=True, backend=b
    ).sum(),
}


# What hypothesis draws for `mixture`, and the coefficients of u.
MIXTURES = {
    "there": st.tuples(st.booleans(), st.booleans()),
    "share": st.sampled_from(["no head", "policy = reference", "critic = reference", "all"]),
    "rich": st.booleans(),
    "mix": st.sampled_from([(1.0, 1.0), (0.0, 2.5), (1.0, 0.0), (-0.5, 3.0)]),
}


@contextmanager
def tiling(name: str) -> Iterator[None]:
    """Cuts the sweeps of the chunked backend as the tables above say."""
    tile, block, rows, keep = (TILINGS | COARSE_TILINGS)[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sizes.TILE_ELEMENTS, "cpu", tile)
        patch.setitem(sizes.BLOCK_COLUMNS, "cpu", block)
        patch.setitem(sizes.KEEP_BYTES, "cpu", keep)
        patch.setattr(sizes, "CHUNK_ROWS", rows)
        patch.setattr(sizes, "GATHER_ELEMENTS", tile)
        yield


def tensor(*shape: int, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Tensor:
    """Normal random numbers that ask for a gradient."""
    return (torch.randn(*shape, dtype=torch.float64) * scale).to(dtype).requires_grad_()


def stream(
    n: int,
    v: int,
    d: int = 3,
    *,
    dtype: torch.dtype = torch.float64,
    bias: bool = False,
    lora: bool = False,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> Stream:
    """A random stream whose tensors ask for gradients."""
    return Stream(
        tensor(n, d, dtype=dtype),
        tensor(v, d, dtype=dtype),
        tensor(v, dtype=dtype) if bias else None,
        (tensor(2, d, dtype=dtype), tensor(v, 2, dtype=dtype), 0.7) if lora else None,
        temperature,
        softcap,
    )


def mixture(
    n: int,
    v: int,
    d: int,
    there: tuple[bool, bool],
    share: str,
    rich: bool,
    *,
    dtype: torch.dtype = torch.float64,
) -> tuple[list[Stream | None], Tensor]:
    """(streams, targets): a policy, a critic and a reference as `there`, heads shared as `share` says."""
    policy = stream(n, v, d, bias=rich, lora=rich, softcap=2.0 if rich else None, dtype=dtype)
    critic = stream(n, v, d, temperature=0.5, dtype=dtype)
    reference = stream(n, v, d, bias=True, dtype=dtype)
    if share in ("policy = reference", "all"):
        reference = policy._replace(hidden=reference.hidden)
    if share in ("critic = reference", "all"):
        critic = reference._replace(hidden=critic.hidden)
    targets = torch.where(torch.rand(n) < 0.3, -100, torch.randint(0, v, (n,)))
    return [policy, critic if there[0] else None, reference if there[1] else None], targets


def leaves(*streams: Stream | None) -> list[Tensor]:
    """The distinct tensors of the streams that ask for a gradient."""
    found: dict[int, Tensor] = {}
    for item in streams:
        if item is not None:
            parts = [item.hidden, item.weight, item.bias, *(item.lora or ())[:2]]
            found |= {id(part): part for part in parts if isinstance(part, Tensor) and part.requires_grad}
    return list(found.values())


def gradients(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> list[Tensor]:
    """Gradients of Σ cotangent · output, zeros where there is no path."""
    got = torch.autograd.grad(list(outputs), list(inputs), list(cotangents), allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(got, inputs, strict=True)]


def present(stats: VocabStats) -> dict[str, Tensor]:
    """The statistics that are there, by name."""
    return {name: value for name, value in stats._asdict().items() if value is not None}


def stats_and_gradients(
    streams: Sequence[Stream | None],
    cotangents: dict[str, Tensor],
    *,
    targets: Tensor | None = None,
    mix: tuple[float, float] = (1.0, 1.0),
    backend: str = "auto",
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Statistics, and the gradients of all leaves for cotangents on the named ones."""
    stats = present(vocab_stats(*streams, targets=targets, mix=mix, backend=backend))
    grads = gradients([stats[name] for name in cotangents], leaves(*streams), list(cotangents.values()))
    return {name: value.detach() for name, value in stats.items()}, grads


def assert_same(got: Sequence[Tensor], want: Sequence[Tensor], tolerance: float = 1e-11) -> None:
    """Equal shapes and dtypes, values within `tolerance` of the largest, NaN and infinities in place."""
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        finite = torch.isfinite(other)
        size = float(other[finite].abs().max()) if finite.any() else 0.0
        torch.testing.assert_close(one, other, rtol=0.0, atol=tolerance * (1.0 + size), equal_nan=True)


def relative_error(got: Tensor, want: Tensor) -> float:
    """‖got − want‖ / ‖want‖ in float64."""
    return float((got.double() - want.double()).norm() / want.double().norm())


def files_passed(call: Callable[[], object]) -> set[str]:
    """The files of etpo.kernels whose functions run in `call`."""
    folder = str(Path(kernels.__file__).parent) + "/"
    seen: set[str] = set()

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(folder):
            seen.add(frame.f_code.co_filename.removeprefix(folder))

    # A backward may run in a thread of its own.
    threading.setprofile(note)
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return seen


def assert_no_other_derivatives(
    call: Callable[[Tensor, Tensor, Tensor, str], Tensor], tensors: Sequence[Tensor], backend: str
) -> None:
    """Second derivatives and forward mode raise, and the reference has both."""
    hidden, *others = tensors

    def second(backend: str) -> Tensor:
        (first,) = torch.autograd.grad(call(hidden, *others, backend) ** 2, hidden, create_graph=True)
        return torch.autograd.grad(first.square().sum(), hidden)[0]

    def forward(backend: str) -> Tensor:
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(hidden.detach(), torch.ones_like(hidden))
            value = call(dual, *(t.detach() for t in others), backend)
            return forward_ad.unpack_dual(value).tangent

    for derivative, words in ((second, "second derivatives"), (forward, "forward-mode derivatives")):
        with pytest.raises(RuntimeError, match=f"only backend='reference' has {words}"):
            derivative(backend)
        assert derivative("reference").any()
