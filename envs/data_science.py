"""Data-science code generation: the agent writes `build_model`, the reward is the model's mean ROC AUC."""

from typing import Any

import gymnasium

from etpo.envs.datasets import load_dataset
from etpo.envs.prompts import reflection_prompt, task_prompt
from etpo.envs.sandbox import Sandbox
from etpo.envs.scoring import Score, Scorer
from etpo.envs.text_space import AnyText


class DataScience(gymnasium.Env[str, str]):
    """One episode: a task prompt, then a reflection prompt after each program that fails.

    State: the prompt. Action: the body of `build_model(x_train, y_train)`, or a program that defines it.
    Reward: mean ROC AUC over five random halvings, −1 for a program that fails. The first program that runs
    terminates the episode. The `max_episode_steps`-th failure truncates it; the observation is then still the
    next reflection prompt, from which a learner bootstraps. The info of a step has `outcome`, `auc_mean`,
    `auc_std`, `error`, `wall_s`.

    `step(action)` is `finish(action, scorer.score(action))`; who has many environments scores their actions
    together and calls `finish` (see `VectorRunner`).

    Args:
        dataset, target, protocol: see `datasets.load_dataset`; not used where `scorer` is given.
        sandbox, timeout_s: see `sandbox.Sandbox`; not used where `scorer` is given.
        max_episode_steps: failures that end an episode.
        scorer: shared by environments on the same data; by default the environment makes its own (and closes
            it).
        reflection: with False the state after a failure is the task prompt again, so that each attempt is a
            fresh one: the ablation of the reflection prompt.
        audit_share: see `scoring.Scorer`; not used where `scorer` is given.
    """

    metadata = {"render_modes": []}  # noqa: RUF012 - gymnasium's own form

    def __init__(
        self,
        dataset: str = "tic-tac-toe",
        target: str | None = None,
        protocol: str = "default",
        sandbox: str = "default",
        timeout_s: float = 10.0,
        max_episode_steps: int = 5,
        scorer: Scorer | None = None,
        reflection: bool = True,
        audit_share: float = 0.02,
    ) -> None:
        if max_episode_steps < 1:
            raise ValueError(f"max_episode_steps must be at least 1, got {max_episode_steps}")
        self.observation_space = AnyText()
        self.action_space = AnyText()
        self.max_episode_steps = max_episode_steps
        self._own_sandbox: Sandbox | None = None
        if scorer is None:
            data = load_dataset(dataset, target, protocol)
            self._own_sandbox = Sandbox(sandbox, timeout_s)
            scorer = Scorer(data, self._own_sandbox, audit_share=audit_share)
        self.scorer = scorer
        self.reflection = reflection
        rows, features = scorer.dataset.x.shape
        self.task = task_prompt(scorer.dataset.name, rows, features, len(scorer.dataset.class_names))
        self.prompt = self.task
        self.failures = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Start an episode; returns (task prompt, {}). The seed changes nothing: nothing here is random."""
        super().reset(seed=seed)
        self.prompt, self.failures = self.task, 0
        return self.prompt, {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        return self.finish(action, self.scorer.score(action))

    def finish(self, action: str, score: Score) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """The second half of `step`, for an action that has been scored: what `step` returns."""
        info = {
            "outcome": score.outcome,
            "auc_mean": score.auc_mean,
            "auc_std": score.auc_std,
            "error": score.error,
            "wall_s": score.wall_s,
        }
        if score.error is None:
            return self.prompt, score.reward, True, False, info
        self.failures += 1
        self.prompt = reflection_prompt(self.task, action, score.error) if self.reflection else self.task
        return self.prompt, score.reward, False, self.failures >= self.max_episode_steps, info

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON: the prompt and the number of failures."""
        return {"prompt": self.prompt, "failures": self.failures}

    def load_state_dict(self, state: dict[str, Any]) -> str:
        """Go on from a `state_dict`; returns the observation to act on."""
        self.prompt, self.failures = str(state["prompt"]), int(state["failures"])
        return self.prompt

    def close(self) -> None:
        if self._own_sandbox is not None:
            self._own_sandbox.close()
            self._own_sandbox = None
