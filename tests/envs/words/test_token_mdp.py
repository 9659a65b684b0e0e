"""The random word MDP: its words, its token-level view, and the environment that plays it."""

import json
import warnings
from dataclasses import replace

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from etpo.envs.words.mdp import Words, token_table
from etpo.envs.words.token_mdp import TokenMDP, random_word_mdp


@pytest.mark.parametrize("variable_length", [True, False])
def test_passes_the_gymnasium_checker(variable_length: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(TokenMDP(variable_length=variable_length), skip_render_check=True)


def test_variable_words_end_at_the_stop_token_or_at_the_limit() -> None:
    words = Words(".ab", max_tokens=2)
    assert words.prefixes == ((), (1,), (2,))
    assert [words.text(word) for word in words.words] == [".", "a.", "aa", "ab", "b.", "ba", "bb"]


def test_fixed_words_all_have_the_same_length() -> None:
    words = Words("ab", max_tokens=2, has_stop=False)
    assert [words.text(word) for word in words.words] == ["aa", "ab", "ba", "bb"]


@pytest.mark.parametrize(
    ("text", "word"), [("b.", (2, 0)), ("b", (2, 0)), ("", (0,)), (".ab", (0,)), ("abab", (1, 2, 1))]
)
def test_parse_closes_short_texts_and_cuts_long_ones(text: str, word: tuple[int, ...]) -> None:
    assert Words(".ab", max_tokens=3).parse(text) == word


@pytest.mark.parametrize(
    ("words", "text", "message"),
    [
        (Words(".ab", 2), "ax", r"expected letters out of '.ab', got 'ax'"),
        (Words("ab", 2, has_stop=False), "a", r"expected 2 letters, got 'a'"),
    ],
)
def test_parse_refuses_what_is_no_word(words: Words, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        words.parse(text)


def test_bad_sizes_and_tables_are_refused() -> None:
    with pytest.raises(ValueError, match="got 'aa'"):
        Words("aa", 2)
    with pytest.raises(ValueError, match=r"max_tokens.*got 0"):
        Words(".a", 0)
    with pytest.raises(ValueError, match=r"n_tokens.*got 28"):
        random_word_mdp(0, n_tokens=28)
    with pytest.raises(ValueError, match=r"n_states.*got 0"):
        random_word_mdp(0, n_states=0)
    with pytest.raises(ValueError, match=r"max_steps.*got 0"):
        TokenMDP(max_steps=0)
    mdp = random_word_mdp(0)
    with pytest.raises(ValueError, match="reward_SA: expected shape"):
        replace(mdp, reward_SA=mdp.reward_SA[:, 1:])
    with pytest.raises(ValueError, match="next_SAS: expected rows that sum to 1"):
        replace(mdp, next_SAS=0.5 * mdp.next_SAS)
    with pytest.raises(ValueError, match="reference_XV: expected positive"):
        replace(mdp, reference_XV=np.eye(3)[np.zeros(len(mdp.reference_XV), dtype=int)])


@pytest.mark.parametrize("variable_length", [True, False])
def test_token_table_walks_every_word_to_the_reward_of_the_word(variable_length: bool) -> None:
    mdp = random_word_mdp(3, variable_length=variable_length)
    table, words, gamma = token_table(mdp), mdp.words, 0.9
    rng = np.random.default_rng(0)
    for s in range(len(mdp.start_S)):
        for a, word in enumerate(words.words):
            x = np.array([s * len(words.prefixes)])
            for token in word[:-1]:
                inner = table.step(x, np.array([token]), gamma, rng)
                assert (inner.reward[0], inner.discount[0], inner.terminated[0]) == (0.0, 1.0, False)
                x = inner.next_x
            last = table.step(x, np.array(word[-1:]), gamma, rng)
            assert last.reward[0] == mdp.reward_SA[s, a]
            assert last.terminated[0] == mdp.terminated_SA[s, a]
            assert last.discount[0] == gamma * (1 - mdp.terminated_SA[s, a])
            assert last.next_x[0] % len(words.prefixes) == 0
            next_S = table.next_XVX[x[0], word[-1]].reshape(-1, len(words.prefixes))[:, 0]
            np.testing.assert_array_equal(next_S, mdp.next_SAS[s, a])


def test_token_table_draws_next_states_as_often_as_their_probability() -> None:
    table, count = token_table(random_word_mdp(0)), 40_000
    assert table.ends_XV[0, 0]
    assert not table.terminated_XV[0, 0]
    zeros = np.zeros(count, dtype=np.int64)
    drawn = table.step(zeros, zeros, 0.9, np.random.default_rng(0)).next_x
    share_X = np.bincount(drawn, minlength=len(table.start_X)) / count
    # Four standard deviations of a share of 40,000 draws.
    np.testing.assert_allclose(share_X, table.next_XVX[0, 0], rtol=0, atol=4 * 0.5 / count**0.5)
    started = table.start(count, np.random.default_rng(1))
    share_X = np.bincount(started, minlength=len(table.start_X)) / count
    np.testing.assert_allclose(share_X, table.start_X, rtol=0, atol=4 * 0.5 / count**0.5)


def test_after_termination_the_token_table_starts_a_fresh_episode() -> None:
    mdp = random_word_mdp(0)
    mdp = replace(mdp, terminated_SA=np.ones_like(mdp.terminated_SA), start_S=np.array([0.0, 0.0, 1.0, 0.0]))
    table = token_table(mdp)
    zeros = np.zeros(50, dtype=np.int64)
    step = table.step(zeros, zeros, 0.9, np.random.default_rng(0))
    assert step.terminated.all()
    assert (step.next_x == 2 * len(mdp.words.prefixes)).all()


def test_the_environment_pays_what_the_tables_say() -> None:
    env = TokenMDP(mdp_seed=1, max_steps=5)
    rng = np.random.default_rng(0)
    observation, info = env.reset(seed=0)
    ended = {"terminated": 0, "truncated": 0}
    t = 0
    for _ in range(200):
        s, a = info["state"], int(rng.integers(len(env.mdp.words.words)))
        assert observation == f"s{s}"
        text = env.mdp.words.text(env.mdp.words.words[a])
        observation, reward, terminated, truncated, info = env.step(text)
        t += 1
        assert info["word"] == text
        assert reward == env.mdp.reward_SA[s, a]
        assert terminated == env.mdp.terminated_SA[s, a]
        assert truncated == (t == 5 and not terminated)
        if terminated or truncated:
            ended["terminated"] += terminated
            ended["truncated"] += truncated
            with pytest.raises(gymnasium.error.ResetNeeded):
                env.step(".")
            observation, info = env.reset()
            t = 0
    assert min(ended.values()) > 0


def test_a_text_that_is_no_word_costs_a_step_and_stays() -> None:
    env = TokenMDP(max_steps=2)
    observation, info = env.reset(seed=0)
    for truncated in (False, True):
        step = env.step("hello")
        message = "action: expected letters out of '.ab', got 'hello'"
        assert step == (observation, -1.0, False, truncated, {"error": message, "state": info["state"]})


def test_a_restored_environment_continues_as_the_saved_one() -> None:
    env, other = TokenMDP(), TokenMDP()
    env.reset(seed=5)
    env.step("a.")
    saved = json.loads(json.dumps(env.state_dict()))
    other.reset(seed=6)
    assert other.load_state_dict(saved) == f"s{saved['state']}"
    for word in ("b.", "ab.", ".", "ba."):
        steps = [e.step(word) for e in (env, other)]
        assert steps[0] == steps[1]
        if steps[0][2] or steps[0][3]:
            assert env.reset() == other.reset()


def test_a_foreign_state_is_refused() -> None:
    env = TokenMDP()
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"got \['state'\]"):
        env.load_state_dict({"state": 0})
    with pytest.raises(ValueError, match="below 4, got 9"):
        env.load_state_dict({**env.state_dict(), "state": 9})
