"""Data-science code generation: the agent writes `build_model`, the reward is the model's mean ROC AUC."""

from typing import Any

from etpo.envs.coding import Coding
from etpo.envs.datasets import load_dataset
from etpo.envs.prompts import task_prompt
from etpo.envs.remote import open_runner
from etpo.envs.runner import Runner
from etpo.envs.scoring import Score, Scorer


class DataScience(Coding):
    """One episode: a task prompt, then a reflection prompt after each program that fails.

    State: the prompt. Action: the body of `build_model(x_train, y_train)`, or a program that defines it.
    Reward: mean ROC AUC over five random halvings, −1 for a program that fails. The first program that runs
    terminates the episode; see `Coding`. The info of a step has `outcome`, `auc_mean`, `auc_std`, `error`,
    `wall_s`.

    Args:
        dataset, target, protocol: see `datasets.load_dataset`; not used where `scorer` is given.
        sandbox, timeout_s: see `sandbox.Sandbox`; not used where `scorer` is given.
        max_episode_steps: failures that end an episode.
        scorer: shared by environments on the same data; by default the environment makes its own (and closes
            it).
        reflection: with False the state after a failure is the task prompt again, so that each attempt is a
            fresh one: the ablation of the reflection prompt.
        audit_share: see `scoring.Scorer`; not used where `scorer` is given.
        runner: see `remote.open_runner`; not used where `scorer` is given.
    """

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
        runner: str = "local",
    ) -> None:
        self._own_runner: Runner | None = None
        if scorer is None:
            data = load_dataset(dataset, target, protocol)
            self._own_runner = open_runner(runner, sandbox, timeout_s)
            scorer = Scorer(data, self._own_runner, audit_share=audit_share)
        super().__init__(scorer, max_episode_steps, reflection)
        self.scorer = scorer
        rows, features = scorer.dataset.x.shape
        self.task = task_prompt(scorer.dataset.name, rows, features, len(scorer.dataset.class_names))
        self.prompt = self.task

    def draw_task(self) -> str:
        """There is one task, told by its prompt: nothing here is random."""
        return str(self.task)

    def first_prompt(self, task: str) -> str:
        return task

    def info_of(self, judged: Score, task: str) -> dict[str, Any]:
        return {
            "outcome": judged.outcome,
            "auc_mean": judged.auc_mean,
            "auc_std": judged.auc_std,
            "error": judged.error,
            "wall_s": judged.wall_s,
        }

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON: the prompt and the number of failures."""
        return {"prompt": self.prompt, "failures": self.failures}

    def load_state_dict(self, state: dict[str, Any]) -> str:
        """Go on from a `state_dict`; returns the observation to act on."""
        self.prompt, self.failures = str(state["prompt"]), int(state["failures"])
        return self.prompt

    def close(self) -> None:
        if self._own_runner is not None:
            self._own_runner.close()
            self._own_runner = None
