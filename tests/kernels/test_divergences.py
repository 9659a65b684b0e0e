"""Divergences of two heads, z-loss and label smoothing, against plain PyTorch in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from etpo.kernels import divergences
from etpo.kernels.divergences import (
    alpha_divergence,
    forward_kl,
    jensen_shannon,
    reverse_kl,
    smoothed_cross_entropy,
    z_loss,
)
from tests.kernels.problems import assert_same, gradients, leaves, stream

N, V = 6, 13


@pytest.fixture
def heads() -> list:
    torch.manual_seed(0)
    return [stream(N, V, 3, bias=True, softcap=3.0), stream(N, V, 2, lora=True, temperature=0.7)]


def log_softmax_of(item) -> Tensor:
    weight = item.weight if item.lora is None else item.weight + item.lora[2] * item.lora[1] @ item.lora[0]
    z = item.hidden @ weight.T + (0.0 if item.bias is None else item.bias)
    z = z if item.softcap is None else item.softcap * torch.tanh(z / item.softcap)
    return (z / item.temperature).log_softmax(-1)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def js(log_s: Tensor, log_t: Tensor, share: float) -> Tensor:
    log_m = (share * log_t.exp() + (1 - share) * log_s.exp()).log()
    return share * kl(log_t, log_m) + (1 - share) * kl(log_s, log_m)


CASES = {
    "forward": (lambda s, t, k: forward_kl(s, t, backend=k), lambda s, t: kl(t, s)),
    "reverse": (lambda s, t, k: reverse_kl(s, t, backend=k), lambda s, t: kl(s, t)),
    "alpha 0.3": (
        lambda s, t, k: alpha_divergence(s, t, 0.3, backend=k),
        lambda s, t: (1 - (0.3 * t + 0.7 * s).exp().sum(-1)) / 0.21,
    ),
    "Jensen-Shannon": (lambda s, t, k: jensen_shannon(s, t), lambda s, t: js(s, t, 0.5)),
    "Jensen-Shannon 0.1": (lambda s, t, k: jensen_shannon(s, t, 0.1), lambda s, t: js(s, t, 0.1)),
}


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("name", CASES)
def test_divergences_are_their_definitions(name, backend, heads):
    ours, plain = CASES[name]
    got, want = ours(*heads, backend), plain(*map(log_softmax_of, heads))
    g = torch.randn(N, dtype=torch.float64)
    assert_same([got.detach()], [want.detach()])
    assert_same(gradients([got], leaves(*heads), [g]), gradients([want], leaves(*heads), [g]))


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_divergences_of_a_head_from_itself_are_nothing(backend, heads):
    for ours, _ in CASES.values():
        assert ours(heads[0], heads[0], backend).abs().max() < 1e-12


def test_alpha_runs_from_one_divergence_to_the_other(heads):
    for alpha, end in ((1e-6, reverse_kl), (1 - 1e-6, forward_kl)):
        torch.testing.assert_close(alpha_divergence(*heads, alpha), end(*heads), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_z_loss_and_smoothing_are_their_definitions(backend, heads):
    item, targets = heads[0], torch.tensor([0, 12, 3, -100, 5, 5])
    got = smoothed_cross_entropy(item, targets, 0.1, backend=backend)
    want = F.cross_entropy(log_softmax_of(item), targets, label_smoothing=0.1, reduction="none")
    z = z_loss(item, backend=backend)
    logits = item.softcap * torch.tanh((item.hidden @ item.weight.T + item.bias) / item.softcap)
    for one, other in ((got, want), (z, logits.logsumexp(-1).square())):
        g = torch.randn(N, dtype=torch.float64)
        assert_same([one.detach()], [other.detach()])
        assert_same(gradients([one], leaves(item), [g]), gradients([other], leaves(item), [g]))


@pytest.mark.parametrize("rows", [1, 4, 100])
def test_jensen_shannon_in_chunks_of_tokens(rows, heads, monkeypatch):
    want = jensen_shannon(*heads)
    monkeypatch.setattr(divergences, "CHUNK_ELEMENTS", rows * V)
    got = jensen_shannon(*heads)
    g = torch.randn(N, dtype=torch.float64)
    assert_same(gradients([got], leaves(*heads), [g]), gradients([want], leaves(*heads), [g]))
    assert jensen_shannon(*(item._replace(hidden=item.hidden[:0]) for item in heads)).shape == (0,)
    # A token that one head masks: at most log 2.
    masked = heads[0]._replace(bias=torch.zeros(V).double().index_fill(0, torch.arange(6), -float("inf")))
    value = jensen_shannon(masked, heads[1])
    assert ((value > 0) & (value < 0.6932)).all()
    assert all(torch.isfinite(x).all() for x in gradients([value], leaves(masked, heads[1]), [g]))


def test_bad_shares_are_named(heads):
    for call, words in (
        (lambda: alpha_divergence(*heads, 1.0), "alpha: .* got 1.0"),
        (lambda: smoothed_cross_entropy(heads[0], torch.zeros(N).long(), 1.0), "smoothing: .* got 1.0"),
        (lambda: jensen_shannon(*heads, 0.0), "share: .* got 0.0"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
