"""The surrogate losses are those of TRL's trainers on the same batch (recorded by record_trl.py)."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from etpo.engine.surrogates import clipped, grpo_loss

RECORDED: dict[str, Any] = json.loads((Path(__file__).parent / "trl_losses.json").read_text())


def of(name: str) -> torch.Tensor:
    return torch.tensor(RECORDED[name], dtype=torch.float64)


@pytest.mark.parametrize("form", ["grpo", "dapo", "dr", "gspo", "rloo"])
def test_loss_and_gradient_are_trls(form) -> None:
    logprob, lengths = of("logprob").requires_grad_(), RECORDED["lengths"]
    low, high = RECORDED["low"], RECORDED["high"]
    if form == "rloo":
        log_ratio = torch.stack([x.sum() for x in (logprob - of("logprob_mu")).split(lengths)])
        loss = clipped(log_ratio, of("advantage"), low, high).mean()
    else:
        loss = grpo_loss(
            logprob, of("logprob_mu"), of("logprob_ref"), of("advantage"), lengths, form,
            beta=RECORDED["beta"], low=low, high=high, max_length=RECORDED["max_length"],
        )  # fmt: skip
    loss.backward()
    want = RECORDED["losses"][form]
    assert loss.item() == pytest.approx(want["loss"], rel=1e-9)
    assert logprob.grad is not None
    assert logprob.grad.tolist() == pytest.approx(want["gradient"], rel=1e-9, abs=1e-12)


def test_the_batch_reaches_both_clips() -> None:
    ratio = (of("logprob") - of("logprob_mu")).exp()
    assert (ratio > 1 + RECORDED["high"]).any()
    assert (ratio < 1 - RECORDED["low"]).any()
