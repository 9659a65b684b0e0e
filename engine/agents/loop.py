"""The Reflection baseline with a model behind an API: act, reward, log. Nothing is learned."""

import time
from typing import Any

from etpo.engine.agents import AgentError, OpenAIAgent, Reply, agent_of
from etpo.engine.checkpoint import Checkpoint
from etpo.engine.config import Config
from etpo.engine.environments import make_environments
from etpo.engine.interrupt import interruptible
from etpo.engine.models.prompt_form import action_of
from etpo.engine.progress import Observer, Outcome, Progress, Stopwatch, go_on
from etpo.engine.records import Record, record, summarise
from etpo.engine.run_folder import RunFolder


class AgentRun(Progress):
    """What such a run works with.

    Attributes:
        tokens: (sent, written) so far, as the API counts them.
    """

    tokens = (0, 0)

    @property
    def cost_usd(self) -> float:
        sent, written = self.tokens
        return (sent * self.config.prompt_price + written * self.config.completion_price) / 1e6

    def state(self, whole: bool) -> dict[str, Any]:
        return super().state(whole) | {"form": "agent", "tokens": list(self.tokens)}

    def restore(self, checkpoint: Checkpoint) -> None:
        sent, written = checkpoint.state["tokens"]
        self.tokens = (sent, written)
        super().restore(checkpoint)


def train_agent(config: Config, folder: RunFolder, *, resume: bool, observe: Observer) -> Outcome:
    """Run the agent of `config.agent` for `config.steps` programs; as `loop.train` otherwise.

    Raises:
        AgentError: the API refuses or does not answer; what was executed is saved.
        CheckpointError: there are checkpoints, but none is usable.
        DatasetError, ValueError: bad input, one line.
    """
    agent = agent_of(config)
    environments = make_environments(config)
    try:
        run = AgentRun(config, folder, environments)
        notes = go_on(run) if resume else []
        clock = Stopwatch(run.wall_s)
        with interruptible() as interrupted:
            while run.step < config.steps and not interrupted():
                before = run.step
                metrics, programs = _iterate(run, agent)
                metrics["wall_s"] = run.wall_s = clock()
                folder.append(metrics, programs)
                observe(metrics)
                run.save_if_due(run.step - before)
            run.save()
            return Outcome(run.step, interrupted() and run.step < config.steps, run.best, notes)
    except AgentError as error:
        if run.step == 0:
            raise
        run.save()
        said = f"{run.step} programs are saved, go on with --resume {folder.path}"
        raise AgentError(f"{error}; {said}") from error
    finally:
        environments.close()
        folder.close()


def _iterate(run: AgentRun, agent: OpenAIAgent) -> tuple[Record, list[Record]]:
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
