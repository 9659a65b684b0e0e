"""The kernel on rows of logits beside its twin in PyTorch in float64; also rounded to bf16 as it writes."""

import pytest
import torch

from etpo.kernels.chunked.rowwise import KL, LOG_RATIO, LOGPROB, Given, Numbers, Wanted
from etpo.kernels.chunked.rowwise import derive_rows as derive_in_pytorch
from etpo.kernels.triton import sizes
from etpo.kernels.triton.rows import derive_rows
from tests.kernels.interpreted.cases import EPS

N, V = 5, 37
KINDS = {"KL": KL, "V*": LOG_RATIO, "log-probability": LOGPROB}


def both(
    kind: int, level: float, place: torch.dtype, *, weighted: bool
) -> list[tuple[Numbers, list[torch.Tensor]]]:
    """(numbers, derivatives) of PyTorch in float64 and of the kernel in float32, of the same logits."""
    planes = [torch.randn(N, V) * 3 + level for _ in range(1 if kind == LOGPROB else 2)]
    planes[0][:, 5] = float("-inf")
    if weighted:
        # Then KL is infinite, and only a weighted sum has a derivative to speak of.
        planes[-1][1, 7] = float("-inf")
    weights = torch.randn(N) if weighted else None
    given = Given(torch.tensor([0, 36, 2, 11, 8]) if kind == LOGPROB else None, weights)
    wanted = Wanted(kind, kind != LOGPROB, 0.8)
    made = []
    for dtype in (torch.float64, torch.float32):
        own = [plane.to(dtype, copy=True) for plane in planes]
        out = Numbers(*(torch.zeros(N, dtype=torch.float64) for _ in range(2)))
        if dtype == torch.float64:
            derive_in_pytorch(wanted, own, given, out, torch.empty(2, 3, V, dtype=dtype))
            made.append((out, own))
        else:
            places = own if place == dtype else [torch.empty(N, V, dtype=place) for _ in own]
            derive_rows(wanted, own, given, out, places)
            made.append((out, places))
    return made


@pytest.mark.parametrize("weighted", [False, True], ids=["unit", "weighted"])
@pytest.mark.parametrize("place", [torch.float32, torch.bfloat16], ids=["in place", "bf16"])
@pytest.mark.parametrize("level", [0.0, 1e4], ids=["level 0", "level 10000"])
@pytest.mark.parametrize("block", [16, 64], ids=["blocks", "one block"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_pytorch(kind, block, level, place, weighted, monkeypatch):
    monkeypatch.setattr(sizes, "ROW", sizes.ROW._replace(block_v=block))
    (want, want_d), (got, got_d) = both(KINDS[kind], level, place, weighted=weighted)
    torch.testing.assert_close(got.value, want.value, rtol=20 * EPS, atol=20 * EPS)
    if kind == "log-probability":
        torch.testing.assert_close(got.entropy, want.entropy, rtol=20 * EPS, atol=20 * EPS)
    for one, other in zip(got_d, want_d, strict=True):
        assert one.dtype == place
        size = float(other.abs().max())
        rounding = 0.0 if place == torch.float32 else 2**-8
        torch.testing.assert_close(one.double(), other, rtol=rounding, atol=40 * EPS * size)


def test_an_infinite_number_has_no_derivative_in_a_weighted_sum():
    """A token that u masks and p does not makes KL infinite."""
    (want, want_d), (got, got_d) = both(KL, 0.0, torch.float32, weighted=True)
    assert want.value[1] == got.value[1] == float("inf")
    assert not got_d[0][1].any()
    assert not got_d[1][1].any()
    assert not want_d[0][1].any()
    assert got_d[0][0].any()
