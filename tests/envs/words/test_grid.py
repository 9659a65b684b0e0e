"""The grid world: its moves, its exact optimum, and the environment that plays it."""

import json
import warnings

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from etpo.envs.words.grid import GridWorld, grid_word_mdp
from etpo.envs.words.mdp import token_table
from etpo.envs.words.solve import soft_optimum, soft_policy


def test_passes_the_gymnasium_checker() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(GridWorld(), skip_render_check=True)


@pytest.mark.parametrize(
    ("cell", "text", "cell_next"),
    [(5, "n.", 1), (5, "e.", 6), (5, "s.", 9), (5, "w.", 4), (0, "n.", 0), (3, "e.", 3), (12, "w.", 12)]
    + [(5, text, 5) for text in (".", "nn", "ne", "sw")],
)
def test_only_a_confirmed_direction_moves(cell: int, text: str, cell_next: int) -> None:
    env = GridWorld()
    env.reset(seed=0)
    env.load_state_dict({**env.state_dict(), "state": cell})
    observation, reward, terminated, truncated, info = env.step(text)
    assert (info["state"], observation) == (cell_next, f"row {cell_next // 4} column {cell_next % 4}")
    assert (reward, terminated, truncated) == (-0.05, False, False)


@pytest.mark.parametrize(("cell", "text"), [(14, "e."), (11, "s.")])
def test_the_goal_pays_and_ends_the_episode(cell: int, text: str) -> None:
    env = GridWorld()
    env.reset(seed=0)
    env.load_state_dict({**env.state_dict(), "state": cell})
    _, reward, terminated, truncated, _ = env.step(text)
    assert (reward, terminated, truncated) == (1 - 0.05, True, False)


def test_episodes_start_anywhere_but_in_the_goal() -> None:
    env = GridWorld()
    starts = {env.reset(seed=seed)[1]["state"] for seed in range(200)}
    assert starts == set(range(15))


def test_at_small_beta_the_value_is_that_of_the_shortest_path() -> None:
    gamma, cost, beta = 0.9, 0.05, 1e-4
    table = token_table(grid_word_mdp(size=4, step_cost=cost))
    value_S = soft_optimum(table, beta, gamma).v[::5]
    for cell in range(15):
        steps = 6 - cell // 4 - cell % 4
        shortest = gamma ** (steps - 1) - cost * sum(gamma**k for k in range(steps))
        # A path costs a KL of log 1/π̄(word) = log 25 a step; where other paths are as short it costs less.
        slack = beta * np.log(25) * sum(gamma**k for k in range(steps)) + 1e-12
        assert shortest - slack <= value_S[cell] <= shortest
    assert value_S[15] == pytest.approx(0, abs=1e-12)


def test_a_reference_that_prefers_the_way_raises_the_value_by_its_share() -> None:
    beta, gamma = 0.1, 0.9
    uniform = token_table(grid_word_mdp(size=2))
    optimum = soft_optimum(uniform, beta, gamma)
    leaning_XV = soft_policy(optimum.q, uniform.reference_XV, beta)
    leaning = soft_optimum(token_table(grid_word_mdp(size=2, reference_XV=leaning_XV)), beta, gamma)
    # With π̄ = π* the KL that π* paid is free.
    assert (leaning.v[: 3 * 5] > optimum.v[: 3 * 5]).all()


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"size.*got 1"):
        GridWorld(size=1)
    with pytest.raises(ValueError, match=r"reference_XV: expected shape \(20, 5\)"):
        GridWorld(size=2, reference_XV=np.full((3, 5), 0.2))


def test_a_restored_environment_continues_as_the_saved_one() -> None:
    env, other = GridWorld(max_steps=3), GridWorld(max_steps=3)
    env.reset(seed=1)
    env.step("n.")
    other.load_state_dict(json.loads(json.dumps(env.state_dict())))
    for word in ("n.", "n.", "w.", "n."):
        steps = [e.step(word) for e in (env, other)]
        assert steps[0] == steps[1]
        if steps[0][2] or steps[0][3]:
            assert env.reset() == other.reset()
