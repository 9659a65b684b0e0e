"""`etpo eval`: fresh programs of the trained policy beside those of the model that it started as."""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from etpo.cli.errors import write_file

if TYPE_CHECKING:
    from etpo.engine.report.summary import Program
    from etpo.engine.trained import Trained
    from etpo.envs.scoring import Score, Scorer

ROLES: tuple[Literal["policy", "reference"], ...] = ("policy", "reference")
MEASURES = (
    ("runnable share", "runnable_share", "{:.0%}"),
    ("mean reward", "reward_mean", "{:.4f}"),
    ("mean AUC of those that ran", "auc_mean", "{:.4f}"),
    ("best AUC", "auc_best", "{:.4f}"),
    ("distinct share", "distinct_share", "{:.0%}"),
)


@click.command("eval")
@click.argument("run", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "-n", "n", type=click.IntRange(min=1), default=100, show_default=True, help="Programs from each."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the draws.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the numbers there.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
def evaluate(run: Path, n: int, seed: int, json_file: Path | None, device: str) -> None:
    """Draw fresh programs from the trained policy of the run in DIR and from its reference, and score them.

    On a data set all are drawn behind its first prompt, at temperature 1; the best program of the run is
    scored on twenty more random halvings of the data, which training never saw (auc_fresh). Of a run on --env
    the first action of n episodes is drawn and rewarded.
    """
    from etpo.engine.config import resolve
    from etpo.engine.opening import check_data
    from etpo.engine.run_folder import RunFolder

    config = resolve({}, RunFolder.existing(run).config_file)
    check_data(config)

    from etpo.engine.trained import load, quiet_transformers

    quiet_transformers()
    trained = load(run, device)
    for line in trained.notes:
        click.echo(f"Passed over a damaged checkpoint: {line}", err=True)
    measure = _on_data if config.env is None else _in_environment
    record = measure(trained, n, seed)
    _show(record)
    if json_file:
        write_file("--json", json_file, json.dumps(record, indent=2) + "\n")


def _on_data(trained: "Trained", n: int, seed: int) -> dict[str, Any]:
    """Programs of both roles behind the data set's first prompt, and the run's best one."""
    from etpo.engine.report.summary import Program
    from etpo.engine.trained import first_state
    from etpo.envs.datasets import load_dataset
    from etpo.envs.sandbox import Sandbox
    from etpo.envs.scoring import Scorer

    config = trained.config
    data = load_dataset(config.dataset, config.target, config.protocol)
    prompt, _ = first_state(config)
    record: dict[str, Any] = {
        "dataset": data.name, "synthetic": data.synthetic, "step": trained.step, "n": n, "seed": seed,
    }  # fmt: skip
    with Sandbox(config.sandbox, config.timeout_s) as sandbox:
        scorer = Scorer(data, sandbox)
        for role in ROLES:
            click.echo(f"Drawing and scoring {n} programs of the {role} …", err=True)
            texts = trained.sample(prompt, n, seed=seed, role=role)
            record[role] = _window(
                Program(i, s.reward, s.outcome, s.auc_mean, s.auc_std, s.error, hash(text))
                for i, (s, text) in enumerate(zip(scorer.score_many(texts), texts, strict=True))
            )
        record["best_program"] = _best(trained, scorer)
    return record


def _in_environment(trained: "Trained", n: int, seed: int) -> dict[str, Any]:
    """The first action of both roles in n episodes; episode i is reset with seed + i."""
    from etpo.engine.environments import settings_for
    from etpo.engine.report.summary import Program
    from etpo.envs.vector import make_env

    assert trained.config.env is not None
    record: dict[str, Any] = {"env": trained.config.env, "step": trained.step, "n": n, "seed": seed}
    env = make_env(trained.config.env, **settings_for(trained.config))
    try:
        states = [env.reset(seed=seed + i)[0] for i in range(n)]
        for role in ROLES:
            click.echo(f"Drawing and rewarding {n} actions of the {role} …", err=True)
            drawn = {
                state: trained.sample(state, count, seed=seed, role=role)
                for state, count in Counter(states).items()
            }
            programs = []
            for i, state in enumerate(states):
                action = drawn[state].pop()
                env.reset(seed=seed + i)
                _, reward, _, _, info = env.step(action)
                programs.append(Program(i, float(reward), None, None, None, info.get("error"), hash(action)))
            record[role] = _window(programs)
    finally:
        env.close()
    return record


def _window(programs: Iterable["Program"]) -> dict[str, Any]:
    from etpo.engine.report.summary import window

    return dataclasses.asdict(window(programs))


def _best(trained: "Trained", scorer: "Scorer") -> dict[str, Any] | None:
    """The run's best program on the splits of training and on fresh ones; None where no program ran."""
    if trained.best_action is None:
        return None
    click.echo("Scoring the run's best program on twenty fresh splits …", err=True)
    known: Score = scorer.score(trained.best_action)
    fresh: Score = scorer.fresh().score(trained.best_action)
    return {
        "auc_mean": known.auc_mean, "auc_std": known.auc_std, "auc_fresh": fresh.auc_mean,
        "auc_fresh_std": fresh.auc_std, "error_fresh": fresh.error,
    }  # fmt: skip


def _show(record: dict[str, Any]) -> None:
    is_data = "dataset" in record
    name = record["dataset"] if is_data else record["env"]
    note = " (synthetic)" if record.get("synthetic") else ""
    what = "programs" if is_data else "first actions"
    click.echo(f"{name}{note}, {record['n']} fresh {what} each, after {record['step']} programs of training")
    click.echo(f"{'':28}" + "".join(f"{role:>12}" for role in ROLES))
    for title, key, form in MEASURES:
        if is_data or key in ("reward_mean", "distinct_share"):
            values = [record[role][key] for role in ROLES]
            click.echo(f"{title:28}" + "".join(f"{'–' if v is None else form.format(v):>12}" for v in values))
    if not is_data:
        return
    best = record["best_program"]
    if best is None:
        click.echo("No program of the run ran to its end.")
        return
    fresh = best["error_fresh"] or _auc(best["auc_fresh"], best["auc_fresh_std"])
    click.echo(f"Best program of the run: AUC {_auc(best['auc_mean'], best['auc_std'])}")
    click.echo(f"  on twenty fresh splits: {fresh}")


def _auc(mean: float | None, std: float | None) -> str:
    return "–" if mean is None else f"{mean:.4f} ± {std:.4f}"
