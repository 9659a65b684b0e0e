"""A table in a language model's place: `Roles` whose hidden states are one-hot token states."""

import numpy as np
import torch
from torch import Tensor, nn

from etpo.engine.models.roles import SCALAR_HEAD, Role
from etpo.engine.models.sequences import Sequences
from etpo.engine.replay import Action
from etpo.envs.words.mdp import WordMDP
from etpo.kernels import Stream


class TabularRoles:
    """Every role is a table of logits [V, X]; a prompt is the one token s, the state's number.

    The reference's table is log π̄, and all start there, as language models do.
    """

    form = "full"
    gain = None

    def __init__(self, mdp: WordMDP) -> None:
        self.words = mdp.words
        self.n_states = len(mdp.reference_XV)
        start = torch.tensor(np.log(mdp.reference_XV.T), dtype=torch.float32)
        self.tables = {
            role: nn.Parameter(start.clone(), requires_grad=role in ("policy", "critic"))
            for role in ("policy", "critic", "target", "reference")
        }
        self.values = {
            role: nn.Parameter(torch.zeros(self.n_states), requires_grad=role == "critic")
            for role in ("critic", "target")
        }

    def prepare(self, sequences: Sequences) -> None:
        """Nothing to choose."""

    def hidden(self, role: Role, sequences: Sequences) -> Tensor:
        ids = []
        for suffix in sequences.suffixes:
            state, *prefix = suffix.tolist()
            ids += [self.token_state(state, tuple(prefix[:j])) for j in range(len(prefix) + 1)]
        return torch.eye(self.n_states)[ids]

    def token_state(self, state: int, prefix: tuple[int, ...]) -> int:
        return state * len(self.words.prefixes) + self.words.prefix_ids[prefix]

    def stream(self, role: Role, hidden: Tensor) -> Stream:
        return Stream(hidden, self.tables[role])

    def value(self, role: Role, hidden: Tensor) -> Tensor:
        return hidden @ self.values[role]

    def parameters(self, role: Role) -> dict[str, nn.Parameter]:
        own = {"table": self.tables[role]}
        return own | {SCALAR_HEAD + "table": self.values[role]} if role in self.values else own

    def policy_XV(self, role: Role = "policy") -> np.ndarray:
        """softmax of the role's table in float64, [X, V]."""
        return self.tables[role].detach().double().softmax(0).T.numpy()


def play(
    mdp: WordMDP, roles: TabularRoles, role: Role, n_actions: int, episode: int, rng: np.random.Generator
) -> list[Action]:
    """`n_actions` actions of a role, each from a first state of its own, cut off after that action."""
    policy_XV = roles.policy_XV(role)
    actions = []
    for i in range(n_actions):
        state = int(rng.choice(len(mdp.start_S), p=mdp.start_S))
        word: tuple[int, ...] = ()
        logprobs = []
        while not logprobs or not mdp.words.ends_after(word[:-1], word[-1]):
            p = policy_XV[roles.token_state(state, word)]
            word = (*word, int(rng.choice(len(p), p=p / p.sum())))
            logprobs.append(np.log(p[word[-1]]))
        a = mdp.words.word_ids[word]
        over = bool(mdp.terminated_SA[state, a])
        next_state = int(rng.choice(len(mdp.start_S), p=mdp.next_SAS[state, a]))
        actions.append(Action(
            prompt=torch.tensor([state]), tokens=torch.tensor(word),
            logprob_mu=torch.tensor(logprobs, dtype=torch.float32), reward=float(mdp.reward_SA[state, a]),
            terminated=over, next_prompt=None if over else torch.tensor([next_state]),
            env=i, episode=episode, t=0,
        ))  # fmt: skip
    tokens = Sequences(
        [a.prompt[:-1] for a in actions], [torch.cat((a.prompt, a.tokens[:-1])) for a in actions]
    )
    hidden = roles.hidden("policy", tokens)
    for action, rows in zip(actions, hidden.split([len(a.tokens) for a in actions]), strict=True):
        action.hidden = rows
    return actions
