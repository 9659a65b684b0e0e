"""Whole actions, the replay buffer that keeps them, and the batch that the update reads.

A token state x_k = (prompt, w_1 … w_{k-1}); an action of L tokens has L of them. A batch packs the token
states of its actions in one row (axis K), in the order of time inside every episode, and behind them the M
states from which it bootstraps: the first state after an action whose successor is not in the batch.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from etpo.engine.models.sequences import Sequences


@dataclass
class Action:
    """One action as it was drawn, and what the environment answered.

    Attributes:
        prompt: int64 [P ≥ 1], the tokens of the text state.
        tokens: int64 [L ≥ 1], the stop token included where it was drawn.
        logprob_mu: float32 [L], log-probability with which each token was really drawn.
        reward: paid after the last token.
        terminated: True where no state follows.
        next_prompt: int64 [≥ 1], the next text state; None where `terminated`.
        env, episode, t: where the action stands; t counts actions inside the episode.
        hidden: [L, D], the policy's hidden states as drawn; dropped after the update that follows.
        hidden_ref: [L (+ 1 with a next prompt), D], the reference's hidden states, once they are known.
    """

    prompt: Tensor
    tokens: Tensor
    logprob_mu: Tensor
    reward: float
    terminated: bool
    next_prompt: Tensor | None
    env: int
    episode: int
    t: int
    hidden: Tensor | None = field(default=None, repr=False)
    hidden_ref: Tensor | None = field(default=None, repr=False)

    def follows(self, other: "Action") -> bool:
        """True where this action is the next one of the same episode."""
        return (self.env, self.episode, self.t) == (other.env, other.episode, other.t + 1)


@dataclass(frozen=True)
class ActionBatch:
    """Packed token states of some actions; axes: K token states, M bootstrap states, A actions.

    Attributes:
        actions: the A actions, in the order of (env, episode, t).
        tokens_K: int64, the token drawn at each state.
        logprob_mu_K: float32, the log-probability with which it was drawn.
        reward_K, discount_K: float32, ρ and d of the flattened episode.
        next_K: int64 into the K + M states, the state after each token (0 where the discount is 0).
        trace_goes_on_K: True where that state is again one of the K, so that a trace may pass through it.
        prompts, suffixes: for each of A + M sequences, the shared part (may be empty) and the tokens whose
            hidden states are the states of K + M.
    """

    actions: list[Action]
    tokens_K: Tensor
    logprob_mu_K: Tensor
    reward_K: Tensor
    discount_K: Tensor
    next_K: Tensor
    trace_goes_on_K: Tensor
    prompts: list[Tensor]
    suffixes: list[Tensor]

    @property
    def n_tokens(self) -> int:
        return len(self.tokens_K)

    def sequences(self, *, bootstraps: bool = False) -> Sequences:
        """The forward that gives hidden states of the K token states, or of K + M with `bootstraps`."""
        end = None if bootstraps else len(self.actions)
        return Sequences(self.prompts[:end], self.suffixes[:end])


def collate(actions: list[Action], gamma: float) -> ActionBatch:
    """Pack actions for the update.

    Args:
        actions: at least one; any order.
        gamma: discount between time steps.
    """
    if not actions:
        raise ValueError("collate: expected at least one action, got none")
    actions = sorted(actions, key=lambda a: (a.env, a.episode, a.t))
    lengths = [len(a.tokens) for a in actions]
    n_tokens = sum(lengths)
    reward_K, discount_K = torch.zeros(n_tokens), torch.ones(n_tokens)
    next_K = torch.arange(1, n_tokens + 1)
    goes_on_K = torch.ones(n_tokens, dtype=torch.bool)
    bootstraps: list[Tensor] = []
    end = 0
    for index, (action, length) in enumerate(zip(actions, lengths, strict=True)):
        end += length
        last = end - 1
        reward_K[last] = action.reward
        discount_K[last] = 0.0 if action.terminated else gamma
        has_successor = index + 1 < len(actions) and actions[index + 1].follows(action)
        if action.terminated or not has_successor:
            goes_on_K[last] = False
            next_K[last] = 0
        if not action.terminated and not has_successor:
            assert action.next_prompt is not None
            next_K[last] = n_tokens + len(bootstraps)
            bootstraps.append(action.next_prompt)
    starts = [(a.prompt[:-1], torch.cat((a.prompt[-1:], a.tokens[:-1]))) for a in actions]
    starts += [(prompt[:-1], prompt[-1:]) for prompt in bootstraps]
    return ActionBatch(
        actions=actions,
        tokens_K=torch.cat([a.tokens for a in actions]),
        logprob_mu_K=torch.cat([a.logprob_mu for a in actions]),
        reward_K=reward_K,
        discount_K=discount_K,
        next_K=next_K,
        trace_goes_on_K=goes_on_K,
        prompts=[prompt for prompt, _ in starts],
        suffixes=[suffix for _, suffix in starts],
    )


def known(hidden: Tensor | None) -> Tensor:
    """Hidden states of an action that must be there by now."""
    assert hidden is not None
    return hidden


_PACKED = ("prompt", "tokens", "logprob_mu", "next_prompt", "hidden_ref")
_PLAIN = ("reward", "terminated", "env", "episode", "t")


class Replay:
    """A first-in, first-out buffer of whole actions.

    Args:
        capacity: most actions kept; one batch of them is the on-policy setting.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.actions: list[Action] = []

    def __len__(self) -> int:
        return len(self.actions)

    def add(self, actions: list[Action]) -> None:
        self.actions = (self.actions + actions)[-self.capacity :]

    def state(self) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        """The buffer as one packed tensor a field, and the rest of each action as JSON."""
        entries: list[dict[str, Any]] = []
        rows: dict[str, list[Tensor]] = {}
        for action in self.actions:
            lengths = {}
            for name in _PACKED:
                value = getattr(action, name)
                if value is not None:
                    rows.setdefault(name, []).append(value)
                    lengths[name] = len(value)
            entries.append({name: getattr(action, name) for name in _PLAIN} | {"lengths": lengths})
        return {name: torch.cat(values) for name, values in rows.items()}, entries

    def restore(
        self,
        packed: dict[str, Tensor],
        entries: list[dict[str, Any]],
        device: torch.device | str = "cpu",
    ) -> None:
        """The inverse of `state`.

        Args:
            packed, entries: what `state` gave, on any device.
            device: where the model is, and fresh actions' hidden states with it.
        """
        if "hidden_ref" in packed:
            packed = packed | {"hidden_ref": packed["hidden_ref"].to(device)}
        begin = dict.fromkeys(packed, 0)
        self.actions = []
        for entry in entries:
            fields: dict[str, Any] = {name: entry[name] for name in _PLAIN} | {"next_prompt": None}
            for name, length in entry["lengths"].items():
                fields[name] = packed[name][begin[name] : begin[name] + length]
                begin[name] += length
            self.actions.append(Action(**fields))

    def sample(self, n_actions: int, rng: np.random.Generator) -> list[Action]:
        """About `n_actions` actions drawn without replacement, whole episodes at a time.

        An episode comes whole, as far as the buffer still holds it, so that traces can run through it; the
        last one drawn may pass `n_actions`.
        """
        episodes: dict[tuple[int, int], list[Action]] = {}
        for action in self.actions:
            episodes.setdefault((action.env, action.episode), []).append(action)
        groups = list(episodes.values())
        drawn: list[Action] = []
        for index in rng.permutation(len(groups)):
            if len(drawn) >= n_actions:
                break
            drawn += groups[index]
        return drawn
