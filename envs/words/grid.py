"""A small grid whose moves are words of two tokens: a direction and a confirmation."""

from __future__ import annotations

import numpy as np

from etpo.envs.words.env import WordEnv
from etpo.envs.words.mdp import Floats, WordMDP, Words

# Token ids: 0 is the stop token, which confirms; 1 to 4 are the directions.
_LETTERS = ".nesw"
_MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1))
_GOAL_REWARD = 1.0


def grid_word_mdp(size: int = 4, step_cost: float = 0.05, reference_XV: Floats | None = None) -> WordMDP:
    """The process: `n.`, `e.`, `s.` and `w.` move one cell, every other word stays where it is.

    Credit matters token by token: a direction that is not confirmed (`nn`) and a confirmation of nothing
    (`.`) cost a step like a move does. A move against the border stays. Entering the goal, the last cell,
    pays 1 − step_cost and ends the episode; every other word pays −step_cost. Episodes start in any cell
    but the goal, all alike.

    Args:
        size: cells a side, 2 or more; cell = size · row + column.
        step_cost: cost of every word.
        reference_XV: π̄(w|x), [size² · 5, 5]; uniform without it.

    Raises:
        ValueError: `size` below 2, or a prior of another shape.
    """
    if size < 2:
        raise ValueError(f"size: expected 2 or more, got {size}")
    words = Words(_LETTERS, max_tokens=2)
    n_cells, goal = size * size, size * size - 1
    cells = np.arange(n_cells)
    target_SA = np.repeat(cells[:, None], len(words.words), axis=1)
    for token, (down, right) in enumerate(_MOVES, start=1):
        row = np.clip(cells // size + down, 0, size - 1)
        column = np.clip(cells % size + right, 0, size - 1)
        target_SA[:, words.word_ids[token, 0]] = size * row + column
    # Nobody stands in the goal; its words end at once and pay nothing, so that its value is 0.
    target_SA[goal] = goal
    terminated_SA = target_SA == goal
    reward_SA = np.where(terminated_SA, _GOAL_REWARD, 0.0) - step_cost
    reward_SA[goal] = 0.0
    if reference_XV is None:
        reference_XV = np.full((n_cells * len(words.prefixes), len(_LETTERS)), 1.0 / len(_LETTERS))
    start_S = np.full(n_cells, 1.0 / goal)
    start_S[goal] = 0.0
    return WordMDP(words, reward_SA, terminated_SA, np.eye(n_cells)[target_SA], start_S, reference_XV)


class GridWorld(WordEnv):
    """`etpo/GridWorld-v0`: reach the last cell of a grid (see `grid_word_mdp` and `WordEnv`).

    Observations are `row 0 column 2`; actions are two letters, such as `e.`.

    Args:
        size: cells a side.
        step_cost: cost of every word.
        reference_XV: π̄(w|x); uniform without it.
        max_steps: words after which an episode is truncated.

    Raises:
        ValueError: a size out of range, or a prior of another shape.
    """

    def __init__(
        self,
        size: int = 4,
        step_cost: float = 0.05,
        reference_XV: Floats | None = None,
        max_steps: int = 50,
    ) -> None:
        mdp = grid_word_mdp(size, step_cost, reference_XV)
        observations = [f"row {cell // size} column {cell % size}" for cell in range(size * size)]
        super().__init__(mdp, observations, max_steps)
