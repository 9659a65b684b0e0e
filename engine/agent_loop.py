"""The Reflection baseline with a model behind an API: act, reward, log. Nothing is learned."""

import dataclasses
import time
from collections import deque
from typing import Any

from etpo.engine.agents import AgentError, OpenAIAgent, Reply, agent_of
from etpo.engine.checkpoint import Checkpoint, latest_checkpoint, save_checkpoint
from etpo.engine.config import Config
from etpo.engine.loop import Observer, Outcome, interruptible, record, summarise
from etpo.engine.run import Best, Stopwatch, make_environments
from etpo.engine.run_folder import RunFolder
from etpo.envs.prompts_forms import action_of
from etpo.envs.vector import VectorRunner


class AgentRun:
    """What such a run works with; the attributes are those of `Run`.

    Attributes:
        tokens: (sent, written) so far, as the API counts them.
    """

    def __init__(self, config: Config, folder: RunFolder, environments: VectorRunner) -> None:
        self.config, self.folder, self.environments = config, folder, environments
        self.step = 0
        self.best: Best | None = None
        self.recent: deque[str] = deque(maxlen=100)
        self.observations = environments.reset(config.seed)
        self.episode_of = [0] * config.envs
        self.t_of = [0] * config.envs
        self.tokens = (0, 0)

    @property
    def cost_usd(self) -> float:
        sent, written = self.tokens
        return (sent * self.config.prompt_price + written * self.config.completion_price) / 1e6

    def save(self, wall_s: float) -> None:
        state = {
            "whole": True, "step": self.step, "wall_s": wall_s, "form": "agent",
            "best": dataclasses.asdict(self.best) if self.best else None, "recent": list(self.recent),
            "observations": self.observations, "episode_of": self.episode_of, "t_of": self.t_of,
            "tokens": list(self.tokens), "environments": self.environments.state_dict(),
            "sizes": self.folder.sizes(),
        }  # fmt: skip
        save_checkpoint(self.folder.checkpoints, Checkpoint(self.step, {}, state))

    def restore(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.state
        self.step = state["step"]
        self.best = Best(**state["best"]) if state["best"] else None
        self.recent.extend(state["recent"])
        self.observations, self.episode_of, self.t_of = (
            state["observations"], state["episode_of"], state["t_of"],
        )  # fmt: skip
        self.tokens = (state["tokens"][0], state["tokens"][1])
        self.environments.load_state_dict(state["environments"])
        self.folder.rewind(state["sizes"], self.step)


def train_agent(config: Config, folder: RunFolder, *, resume: bool, observe: Observer) -> Outcome:
    """Run the agent of `config.agent` for `config.steps` programs; as `loop.train` otherwise.

    Raises:
        AgentError: the API refuses or does not answer; what was executed is saved.
        DatasetError, ValueError: bad input, one line.
    """
    agent = agent_of(config)
    environments = make_environments(config)
    try:
        run = AgentRun(config, folder, environments)
        checkpoint, notes = latest_checkpoint(folder.checkpoints, whole=True) if resume else (None, [])
        if checkpoint:
            run.restore(checkpoint)
        elif resume:
            folder.rewind({"metrics": 0, "programs": 0}, 0)
        clock = Stopwatch(checkpoint.state["wall_s"] if checkpoint else 0.0)
        with interruptible() as interrupted:
            while run.step < config.steps and not interrupted():
                before = run.step
                metrics, programs = _iterate(run, agent)
                metrics["wall_s"] = clock()
                folder.append(metrics, programs)
                observe(metrics)
                if run.step // config.checkpoint_every != before // config.checkpoint_every:
                    run.save(clock())
            run.save(clock())
            return Outcome(run.step, interrupted() and run.step < config.steps, run.best, notes)
    except AgentError as error:
        if run.step == 0:
            raise
        run.save(clock())
        go_on = f"{run.step} programs are saved, go on with --resume {folder.path}"
        raise AgentError(f"{error}; {go_on}") from error
    finally:
        environments.close()
        folder.close()


def _iterate(run: AgentRun, agent: OpenAIAgent) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One program in each environment: its metrics, but for the wall time, and the programs' records."""
    began = time.monotonic()
    rows = range(min(run.config.envs, run.config.steps - run.step))
    states = [run.observations[row] for row in rows]
    replies = agent.ask_many(states, seed=run.config.seed + run.step)
    actions = [action_of(state, reply.text) for state, reply in zip(states, replies, strict=True)]
    transitions = run.environments.step(actions)
    programs = [
        record(run, row, action, [], [], transition) | _counts(reply)
        for row, action, reply, transition in zip(rows, actions, replies, transitions, strict=True)
    ]
    sent = sum(reply.prompt_tokens or 0 for reply in replies)
    written = sum(reply.completion_tokens or 0 for reply in replies)
    run.tokens = (run.tokens[0] + sent, run.tokens[1] + written)
    elapsed_s = time.monotonic() - began
    metrics = summarise(run, programs, None) | {
        "kl_ref": None, "entropy": None, "tokens_per_s": written / elapsed_s,
        "prompt_tokens": run.tokens[0], "completion_tokens": run.tokens[1], "cost_usd": run.cost_usd,
    }  # fmt: skip
    return metrics, programs


def _counts(reply: Reply) -> dict[str, int | None]:
    return {"prompt_tokens": reply.prompt_tokens, "completion_tokens": reply.completion_tokens}
