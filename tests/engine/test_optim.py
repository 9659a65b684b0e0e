"""Which parameters an optimiser moves, in which order, and how far a step of each group goes."""

from dataclasses import replace

import pytest
import torch

from etpo.engine.config import Config
from etpo.engine.learners.etpo import Learner
from etpo.engine.models.language_model import load_language_model
from etpo.engine.models.roles import FINAL_GAIN, TRAINED, FullRoles, LoraRoles
from etpo.engine.optim import LEARNING_RATES


def learner(form: str = "full", **changes: object) -> Learner:
    model, _ = load_language_model("etpo-nano", torch.float32, "cpu")
    roles = FullRoles(model) if form == "full" else LoraRoles(model, 4)
    return Learner(roles, replace(Config(), **changes))


@pytest.mark.parametrize("form", ["full", "lora"])
def test_optimized_names_the_optimizers_parameters_in_their_order(form):
    """Checkpoints store an optimiser's state under these names."""
    trained = learner(form)
    for role in TRAINED:
        named = trained.roles.parameters(role)
        groups = trained.optimizers[role].param_groups
        held = [id(p) for group in groups for p in group["params"]]
        assert held == [id(named[name]) for name in trained.optimized[role]]
        assert sorted(held) == sorted(id(p) for p in named.values())


def test_the_gains_step_is_a_share_of_its_squared_norm():
    rates = LEARNING_RATES["sgd"]
    trained = learner(lr=0.25)
    gain = trained.roles.parameters("policy")[FINAL_GAIN]
    (group,) = [g for g in trained.optimizers["policy"].param_groups if g["params"][0] is gain]
    assert len(group["params"]) == 1
    assert group["lr"] == pytest.approx(0.25 * rates.gain * gain.detach().square().sum().item())


def test_a_step_of_the_gain_moves_the_logarithm_of_all_logits_alike_in_every_model():
    """ln‖g‖ moves by −lr·share·∂L/∂ln s, however large the gain is: a model is the same when its gain is
    doubled and its head halved."""
    moves = []
    for factor in (1.0, 2.0):
        trained = learner()
        gain = trained.roles.parameters("policy")[FINAL_GAIN]
        with torch.no_grad():
            gain.mul_(factor)
        trained = Learner(trained.roles, trained.config)
        before = gain.detach().clone()
        slope = 0.01  # ∂L/∂ln s, where the gain is s·g: ∂L/∂g = slope·g/‖g‖²
        gain.grad = slope * before / before.square().sum()
        trained.optimizers["policy"].step()
        moves.append((gain.detach().norm().log() - before.norm().log()).item())
    assert moves[0] == pytest.approx(moves[1], rel=1e-3)
    rates = LEARNING_RATES["sgd"]
    assert moves[0] == pytest.approx(-rates.policy * rates.gain * 0.01, rel=1e-2)


def test_adapters_and_adam_have_no_group_for_the_gain():
    assert len(learner("lora").optimizers["policy"].param_groups) == 1
    adam = learner(optimizer="adamw").optimizers["policy"]
    assert {group["lr"] for group in adam.param_groups} == {LEARNING_RATES["adamw"].policy}
