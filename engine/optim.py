"""The optimisers of the trained roles: which parameters move, and how far a step of each group goes."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from etpo.engine.config import Config
from etpo.engine.learners import ALGORITHMS
from etpo.engine.models.roles import SCALAR_HEAD, Role, Roles
from etpo.engine.rates import LEARNING_RATES, LearningRates


class Lion(torch.optim.Optimizer):
    """θ ← θ − lr·sign(β₁·m + (1 − β₁)·g);  m ← β₂·m + (1 − β₂)·g  (Chen 2023, arXiv:2302.06675)."""

    def __init__(self, params: Iterable[Any], lr: float, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                p.sub_(torch.lerp(p.grad, momentum, beta1).sign_(), alpha=group["lr"])
                momentum.lerp_(p.grad, 1.0 - beta2)


@dataclass
class RoleOptimizer:
    """The optimiser of one role.

    Attributes:
        role: whose weights it moves.
        parameters: them, in the order of the groups.
        optimizer: with groups of its own.
        names: theirs, in the same order.
    """

    role: Role
    parameters: list[torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    names: list[str]

    def zero_grad(self) -> None:
        """Forget the gradients of the step before."""
        self.optimizer.zero_grad(set_to_none=True)

    def step(self, clip_norm: float) -> None:
        """Take one step along the gradients, those of the scalar head and those of the rest cut to a norm of
        at most `clip_norm` each: the head's are a hundred times larger, and would decide for all."""
        for parameters in self._clipped_apart():
            torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
        self.optimizer.step()

    def _clipped_apart(self) -> list[list[torch.nn.Parameter]]:
        named = list(zip(self.names, self.parameters, strict=True))
        head = [p for name, p in named if name.startswith(SCALAR_HEAD)]
        return [[p for name, p in named if not name.startswith(SCALAR_HEAD)], *([head] if head else [])]

    def forget(self) -> None:
        """Forget the moments: they point far out of where the policy may go."""
        self.optimizer.state.clear()

    def tensors(self) -> dict[str, Tensor]:
        """Its moments, by name, for a checkpoint."""
        return flatten_optimizer(f"optimizer.{self.role}", self.optimizer, self.names)

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take up the moments that `tensors` gave."""
        restore_optimizer(f"optimizer.{self.role}", self.optimizer, self.names, tensors)


def optimizers_of(roles: Roles, config: Config) -> list[RoleOptimizer]:
    """The optimisers of policy and critic: as configured, or what suits the form of the roles."""
    name, rates = rates_of(config, roles.form)
    return [
        role_optimizer(roles, "policy", name, rates.policy, rates),
        role_optimizer(roles, "critic", name, rates.critic, rates),
    ]


def policy_optimizer(roles: Roles, config: Config) -> RoleOptimizer:
    """The policy's optimiser alone, for learners of one network."""
    name, rates = rates_of(config, roles.form)
    return role_optimizer(roles, "policy", name, rates.policy, rates)


def rates_of(config: Config, form: str) -> tuple[str, LearningRates]:
    """The optimiser's name and step sizes: as configured, or those that suit the form of the roles."""
    name = config.optimizer
    if name == "auto":
        name = "sgd"
    policy = ALGORITHMS[config.algo].lr.get(name)
    given = {
        "policy": config.lr if config.lr is not None else policy,
        "critic": config.critic_lr,
        "value": config.value_lr,
    }
    return name, LEARNING_RATES[name]._replace(**{k: lr for k, lr in given.items() if lr is not None})


def role_optimizer(roles: Roles, role: Role, name: str, lr: float, rates: LearningRates) -> RoleOptimizer:
    """An optimiser whose groups of weights have step sizes of their own.

    The final norm's gain scales every logit of the model: a policy turns sharper, and slips of the pen
    rarer, by this one direction, which the small step of the other weights would hardly move. With a step
    in proportion to its squared norm, its logarithm moves alike in every model. The scalar head: v starts
    at 0 and has to cross the whole range of returns, or its lag pushes every drawn token the same way.

    Args:
        roles, role: whose weights.
        name: of the optimiser, as `Config.optimizer` spells it.
        lr: step size of most weights.
        rates: those of the gain and of the scalar head.
    """
    named = roles.parameters(role)
    gain_name, offset = roles.gain or ("", 0.0)
    gain = {name: p for name, p in named.items() if name == gain_name}
    head = {name: p for name, p in named.items() if name.startswith(SCALAR_HEAD)}
    body = {name: p for name, p in named.items() if name not in gain and name not in head}
    groups: list[dict[str, Any]] = [{"params": list(body.values()), "lr": lr}]
    for parameter in gain.values():
        share = rates.gain
        factor = 1.0 if share is None else share * (parameter.detach().float() + offset).square().sum().item()
        groups.append({"params": [parameter], "lr": lr * factor})
    if head:
        groups.append({"params": list(head.values()), "lr": rates.value})
    optimizer = make_optimizer(name, groups, lr)
    ordered = body | gain | head
    return RoleOptimizer(role, list(ordered.values()), optimizer, list(ordered))


def make_optimizer(name: str, groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
    """Momentum SGD, AdamW or Lion; none decays weights (the KL to the reference is the regulariser)."""
    if name == "lion":
        return Lion(groups, lr)
    if name == "sgd":
        return torch.optim.SGD(groups, lr, momentum=0.9, foreach=True)
    return torch.optim.AdamW(groups, lr, betas=(0.9, 0.95), weight_decay=0.0, foreach=True)


def flatten_optimizer(prefix: str, optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, Tensor]:
    """An optimiser's per-parameter state as named tensors; `names` in the order of its parameters."""
    flat = {}
    for index, entry in optimizer.state_dict()["state"].items():
        for key, value in entry.items():
            flat[f"{prefix}/{names[index]}/{key}"] = torch.as_tensor(value)
    return flat


def restore_optimizer(
    prefix: str, optimizer: torch.optim.Optimizer, names: list[str], tensors: dict[str, Tensor]
) -> None:
    """The inverse of `flatten_optimizer`."""
    own = optimizer.state_dict()
    own["state"] = {}
    index_of = {name: index for index, name in enumerate(names)}
    for full, tensor in tensors.items():
        if full.startswith(prefix + "/"):
            name, key = full[len(prefix) + 1 :].rsplit("/", 1)
            own["state"].setdefault(index_of[name], {})[key] = tensor
    optimizer.load_state_dict(own)
