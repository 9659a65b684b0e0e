"""The records of a run: one of each program, one of each iteration, and the file of the best program."""

import hashlib
import resource
from typing import Any

import numpy as np

from etpo.engine.learners import UPDATE_KEYS, UpdateLog
from etpo.engine.progress import Best, Progress
from etpo.engine.run_folder import write_atomically
from etpo.envs.best_program import best_program
from etpo.envs.data_science import DataScience
from etpo.envs.vector import Transition

Record = dict[str, Any]


def record(
    run: Progress, row: int, text: str, tokens: list[int], logprob_mu: list[float], transition: Transition
) -> Record:
    """The record of one program for programs.jsonl; moves the counters of its environment on."""
    run.step += 1
    prompt, info = run.observations[row], transition.info
    line = {
        "step": run.step, "env": row, "episode": run.episode_of[row], "t": run.t_of[row],
        "prompt_sha256": hashlib.sha256(prompt.encode()).hexdigest(), "prompt": prompt, "text": text,
        "tokens": tokens, "logprob_mu": logprob_mu, "reward": transition.reward,
        "outcome": info.get("outcome"), "auc_mean": info.get("auc_mean"), "auc_std": info.get("auc_std"),
        "error": info.get("error"), "wall_s": info.get("wall_s"),
    }  # fmt: skip
    run.recent.append(text)
    if info.get("auc_mean") is not None and (run.best is None or info["auc_mean"] > run.best.auc_mean):
        run.best = Best(run.step, text, info["auc_mean"], info.get("auc_std"))
        _write_best(run, row)
    over = transition.terminated or transition.truncated
    run.episode_of[row] += over
    run.t_of[row] = 0 if over else run.t_of[row] + 1
    run.observations[row] = transition.next_obs_after_reset
    return line


def _write_best(run: Progress, row: int) -> None:
    """best_program.py, for data-science environments: a file that runs without etpo."""
    env, best = run.environments.envs[row], run.best
    if isinstance(env, DataScience) and best is not None:
        text = best_program(best.action, env.scorer.dataset, best.auc_mean, best.auc_std or 0.0)
        write_atomically(run.folder.best_file, text)


def summarise(run: Progress, programs: list[Record], log: UpdateLog | None) -> Record:
    """One iteration's record for metrics.jsonl (docs/metrics.md says what each key means).

    Args:
        run: after the iteration.
        programs: the records of its programs.
        log: what its update did; None where nothing was updated.
    """
    update = log.numbers() if log else dict.fromkeys(UPDATE_KEYS)
    return {
        "step": run.step,
        "stage": "train" if log else "act",
        "reward_mean": float(np.mean([p["reward"] for p in programs])),
        "runnable_share": float(np.mean([p["auc_mean"] is not None for p in programs])),
        "distinct_share": len(set(run.recent)) / len(run.recent),
        "auc_best": run.best.auc_mean if run.best else None,
        "rss_mib": resident_mib(),
        **update,
    }


def resident_mib() -> float:
    """Memory of this process that is resident now, MiB; where the kernel does not tell, the most so far."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * resource.getpagesize() / 2**20
    except (OSError, ValueError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
