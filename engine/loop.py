"""The training loop on one page: six stages, numbered. Everything that it calls is a function elsewhere."""

import dataclasses
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from etpo.engine.checkpoint import CheckpointError, latest_checkpoint, list_checkpoints
from etpo.engine.config import Config
from etpo.engine.learners.etpo import UpdateLog
from etpo.engine.losses import stream_kl
from etpo.engine.models.sampler import Sample, sample_actions
from etpo.engine.replay import Action, collate
from etpo.engine.run import Best, Progress, Run, Stopwatch, open_run, rss_mib, sha256
from etpo.engine.run_folder import RunFolder, write_atomically
from etpo.envs.best_program import best_program
from etpo.envs.data_science import DataScience
from etpo.envs.vector import Transition
from etpo.kernels import Stream, linear_logprob

Observer = Callable[[dict[str, Any]], None]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended.

    Attributes:
        step: programs executed.
        interrupted: True where Ctrl-C or SIGTERM ended it, after saving.
        best: the best program, or None where none ran.
        notes: lines about damaged checkpoints that were passed over.
    """

    step: int
    interrupted: bool
    best: Best | None
    notes: list[str]


def train(
    config: Config, folder: RunFolder, *, resume: bool = False, observe: Observer = lambda _: None
) -> Outcome:
    """Run ETPO (or, for `algo = reflection`, the frozen model) for `config.steps` programs.

    Args:
        config: the effective configuration.
        folder: where everything goes (`RunFolder.create`, or an existing one with `resume`).
        resume: go on from the newest whole checkpoint in `folder`.
        observe: called with the metrics of every iteration.

    Raises:
        ModelError, DatasetError, ValueError: bad input, one line.
        CheckpointError: there are checkpoints, but none is usable.
        AgentError: the API of `config.agent` refuses, or does not answer.
    """
    if config.agent is not None:
        from etpo.engine.agents.loop import train_agent

        return train_agent(config, folder, resume=resume, observe=observe)
    with open_run(config, folder) as run, interruptible() as interrupted:
        notes = go_on(run) if resume else []
        clock = Stopwatch(run.wall_s)
        per_iteration = config.envs * config.rollout_steps
        while run.step < config.steps and not interrupted():
            n_programs = min(per_iteration, config.steps - run.step)
            run.wall_s = clock()
            if run.step == 0 or n_programs < per_iteration:
                run.save(whole=True)  # a longer run goes on from before a cut iteration
            began = time.monotonic()
            fresh: list[Action] = []
            programs: list[dict[str, Any]] = []
            while len(fresh) < n_programs:
                rows = range(min(config.envs, n_programs - len(fresh)))
                samples, texts = roll_out(run, rows)  #                       1 roll out
                transitions = run.environments.step(texts)  #                  2 reward
                fresh += store(run, rows, samples, texts, transitions, programs)  # 3 store
            log, kl_ref, entropy = None, *behaviour(run, fresh)
            if config.algo == "etpo":
                run.replay.add(fresh)
                log = run.learner.update(fresh, run.replay, run.rng)  #        4 targets, 5 losses and step
            n_tokens = sum(len(a.tokens) for a in fresh)
            run.wall_s = clock()
            metrics = summarise(run, programs, log) | {  #                      6 log, checkpoint
                "kl_ref": kl_ref, "entropy": entropy, "wall_s": run.wall_s,
                "tokens_per_s": n_tokens / (time.monotonic() - began),
            }  # fmt: skip
            folder.append(metrics, programs)
            if run.step // config.checkpoint_every != (run.step - n_programs) // config.checkpoint_every:
                run.save(whole=n_programs == per_iteration)
            observe(metrics)
        run.wall_s = clock()
        run.save(whole=run.step % per_iteration == 0)
        return Outcome(run.step, interrupted() and run.step < config.steps, run.best, notes)


def go_on(run: Progress) -> list[str]:
    """Restore the newest whole checkpoint; a run that was stopped before its first one starts anew.

    Returns one line for each newer checkpoint that is damaged.

    Raises:
        CheckpointError: there are checkpoints, but none is usable; nothing was changed.
    """
    folder = run.folder
    checkpoint, damaged = latest_checkpoint(folder.checkpoints, whole=True)
    if checkpoint is not None:
        run.restore(checkpoint)
    elif list_checkpoints(folder.checkpoints):
        found = "; ".join(damaged) or "only some that end inside an iteration"
        raise CheckpointError(
            f"{folder.path}: expected a checkpoint to go on from, got none that is usable ({found}); "
            "start again with another --out"
        )
    else:
        folder.rewind({"metrics": 0, "programs": 0}, 0)
    return damaged


def roll_out(run: Run, rows: range) -> tuple[list[Sample], list[str]]:
    """Draw one action for each of the first environments, from the policy: tokens, and what they say."""
    states = [run.observations[row] for row in rows]
    with run.roles.acting("policy" if run.config.algo == "etpo" else "reference") as model:
        samples = sample_actions(
            model,
            [run.encode(state) for state in states],
            max_new_tokens=run.config.max_new_tokens,
            stop_token=run.form.stop_token,
            generator=run.generator,
            sampling=run.sampling,
        )
    return samples, [run.decode(state, s.tokens) for state, s in zip(states, samples, strict=True)]


def store(
    run: Run,
    rows: range,
    samples: list[Sample],
    texts: list[str],
    transitions: list[Transition],
    programs: list[dict[str, Any]],
) -> list[Action]:
    """Actions for the replay buffer and records for programs.jsonl; moves the environments' counters on."""
    actions = []
    for row, sample, text, transition in zip(rows, samples, texts, transitions, strict=True):
        prompt = run.observations[row]
        actions.append(Action(
            prompt=run.encode(prompt), tokens=sample.tokens, logprob_mu=sample.logprob_mu,
            reward=transition.reward, terminated=transition.terminated,
            next_prompt=None if transition.terminated else run.encode(transition.obs),
            env=row, episode=run.episode_of[row], t=run.t_of[row], hidden=sample.hidden,
        ))  # fmt: skip
        programs.append(
            record(run, row, text, sample.tokens.tolist(), sample.logprob_mu.tolist(), transition)
        )
    return actions


def record(
    run: Progress, row: int, text: str, tokens: list[int], logprob_mu: list[float], transition: Transition
) -> dict[str, Any]:
    """The record of one program for programs.jsonl; moves the counters of its environment on."""
    run.step += 1
    prompt, info = run.observations[row], transition.info
    line = {
        "step": run.step, "env": row, "episode": run.episode_of[row], "t": run.t_of[row],
        "prompt_sha256": sha256(prompt), "prompt": prompt, "text": text, "tokens": tokens,
        "logprob_mu": logprob_mu, "reward": transition.reward,
        "outcome": info.get("outcome"), "auc_mean": info.get("auc_mean"), "auc_std": info.get("auc_std"),
        "error": info.get("error"), "wall_s": info.get("wall_s"),
    }  # fmt: skip
    run.recent.append(text)
    if info.get("auc_mean") is not None and (run.best is None or info["auc_mean"] > run.best.auc_mean):
        run.best = Best(run.step, text, info["auc_mean"], info.get("auc_std"))
        write_best(run, row)
    over = transition.terminated or transition.truncated
    run.episode_of[row] += over
    run.t_of[row] = 0 if over else run.t_of[row] + 1
    run.observations[row] = transition.next_obs_after_reset
    return line


def write_best(run: Progress, row: int) -> None:
    """best_program.py, for data-science environments: a file that runs without etpo."""
    env, best = run.environments.envs[row], run.best
    if isinstance(env, DataScience) and best is not None:
        text = best_program(best.action, env.scorer.dataset, best.auc_mean, best.auc_std or 0.0)
        write_atomically(run.folder.best_file, text)


@torch.no_grad()
def behaviour(run: Run, fresh: list[Action]) -> tuple[float, float]:
    """(KL(π‖π̄), entropy) of the policy that drew the fresh actions, means in nat a token."""
    batch = collate(fresh, run.config.gamma)
    hidden = torch.cat([a.hidden for a in batch.actions if a.hidden is not None])
    if run.config.algo != "etpo":
        stream = run.roles.stream("reference", hidden)
        return 0.0, _entropy(stream, batch.tokens_K.to(hidden.device))
    stream = run.roles.stream("policy", hidden)
    hidden_ref = run.learner.reference_hidden(batch)[: batch.n_tokens]
    kl = stream_kl(stream, run.roles.stream("reference", hidden_ref)).mean().item()
    return kl, _entropy(stream, batch.tokens_K.to(hidden.device))


def _entropy(stream: Stream, tokens: torch.Tensor) -> float:
    _, entropy = linear_logprob(
        stream.hidden, stream.weight, tokens, bias=stream.bias, temperature=stream.temperature,
        softcap=stream.softcap,
    )  # fmt: skip
    return entropy.mean().item()


def summarise(run: Progress, programs: list[dict[str, Any]], log: UpdateLog | None) -> dict[str, Any]:
    """One iteration's record for metrics.jsonl (docs/metrics.md says what each key means)."""
    update = dataclasses.asdict(log) if log else {}
    return {
        "step": run.step,
        "stage": "train" if log else "act",
        "reward_mean": float(np.mean([p["reward"] for p in programs])),
        "runnable_share": float(np.mean([p["auc_mean"] is not None for p in programs])),
        "distinct_share": len(set(run.recent)) / len(run.recent),
        "auc_best": run.best.auc_mean if run.best else None,
        "rss_mib": rss_mib(),
        **{
            key: update.get(key)
            for key in ("kl_update", "step_share", "loss_q", "loss_pi", "q_mean", "v_mean")
        },
    }


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM are noted, so that the iteration ends and is saved; a second one stops at once."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    seen: list[int] = []

    def note(number: int, _: object) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
