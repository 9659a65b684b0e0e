"""The training loop on one page: six stages, numbered. Everything that it calls is a function elsewhere."""

import time

from etpo.engine.behaviour import behaviour
from etpo.engine.config import Config
from etpo.engine.finite import check_update
from etpo.engine.interrupt import interruptible
from etpo.engine.models.sampler import Sample, sample_actions
from etpo.engine.progress import Observer, Outcome, Stopwatch, go_on
from etpo.engine.records import Record, record, summarise
from etpo.engine.replay import Action
from etpo.engine.run import Run, open_run
from etpo.engine.run_folder import RunFolder
from etpo.envs.vector import Transition


def train(
    config: Config, folder: RunFolder, *, resume: bool = False, observe: Observer = lambda _: None
) -> Outcome:
    """Run `config.algo` for `config.steps` programs.

    Args:
        config: the effective configuration.
        folder: where everything goes (`RunFolder.create`, or an existing one with `resume`).
        resume: go on from the newest whole checkpoint in `folder`.
        observe: called with the metrics of every iteration.

    Raises:
        ModelError, DatasetError, ValueError: bad input, one line.
        CheckpointError: there are checkpoints, but none is usable.
        AgentError: the API of `config.agent` refuses, or does not answer.
        Diverged: a loss, a weight or a draw is not finite; EnvironmentFault: an environment answers wrongly.
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
                run.save()  # a longer run goes on from before a cut iteration
            began = time.monotonic()
            fresh: list[Action] = []
            programs: list[Record] = []
            with folder.keeping(programs):
                while len(fresh) < n_programs:
                    rows = range(min(config.envs, n_programs - len(fresh)))
                    samples, texts = roll_out(run, rows)  #                       1 roll out
                    transitions = run.environments.step(texts)  #                  2 reward
                    fresh += store(run, rows, samples, texts, transitions, programs)  # 3 store
                acted = behaviour(run.roles, run.learner.acts, fresh, config.gamma)
                log = run.learner.update(
                    fresh
                )  #                                 4 targets, 5 losses and step
                check_update(log, run.roles, run.learner.moves, run.step)
            n_tokens = sum(len(a.tokens) for a in fresh)
            run.wall_s = clock()
            metrics = summarise(run, programs, log) | {  #                      6 log, checkpoint
                "kl_ref": acted.kl.mean().item(), "entropy": acted.entropy.mean().item(),
                "wall_s": run.wall_s,
                "tokens_per_s": n_tokens / (time.monotonic() - began),
            }  # fmt: skip
            credit = run.credit.records(fresh, programs, acted, log.credit if log else None)
            folder.append(metrics, programs, credit)
            run.save_if_due(n_programs, whole=n_programs == per_iteration)
            observe(metrics)
        run.wall_s = clock()
        run.save(whole=run.step % per_iteration == 0)
        return Outcome(run.step, interrupted() and run.step < config.steps, run.best, notes)


def roll_out(run: Run, rows: range) -> tuple[list[Sample], list[str]]:
    """Draw one action for each of the first environments: its tokens, and what they say."""
    states = [run.observations[row] for row in rows]
    with run.roles.acting(run.learner.acts) as model:
        samples = sample_actions(
            model,
            [run.encode(state) for state in states],
            max_new_tokens=run.config.max_new_tokens,
            stop_token=run.form.stop_tokens,
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
    programs: list[Record],
) -> list[Action]:
    """Actions for the learner, and records added to `programs`; moves the environments' counters on."""
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
