"""Small decision processes whose actions are words of tokens, as exact float64 tables.

Two views of the same process:

- `WordMDP`, action level: in state s the agent says a whole word a, earns r(s, a) and moves to s'.
- `TokenTable`, token level: a *token state* is x = (s, tokens of the word said so far), and each token is a
  step. Only the last token of a word pays and moves on; the tokens before it pay 0 with discount 1.

Axes: S states, A words, X token states, V tokens. Every table is float64, bool or int64.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

STOP = 0


@dataclass(frozen=True)
class Words:
    """The words that an agent may say: one letter a token.

    Args:
        letters: the vocabulary; the token's id is the letter's position. At least two, all different.
        max_tokens: longest word. A word of this length ends whatever its last token is.
        has_stop: with True token 0 (`STOP`) ends a word and is its last token, so that words vary in
            length; with False every word has exactly `max_tokens` tokens.

    Raises:
        ValueError: fewer than two letters, a repeated letter, or `max_tokens` below 1.
    """

    letters: str
    max_tokens: int
    has_stop: bool = True

    def __post_init__(self) -> None:
        if len(self.letters) < 2 or len(set(self.letters)) != len(self.letters):
            raise ValueError(f"letters: expected two or more different letters, got {self.letters!r}")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens: expected 1 or more, got {self.max_tokens}")

    @cached_property
    def prefixes(self) -> tuple[tuple[int, ...], ...]:
        """Every unfinished word, shortest first; the empty one is number 0."""
        inner = range(1 if self.has_stop else 0, len(self.letters))
        lengths = range(self.max_tokens)
        return tuple(prefix for length in lengths for prefix in product(inner, repeat=length))

    @cached_property
    def words(self) -> tuple[tuple[int, ...], ...]:
        """Every complete word: a prefix and the token that ends it."""
        tokens = range(len(self.letters))
        return tuple((*p, w) for p in self.prefixes for w in tokens if self.ends_after(p, w))

    @cached_property
    def prefix_ids(self) -> dict[tuple[int, ...], int]:
        return {prefix: i for i, prefix in enumerate(self.prefixes)}

    @cached_property
    def word_ids(self) -> dict[tuple[int, ...], int]:
        return {word: i for i, word in enumerate(self.words)}

    def ends_after(self, prefix: tuple[int, ...], token: int) -> bool:
        """True if `token` said after `prefix` is the last one of the word."""
        return len(prefix) + 1 == self.max_tokens or (self.has_stop and token == STOP)

    def parse(self, text: str) -> tuple[int, ...]:
        """The word that a text stands for.

        Letters behind the end of the word are ignored. With a stop token a text that ends too early is
        closed by it, so that a decoder may leave the stop token out of its text.

        Raises:
            ValueError: a letter outside the vocabulary, or too few letters where there is no stop token.
        """
        word: tuple[int, ...] = ()
        for letter in text:
            token = self.letters.find(letter)
            if token < 0:
                raise ValueError(f"action: expected letters out of {self.letters!r}, got {text!r}")
            word += (token,)
            if self.ends_after(word[:-1], token):
                return word
        if not self.has_stop:
            raise ValueError(f"action: expected {self.max_tokens} letters, got {text!r}")
        return (*word, STOP)

    def text(self, word: tuple[int, ...]) -> str:
        """The letters of a word."""
        return "".join(self.letters[token] for token in word)


@dataclass(frozen=True, eq=False)
class WordMDP:
    """A decision process over words, with a reference prior over the tokens of each word.

    Args:
        words: the actions.
        reward_SA: reward of word a in state s.
        terminated_SA: True where the episode is over after word a in state s.
        next_SAS: probability of the next state, each row sums to 1 (unused where terminated).
        start_S: probability of an episode's first state.
        reference_XV: π̄(w|x), positive, each row sums to 1; x = s · len(words.prefixes) + prefix number.

    Raises:
        ValueError: a shape that does not fit, a row that is no distribution, or a prior that is not positive.
    """

    words: Words
    reward_SA: Floats
    terminated_SA: Bools
    next_SAS: Floats
    start_S: Floats
    reference_XV: Floats

    def __post_init__(self) -> None:
        n_states = len(self.start_S)
        shape_SA = (n_states, len(self.words.words))
        expected = {
            "reward_SA": shape_SA,
            "terminated_SA": shape_SA,
            "next_SAS": (*shape_SA, n_states),
            "reference_XV": (n_states * len(self.words.prefixes), len(self.words.letters)),
        }
        for name, shape in expected.items():
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name}: expected shape {shape}, got {getattr(self, name).shape}")
        for name in ("next_SAS", "start_S", "reference_XV"):
            rows = getattr(self, name)
            if rows.min() < 0 or not np.allclose(rows.sum(-1), 1.0, rtol=0, atol=1e-9):
                raise ValueError(f"{name}: expected rows that sum to 1, got sums {rows.sum(-1).ravel()[:4]}")
        if self.reference_XV.min() <= 0:
            raise ValueError(f"reference_XV: expected positive entries, got {self.reference_XV.min()}")

    @property
    def reference_SA(self) -> Floats:
        """π̄(a|s) = Π_j π̄(w^j | s, w^{1:j−1}), [S, A]."""
        return word_probabilities(self.words, self.reference_XV)


def word_probabilities(words: Words, policy_XV: Floats) -> Floats:
    """Probability of each whole word under a token policy.

    Args:
        words: the actions.
        policy_XV: π(w|x), x = s · len(words.prefixes) + prefix number.

    Returns:
        π(a|s) = Π_j π(w^j | s, w^{1:j−1}), [S, A].
    """
    policy_SPV = policy_XV.reshape(-1, len(words.prefixes), len(words.letters))
    probability_SA = np.ones((len(policy_SPV), len(words.words)))
    for a, word in enumerate(words.words):
        for j, token in enumerate(word):
            probability_SA[:, a] *= policy_SPV[:, words.prefix_ids[word[:j]], token]
    return probability_SA


class Transition(NamedTuple):
    """What follows N tokens; each field has shape [N].

    next_x: token state after the token (of a fresh episode where terminated).
    reward: ρ, discount: d = γ·(1 − terminated) after a word's last token, else 1.
    """

    next_x: Ints
    reward: Floats
    discount: Floats
    terminated: Bools


@dataclass(frozen=True, eq=False)
class TokenTable:
    """The token-level process: what a learner with one-hot hidden states needs.

    reward_XV: ρ, paid at the last token of a word. next_XVX: probability of the next token state.
    ends_XV: True where the token is the last one of its word. terminated_XV: True where the episode is over
    after it. start_X: first token state of an episode. reference_XV: π̄(w|x).
    A policy on one-hot hidden states [N, X] with a head [V, X] can express every policy of the process.
    """

    reward_XV: Floats
    next_XVX: Floats
    ends_XV: Bools
    terminated_XV: Bools
    start_X: Floats
    reference_XV: Floats

    def discount_XV(self, gamma: float) -> Floats:
        """d = γ·(1 − terminated) at the last token of a word, else 1."""
        return np.where(self.ends_XV, gamma * ~self.terminated_XV, 1.0)

    def start(self, count: int, rng: np.random.Generator) -> Ints:
        """First token states of `count` episodes, [count]."""
        return _draw(np.broadcast_to(self.start_X, (count, len(self.start_X))), rng)

    def step(self, x_N: Ints, token_N: Ints, gamma: float, rng: np.random.Generator) -> Transition:
        """Draw what follows one token in each of N token states.

        Args:
            x_N, token_N: token states and tokens, int64 [N].
            gamma: discount between words.
            rng: source of the draws.
        """
        terminated_N = self.terminated_XV[x_N, token_N]
        next_NX = np.where(terminated_N[:, None], self.start_X, self.next_XVX[x_N, token_N])
        return Transition(
            _draw(next_NX, rng),
            self.reward_XV[x_N, token_N],
            self.discount_XV(gamma)[x_N, token_N],
            terminated_N,
        )


def _draw(probability_NX: Floats, rng: np.random.Generator) -> Ints:
    """One index a row, by inverting the cumulative distribution."""
    cumulative_NX = probability_NX.cumsum(-1)
    uniform_N1 = rng.random((len(cumulative_NX), 1)) * cumulative_NX[:, -1:]
    drawn_N: Ints = (uniform_N1 >= cumulative_NX).sum(-1)
    return drawn_N


def token_table(mdp: WordMDP) -> TokenTable:
    """The token-level view of a word-level process; x = s · len(prefixes) + prefix number."""
    words = mdp.words
    n_states, n_prefixes, n_tokens = len(mdp.start_S), len(words.prefixes), len(words.letters)
    first_S = np.arange(n_states) * n_prefixes
    n_token_states = n_states * n_prefixes
    reward_SPV = np.zeros((n_states, n_prefixes, n_tokens))
    ends_SPV = np.zeros((n_states, n_prefixes, n_tokens), dtype=bool)
    terminated_SPV = np.zeros_like(ends_SPV)
    next_SPVX = np.zeros((n_states, n_prefixes, n_tokens, n_token_states))
    for p, prefix in enumerate(words.prefixes):
        for token in range(n_tokens):
            word = (*prefix, token)
            if words.ends_after(prefix, token):
                a = words.word_ids[word]
                reward_SPV[:, p, token] = mdp.reward_SA[:, a]
                ends_SPV[:, p, token] = True
                terminated_SPV[:, p, token] = mdp.terminated_SA[:, a]
                next_SPVX[:, p, token, first_S] = mdp.next_SAS[:, a]
            else:
                next_SPVX[np.arange(n_states), p, token, first_S + words.prefix_ids[word]] = 1.0
    start_X = np.zeros(n_token_states)
    start_X[first_S] = mdp.start_S
    return TokenTable(
        reward_SPV.reshape(n_token_states, n_tokens),
        next_SPVX.reshape(n_token_states, n_tokens, n_token_states),
        ends_SPV.reshape(n_token_states, n_tokens),
        terminated_SPV.reshape(n_token_states, n_tokens),
        start_X,
        mdp.reference_XV,
    )
