"""The four roles of ETPO: policy, critic, target (slow copy of the critic) and reference (frozen).

`FullRoles` holds separate weights; `LoraRoles` one frozen base with an adapter for each role that moves. The
learner knows only the `Roles` protocol, so a table of a small MDP can stand in a model's place.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from etpo.engine.models.final_norm import final_norm
from etpo.engine.models.language_model import LanguageModel
from etpo.engine.models.lora import ActiveRole, adapter_layers, add_adapters, merge_adapter, save_adapter
from etpo.engine.models.sequences import Sequences
from etpo.kernels import Stream

Role = Literal["policy", "critic", "target", "reference"]
MOVING: tuple[Role, ...] = ("policy", "critic", "target")
TRAINED: tuple[Role, Role] = ("policy", "critic")
SCALAR_HEAD = "scalar_head."
# Of adapters: what the final norm's gain is multiplied by, a role's own.
GAIN = "final_gain"


class Roles(Protocol):
    """What the learner asks of its models; `form` is `full` (weights of their own) or `lora`.

    `gain` names the parameter that scales the last hidden states, and how much more than it the gain is (0,
    or 1 in Gemma's norms); None where there is none.
    """

    form: str
    gain: tuple[str, float] | None

    def hidden(self, role: Role, sequences: Sequences) -> Tensor:
        """Last hidden states [K, D] of the suffix tokens."""
        ...

    def stream(self, role: Role, hidden: Tensor) -> Stream:
        """The hidden states with the role's LM head."""
        ...

    def value(self, role: Role, hidden: Tensor) -> Tensor:
        """The scalar head v(x) [K] of critic or target, float32."""
        ...

    def prepare(self, sequences: Sequences) -> None:
        """Before the first update, with its sequences: choose where weights can move."""
        ...

    def parameters(self, role: Role) -> dict[str, nn.Parameter]:
        """Every tensor of the role that can move, by name; the scalar head's come last, as `SCALAR_HEAD`…"""
        ...


@torch.no_grad()
def polyak(roles: Roles, tau: float) -> None:
    """Q̄ ← τ·Q̄ + (1 − τ)·Q."""
    slow, fast = roles.parameters("target"), roles.parameters("critic")
    torch._foreach_lerp_(list(slow.values()), [fast[name] for name in slow], 1.0 - tau)


class _ScalarHeads:
    """The scalar heads of critic and target: zero at the start, float32."""

    def __init__(self, model: LanguageModel, moves: tuple[Role, ...]) -> None:
        self.heads: dict[Role, nn.Linear] = {
            role: nn.Linear(model.hidden_size, 1, device=model.device)
            for role in ("critic", "target")
            if role in moves
        }
        for role, head in self.heads.items():
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
            head.requires_grad_(role in TRAINED)

    def value(self, role: Role, hidden: Tensor) -> Tensor:
        value: Tensor = self.heads[role](hidden.float())
        return value.squeeze(-1)

    def parameters(self, role: Role) -> dict[str, nn.Parameter]:
        named = self.heads[role].named_parameters() if role in self.heads else ()
        return {SCALAR_HEAD + name: parameter for name, parameter in named}


class FullRoles:
    """A model of its own for each role that moves; the other roles are the model as it was given.

    Args:
        moves: the roles that get a copy.
    """

    form = "full"

    def __init__(self, model: LanguageModel, moves: tuple[Role, ...] = MOVING) -> None:
        self.moves = moves
        self.models: dict[Role, LanguageModel] = dict.fromkeys(get_args(Role), model)
        self.models |= {role: copy.deepcopy(model) for role in moves}
        model.requires_grad_(False)
        for role in moves:
            self.models[role].requires_grad_(role in TRAINED)
        norm = final_norm(model.hf, model.hidden_size)
        self.gain = None if norm is None else (f"{norm.name}.weight", norm.offset)
        self._scalar = _ScalarHeads(model, moves)

    def hidden(self, role: Role, sequences: Sequences) -> Tensor:
        return sequences.hidden(self.models[role])

    def stream(self, role: Role, hidden: Tensor) -> Stream:
        return _stream(self.models[role], hidden)

    def value(self, role: Role, hidden: Tensor) -> Tensor:
        return self._scalar.value(role, hidden)

    def prepare(self, sequences: Sequences) -> None:
        """All weights move; there is nothing to choose."""

    def parameters(self, role: Role) -> dict[str, nn.Parameter]:
        own = dict(self.models[role].hf.named_parameters()) if role in self.moves else {}
        return own | self._scalar.parameters(role)

    @contextmanager
    def acting(self, role: Role) -> Iterator[LanguageModel]:
        """The model of a role, to draw actions from."""
        yield self.models[role]

    def hand_over(self, role: Role) -> LanguageModel:
        """The model of a role, to keep."""
        return self.models[role]

    def save(self, role: Role, folder: Path, base_name: str) -> None:
        """Write the role as a model folder that `from_pretrained` loads."""
        self.models[role].hf.save_pretrained(folder)

    def merged(self, role: Role) -> nn.Module:
        """The role as one plain Hugging Face model."""
        model: nn.Module = self.models[role].hf
        return model


class LoraRoles:
    """One frozen base with an adapter for each role that moves; the other roles are the base itself.

    Args:
        rank: r of every adapter.
        moves: the roles that get one; a target beside its critic.
    """

    form = "lora"

    def __init__(self, model: LanguageModel, rank: int, moves: tuple[Role, ...] = MOVING) -> None:
        self.model, self.rank, self.moves = model, rank, moves
        self._norm = final_norm(model.hf, model.hidden_size)
        self._gains: dict[Role, nn.Parameter] = {}
        self.gain: tuple[str, float] | None = None
        if self._norm is not None:
            self.gain = GAIN, 0.0
            ones = torch.ones(model.hidden_size, device=model.device)
            self._gains = {role: nn.Parameter(ones.clone(), role in TRAINED) for role in moves}
            # For transformers' own forward; the lean one multiplies by itself.
            self._hook = self._norm.module.register_forward_hook(lambda *call: model.scaled(call[-1]))
        head = model.hf.get_output_embeddings()
        self._active: ActiveRole = add_adapters(model.hf, head, list(moves), rank)
        self._layers = adapter_layers(model.hf)
        for layer in self._layers.values() if "target" in moves else ():
            for factors in (layer.lora_a, layer.lora_b):
                factors["target"].data.copy_(factors["critic"].data)
                factors["target"].requires_grad_(False)
        self._scalar = _ScalarHeads(model, moves)

    def hidden(self, role: Role, sequences: Sequences) -> Tensor:
        with self.acting(role) as model:
            return sequences.hidden(model)

    def stream(self, role: Role, hidden: Tensor) -> Stream:
        return _stream(self.model, hidden)

    def value(self, role: Role, hidden: Tensor) -> Tensor:
        return self._scalar.value(role, hidden)

    @torch.no_grad()
    def prepare(self, sequences: Sequences) -> None:
        """Point the adapters at what their layers read of these sequences; not once any has moved."""
        if not any(b.any() for layer in self._layers.values() for b in layer.lora_b.values()):
            self._active.looks = True
            try:
                self.hidden("reference", sequences)
            finally:
                self._active.looks = False

    def parameters(self, role: Role) -> dict[str, nn.Parameter]:
        if role not in self.moves:
            return {}
        own = {}
        for name, layer in self._layers.items():
            own[f"{name}.lora_A.weight"] = layer.lora_a[role]
            own[f"{name}.lora_B.weight"] = layer.lora_b[role]
        if role in self._gains:
            own[GAIN] = self._gains[role]
        return own | self._scalar.parameters(role)

    @contextmanager
    def acting(self, role: Role) -> Iterator[LanguageModel]:
        """The base with the role's adapter in force."""
        before = self._active.name, self.model.gain
        try:
            yield self.hand_over(role)
        finally:
            self._active.name, self.model.gain = before

    def hand_over(self, role: Role) -> LanguageModel:
        """The base with the role's adapter in force, not only for a while: for who keeps the model."""
        self._active.name = role if role in self.moves else None
        self.model.gain = self._gains.get(role)
        return self.model

    def save(self, role: Role, folder: Path, base_name: str) -> None:
        """Write the role's adapter in PEFT's format."""
        norms = self._norm.scaled(self._gains[role].detach()) if self._norm is not None else {}
        save_adapter(self.model.hf, role, self.rank, base_name, folder, norms)

    def merged(self, role: Role) -> nn.Module:
        """The role as one plain Hugging Face model; this object is used up."""
        model: nn.Module = self.model.hf
        merge_adapter(model, role)
        if self._norm is not None:
            self._hook.remove()
            for name, tensor in self._norm.scaled(self._gains[role].detach()).items():
                model.get_parameter(name).data.copy_(tensor)
            self._gains, self.model.gain = {}, None
        return model


def _stream(model: LanguageModel, hidden: Tensor) -> Stream:
    return Stream(
        hidden, model.head_weight, model.head_bias, temperature=model.temperature, softcap=model.softcap
    )
