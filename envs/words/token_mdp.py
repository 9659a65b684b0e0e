"""A small random decision process whose actions are words of tokens, with exact solutions."""

from __future__ import annotations

import string

import numpy as np

from etpo.envs.words.env import WordEnv
from etpo.envs.words.mdp import WordMDP, Words

_LETTERS = "." + string.ascii_lowercase


def random_word_mdp(
    seed: int, n_states: int = 4, n_tokens: int = 3, max_tokens: int = 3, *, variable_length: bool = True
) -> WordMDP:
    """A random process: rewards uniform in [−1, 1], Dirichlet transitions, a tenth of the words terminate.

    Args:
        seed: of the process's tables.
        n_states: S.
        n_tokens: V, at most 27: `.` (the stop token, id 0) and the letters from `a`, or with fixed length the
            letters from `a` alone (at most 26).
        max_tokens: longest word, in tokens, the stop token included.
        variable_length: with False every word has `max_tokens` tokens and there is no stop token.

    Returns:
        the process, with a random positive reference prior.

    Raises:
        ValueError: a size out of range.
    """
    letters = _LETTERS if variable_length else _LETTERS[1:]
    if not 2 <= n_tokens <= len(letters):
        raise ValueError(f"n_tokens: expected 2 to {len(letters)}, got {n_tokens}")
    if n_states < 1:
        raise ValueError(f"n_states: expected 1 or more, got {n_states}")
    words = Words(letters[:n_tokens], max_tokens, has_stop=variable_length)
    rng = np.random.default_rng(seed)
    shape_SA = (n_states, len(words.words))
    return WordMDP(
        words,
        reward_SA=rng.uniform(-1.0, 1.0, shape_SA),
        terminated_SA=rng.random(shape_SA) < 0.1,
        next_SAS=rng.dirichlet(np.ones(n_states), shape_SA),
        start_S=np.full(n_states, 1.0 / n_states),
        reference_XV=rng.dirichlet(np.full(n_tokens, 2.0), n_states * len(words.prefixes)),
    )


class TokenMDP(WordEnv):
    """`etpo/TokenMDP-v0`: a seeded random process over words (see `random_word_mdp` and `WordEnv`).

    Observations are `s0`, `s1`, …; actions are letters without blanks, such as `ba.`.

    Args:
        mdp_seed: seed of the process itself; `reset(seed=…)` seeds the draws of states.
        n_states, n_tokens, max_tokens, variable_length: as in `random_word_mdp`.
        max_steps: words after which an episode is truncated.

    Raises:
        ValueError: a size out of range.
    """

    def __init__(
        self,
        mdp_seed: int = 0,
        n_states: int = 4,
        n_tokens: int = 3,
        max_tokens: int = 3,
        variable_length: bool = True,
        max_steps: int = 20,
    ) -> None:
        mdp = random_word_mdp(mdp_seed, n_states, n_tokens, max_tokens, variable_length=variable_length)
        super().__init__(mdp, [f"s{s}" for s in range(n_states)], max_steps)
