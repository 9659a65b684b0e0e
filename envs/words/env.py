"""A gymnasium environment over a `WordMDP`: text states in, words of one-letter tokens out."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np

from etpo.envs.words.mdp import WordMDP, token_table

NO_WORD_REWARD = -1.0


class WordEnv(gymnasium.Env[str, str]):
    """Plays a word-level process; subclasses build it and name its states.

    An action is the word's letters without blanks, for example `"ba."`. The stop token is part of the word;
    a text that ends before it is closed by it, and letters behind the end of the word are ignored (see
    `Words.parse`). `info` holds `state` (the state's number) and, after a step, `word` (the letters as said)
    or `error` (why the action is no word).

    Args:
        mdp: the process.
        observations: the text of each state, [S].
        max_steps: words after which an episode is truncated.

    Attributes:
        mdp: the process, action level.
        table: the process, token level.
        max_steps: words after which an episode is truncated.

    Raises:
        ValueError: `max_steps` below 1.
    """

    def __init__(self, mdp: WordMDP, observations: list[str], max_steps: int) -> None:
        if max_steps < 1:
            raise ValueError(f"max_steps: expected 1 or more, got {max_steps}")
        self.mdp = mdp
        self.table = token_table(mdp)
        self.max_steps = max_steps
        self._observations = observations
        self._state: int | None = None
        self._step = 0
        words = mdp.words
        lengths = [len(text) for text in observations]
        self.observation_space = gymnasium.spaces.Text(
            max(lengths), min_length=min(lengths), charset=frozenset("".join(observations))
        )
        self.action_space = gymnasium.spaces.Text(
            words.max_tokens, min_length=0 if words.has_stop else words.max_tokens, charset=words.letters
        )

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Start an episode in a state drawn from the process's first states."""
        super().reset(seed=seed)
        self._step = 0
        self._state = self._draw(self.mdp.start_S)
        return self._observations[self._state], {"state": self._state}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Say one word. A text that is no word pays `NO_WORD_REWARD`, and the state stays as it is.

        Raises:
            gymnasium.error.ResetNeeded: the episode is over, or none was started.
        """
        if self._state is None:
            raise gymnasium.error.ResetNeeded("step: no episode is running, call reset first")
        words = self.mdp.words
        s = self._state
        info: dict[str, Any]
        try:
            a = words.word_ids[words.parse(action)]
        except ValueError as error:
            s_next, reward, terminated = s, NO_WORD_REWARD, False
            info = {"error": str(error)}
        else:
            reward, terminated = float(self.mdp.reward_SA[s, a]), bool(self.mdp.terminated_SA[s, a])
            s_next = self._draw(self.mdp.next_SAS[s, a])
            info = {"word": words.text(words.words[a])}
        self._step += 1
        truncated = not terminated and self._step >= self.max_steps
        self._state = None if terminated or truncated else s_next
        return self._observations[s_next], reward, terminated, truncated, info | {"state": s_next}

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next steps depend on, as plain values that JSON can hold."""
        return {"state": self._state, "step": self._step, "random": self.np_random.bit_generator.state}

    def load_state_dict(self, state: dict[str, Any]) -> str:
        """Continue where `state_dict` was taken; returns the observation to act on.

        Raises:
            ValueError: keys other than those of `state_dict`, or a state that this environment lacks.
        """
        if set(state) != {"state", "step", "random"}:
            raise ValueError(f"state: expected the keys random, state and step, got {sorted(state)}")
        if state["state"] is not None and not 0 <= state["state"] < len(self._observations):
            raise ValueError(f"state: expected a state below {len(self._observations)}, got {state['state']}")
        self._state, self._step = state["state"], state["step"]
        self.np_random.bit_generator.state = state["random"]
        return "" if self._state is None else self._observations[self._state]

    def _draw(self, probability_S: np.ndarray) -> int:
        return int(self.np_random.choice(len(probability_S), p=probability_S))
