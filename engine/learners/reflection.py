"""The baseline that learns nothing: the model as it was given retries, with the error in its prompt."""

from typing import Any, ClassVar

from torch import Tensor

from etpo.engine.config import Config
from etpo.engine.models.roles import Role, Roles
from etpo.engine.replay import Action


class ReflectionLearner:
    """Draws from the reference, never updates, and keeps nothing."""

    moves: ClassVar[tuple[Role, ...]] = ()
    acts: ClassVar[Role] = "reference"

    def __init__(self, roles: Roles, config: Config) -> None:
        pass

    def update(self, fresh: list[Action]) -> None:
        return None

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        pass
