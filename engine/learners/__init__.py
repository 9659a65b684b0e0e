"""The algorithms, one file each; the loop knows them only as `Learner`.

A learner may import the models, the replay buffer, targets, losses, the bounded step and the optimisers, and
no other learner. To add one, write `engine/learners/NAME.py` with a class `NAMELearner` and name it in
`ALGORITHMS`: `--algo`, its help and the checks of a configuration read that table.
"""

import importlib
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, cast

if TYPE_CHECKING:  # torch is imported when an algorithm is looked up, not to print help
    from torch import Tensor

    from etpo.engine.config import Config
    from etpo.engine.models.roles import Role, Roles
    from etpo.engine.replay import Action


@dataclass(frozen=True)
class Algorithm:
    """Where the class of an algorithm stands, what it does, in half a sentence, and what suits it.

    Attributes:
        lr: step size of the policy, by optimiser; where one is not named, that of `LEARNING_RATES`.
        lam: λ of its traces.
        max_kl: the KL by which one update may move the policy, nat a token.
    """

    class_path: str
    help: str
    lr: dict[str, float] = field(default_factory=dict)
    lam: float = 1.0
    max_kl: float = 0.05


_HERE = "etpo.engine.learners"
ALGORITHMS = {
    "etpo": Algorithm(f"{_HERE}.etpo:EtpoLearner", "learns by soft values of every token", {"sgd": 0.2}, 1.0),
    "etpo-q": Algorithm(
        f"{_HERE}.etpo_q:EtpoQLearner", "as the paper, with a critic network", {"sgd": 0.5}, max_kl=0.02
    ),
    "ppo-kl": Algorithm(f"{_HERE}.ppo_kl:PpoKlLearner", "PPO of whole programs", {"sgd": 0.1}, 0.95),
    "rloo": Algorithm(f"{_HERE}.rloo:RlooLearner", "REINFORCE, leave-one-out", {"sgd": 0.2}),
    "grpo": Algorithm(f"{_HERE}.grpo:GrpoLearner", "GRPO and its corrections", {"sgd": 0.5}),
    "reflection": Algorithm(
        f"{_HERE}.reflection:ReflectionLearner",
        "only retries with the error message, the model stays as it is",
    ),
}


@dataclass(frozen=True)
class Credit:
    """What an update knew of the tokens of some actions, from numbers that it computed anyway; for the page.

    Rows are tokens: those of `actions` one after another, K in all. None: the algorithm has no such number.

    Attributes:
        actions: the actions, each as the loop gave it.
        advantage: [K], with what the update weighed each token, in reward units.
        logprob_ref: [K], log π̄(w_k), nat.
        q, v: [K], Q(x_k, w_k) and V(x_k), in reward units.
    """

    actions: "list[Action]"
    advantage: "Tensor | None" = None
    logprob_ref: "Tensor | None" = None
    q: "Tensor | None" = None
    v: "Tensor | None" = None


@dataclass(frozen=True)
class UpdateLog:
    """What one update did; a number that an algorithm does not have is None.

    Attributes:
        kl_update: mean KL(π_before ‖ π_after) in nat a token on the fresh actions.
        step_share: the share of the policy's step that was kept (1 unless the bound cut it).
        loss_q, loss_pi: the critic's and the policy's loss, means over the update's minibatches.
        q_mean, v_mean: Q̄ and V̄ over action tokens, in reward units.
        credit: what the update knew of single tokens.
    """

    kl_update: float | None = None
    step_share: float | None = None
    loss_q: float | None = None
    loss_pi: float | None = None
    q_mean: float | None = None
    v_mean: float | None = None
    credit: Credit | None = field(default=None, repr=False)

    def numbers(self) -> dict[str, float | None]:
        """All but `credit`, by name."""
        return {name: getattr(self, name) for name in UPDATE_KEYS}


UPDATE_KEYS = tuple(one.name for one in fields(UpdateLog) if one.name != "credit")


class Learner(Protocol):
    """What the loop and a run need of an algorithm.

    Attributes:
        moves: the roles that have weights of their own; the others are the model at the start.
        acts: the role that draws the programs.
    """

    moves: "ClassVar[tuple[Role, ...]]"
    acts: "ClassVar[Role]"

    def __init__(self, roles: "Roles", config: "Config") -> None: ...

    def update(self, fresh: "list[Action]") -> UpdateLog | None:
        """Learn from the actions of this iteration, drawn by `acts` as it is now; each has `hidden`.

        None where nothing was updated.
        """
        ...

    def tensors(self) -> "dict[str, Tensor]":
        """What a checkpoint keeps as tensors, apart from the roles' weights: moments, replayed actions."""
        ...

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps as JSON: random states, counters."""
        ...

    def restore(self, tensors: "dict[str, Tensor]", state: dict[str, Any]) -> None:
        """Take up what `tensors` and `state` gave; both may hold more than that."""
        ...


def learner_class(algo: str) -> type[Learner]:
    """The class of an algorithm of `ALGORITHMS`."""
    module, _, name = ALGORITHMS[algo].class_path.partition(":")
    return cast(type[Learner], getattr(importlib.import_module(module), name))
