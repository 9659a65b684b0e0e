"""Which parameters an optimiser moves, in which order, and how far a step of each group goes."""

import pytest
import torch

from etpo.engine.config import Config
from etpo.engine.models.language_model import load_language_model
from etpo.engine.models.roles import FullRoles, LoraRoles
from etpo.engine.optim import optimizers_of
from etpo.engine.rates import LEARNING_RATES


def roles_of(form: str) -> FullRoles | LoraRoles:
    """Of the bundled model."""
    model, _ = load_language_model("etpo-nano", torch.float32, "cpu")
    return FullRoles(model) if form == "full" else LoraRoles(model, 4)


@pytest.mark.parametrize("form", ["full", "lora"])
def test_names_are_those_of_the_optimizers_parameters_in_their_order(form):
    """Checkpoints store an optimiser's state under these names."""
    roles = roles_of(form)
    for trained in optimizers_of(roles, Config(algo="etpo-q")):
        named = roles.parameters(trained.role)
        held = [id(p) for group in trained.optimizer.param_groups for p in group["params"]]
        assert held == [id(named[name]) for name in trained.names]
        assert sorted(held) == sorted(id(p) for p in named.values())


def test_the_gains_step_is_a_share_of_its_squared_norm():
    rates = LEARNING_RATES["sgd"]
    roles = roles_of("full")
    policy, _ = optimizers_of(roles, Config(lr=0.25))
    gain = roles.parameters("policy")[roles.gain[0]]
    (group,) = [g for g in policy.optimizer.param_groups if g["params"][0] is gain]
    assert len(group["params"]) == 1
    assert group["lr"] == pytest.approx(0.25 * rates.gain * gain.detach().square().sum().item())


def test_a_step_of_the_gain_moves_the_logarithm_of_all_logits_alike_in_every_model():
    """ln‖g‖ moves by −lr·share·∂L/∂ln s, however large the gain is: a model is the same when its gain is
    doubled and its head halved."""
    moves = []
    for factor in (1.0, 2.0):
        roles = roles_of("full")
        gain = roles.parameters("policy")[roles.gain[0]]
        with torch.no_grad():
            gain.mul_(factor)
        policy, _ = optimizers_of(roles, Config(algo="etpo-q"))
        before = gain.detach().clone()
        slope = 0.01  # ∂L/∂ln s, where the gain is s·g: ∂L/∂g = slope·g/‖g‖²
        gain.grad = slope * before / before.square().sum()
        policy.optimizer.step()
        moves.append((gain.detach().norm().log() - before.norm().log()).item())
    assert moves[0] == pytest.approx(moves[1], rel=1e-3)
    rates = LEARNING_RATES["sgd"]
    assert moves[0] == pytest.approx(-rates.policy * rates.gain * 0.01, rel=1e-2)


def test_head_and_body_are_clipped_apart():
    """The scalar head's gradient is a hundred times the body's: one norm would cut the body to nothing."""
    roles = roles_of("full")
    _, critic = optimizers_of(roles, Config(algo="etpo-q"))
    before = {name: p.detach().clone() for name, p in roles.parameters("critic").items()}
    for name, p in roles.parameters("critic").items():
        p.grad = torch.full_like(p, 100.0 if name.startswith("scalar_head") else 1e-4)
    body = [p for name, p in roles.parameters("critic").items() if not name.startswith("scalar_head")]
    assert torch.nn.utils.get_total_norm([p.grad for p in body]) < 1.0
    critic.step(clip_norm=1.0)
    rate = LEARNING_RATES["sgd"]
    name = "model.layers.0.mlp.up_proj.weight"
    moved = before[name] - roles.parameters("critic")[name]
    torch.testing.assert_close(moved, torch.full_like(moved, rate.critic * 1e-4), rtol=1e-2, atol=1e-7)
    head = [p.grad for name, p in roles.parameters("critic").items() if name.startswith("scalar_head")]
    assert torch.nn.utils.get_total_norm(head).item() == pytest.approx(1.0, rel=1e-3)


def test_adam_has_no_group_for_the_gain():
    adam, _ = optimizers_of(roles_of("full"), Config(optimizer="adamw"))
    assert {group["lr"] for group in adam.optimizer.param_groups} == {LEARNING_RATES["adamw"].policy}
