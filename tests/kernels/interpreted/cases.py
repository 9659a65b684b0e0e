"""What the interpreted tests share: ways to cut a sweep, and the comparison with float64 and with eager."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from etpo.kernels import Stream, reference, vocab_stats
from etpo.kernels.streams import Source
from etpo.kernels.triton import sizes as triton_config
from tests.kernels.problems import gradients, leaves, present, relative_error

# One split and one piece; a split for every vocabulary block; the smallest pieces of a backward; tensor
# descriptors in place of pointers.
CUTS = {
    "whole": {"WAVES": 1},
    "splits": {"WAVES": 99, "GROUP_N": 1},
    "pieces": {"WAVES": 2, "DZ_BYTES": 1, "DZ_ROWS": 16},
    "maps": {"WAVES": 2, "CHIP_INTERPRETED": "hopper"},
}
EPS = torch.finfo(torch.float32).eps


@contextmanager
def cutting(name: str) -> Iterator[None]:
    """Cuts the Triton sweeps as the table says."""
    with pytest.MonkeyPatch.context() as patch:
        for setting, value in CUTS[name].items():
            patch.setattr(triton_config, setting, value)
        yield


def as_float64(tensor: Tensor) -> Tensor:
    return tensor.detach().double().requires_grad_(tensor.requires_grad)


def exact(*streams: Stream | None) -> list[Stream | None]:
    """The streams in float64; tensors that are one stay one."""
    casts: dict[int, Tensor] = {}

    def cast(tensor: Tensor) -> Tensor:
        return casts.setdefault(id(tensor), as_float64(tensor))

    out: list[Stream | None] = []
    for item in streams:
        if item is None:
            out.append(None)
            continue
        lora = None if item.lora is None else (cast(item.lora[0]), cast(item.lora[1]), item.lora[2])
        bias = None if item.bias is None else cast(item.bias)
        out.append(item._replace(hidden=cast(item.hidden), weight=cast(item.weight), bias=bias, lora=lora))
    return out


def distance(got: Tensor, want: Tensor) -> float:
    """Largest difference between finite entries; infinities and NaN have to agree."""
    finite = torch.isfinite(want)
    assert torch.equal(torch.isfinite(got), finite)
    assert torch.equal(got[~finite].double().nan_to_num(7.0), want[~finite].double().nan_to_num(7.0))
    return float((got.double() - want.double())[finite].abs().max()) if finite.any() else 0.0


def floor(want: Tensor) -> float:
    """A few roundings of the largest number: eager may be right to the last bit by chance."""
    finite = want[torch.isfinite(want)].abs()
    return 4 * EPS * (1 + (float(finite.max()) if finite.numel() else 0.0))


@contextmanager
def rounded_derivatives() -> Iterator[None]:
    """Makes eager round the derivative by bf16 logits, as the Triton backend does, which multiplies bf16."""
    plain = reference.source_logits

    def logits(source: Source) -> Tensor:
        z = plain(source)
        if z.requires_grad and source.hidden.dtype == torch.bfloat16:
            z.register_hook(lambda g: g.bfloat16().to(g.dtype))
        return z

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "source_logits", logits)
        yield


def assert_close(
    got: Sequence[Tensor], eager: Sequence[Tensor], want: Sequence[Tensor], dtype: torch.dtype
) -> None:
    """Gradients within twice the error of eager and one rounding to their dtype."""
    for one, plain, other in zip(got, eager, want, strict=True):
        if not other.any():
            assert not one.any()
        else:
            limit = 2 * relative_error(plain, other) + torch.finfo(dtype).eps / 2
            assert relative_error(one, other) <= limit + 4 * EPS


def check(
    streams: Sequence[Stream | None],
    cotangents: dict[str, Tensor],
    *,
    targets: Tensor | None = None,
    mix: tuple[float, float] = (1.0, 1.0),
) -> None:
    """Every statistic, and the gradients of all leaves for cotangents on the named ones."""
    first = next(item for item in streams if item is not None)
    results = []
    for backend, items in (("triton", streams), ("reference", streams), ("reference", exact(*streams))):
        with rounded_derivatives():
            stats = present(vocab_stats(*items, targets=targets, mix=mix, backend=backend))
        outputs = [stats[name] for name in cotangents]
        weights = [g.to(x.dtype) for g, x in zip(cotangents.values(), outputs, strict=True)]
        grads = gradients(outputs, leaves(*items), weights) if outputs else []
        results.append(({name: value.detach() for name, value in stats.items()}, grads))
    (got, got_grads), (eager, eager_grads), (want, want_grads) = results
    assert got.keys() == want.keys()
    # A logit is known to one rounding of its size; the kernel sums contrasts around a row's largest logit.
    largest = max(float(value.abs().max()) for name, value in want.items() if name.startswith("lse"))
    for name, value in want.items():
        assert got[name].dtype == torch.float32
        limit = 2 * distance(eager[name], value) + max(floor(value), EPS * largest)
        assert distance(got[name], value) <= limit
    assert_close(got_grads, eager_grads, want_grads, first.hidden.dtype)


def check_losses(
    calls: dict[str, Callable[[Sequence[Tensor], str], Sequence[Tensor]]], inputs: Sequence[Tensor], n: int
) -> None:
    """Each call (tensors, backend) -> outputs against float64, with a cotangent of 0 on row 2."""
    for call in calls.values():
        results = []
        wide = [as_float64(tensor) for tensor in inputs]
        weights: list[Tensor] = []
        for backend, tensors in (("triton", inputs), ("reference", inputs), ("reference", wide)):
            with rounded_derivatives():
                outputs = call(tensors, backend)
            weights = weights or [torch.randn(n) * (torch.arange(n) != 2) for _ in outputs]
            asked = [tensor for tensor in tensors if tensor.requires_grad]
            cotangents = [g.to(x.dtype) for g, x in zip(weights, outputs, strict=True)]
            results.append(([x.detach() for x in outputs], gradients(outputs, asked, cotangents)))
        (got, got_grads), (eager, eager_grads), (want, want_grads) = results
        for one, plain, other in zip(got, eager, want, strict=True):
            assert distance(one, other) <= 2 * distance(plain, other) + floor(other)
        assert_close(got_grads, eager_grads, want_grads, inputs[0].dtype)
