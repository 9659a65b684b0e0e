"""`etpo eval`: fresh programs of the trained policy beside those of the model that it started as."""

import contextlib
import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from etpo.cli.errors import write_file

if TYPE_CHECKING:
    from etpo.engine.trained import Trained
    from etpo.envs.scoring import Score, Scorer

FRESH_SEEDS = range(5, 25)
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
    record: dict[str, Any] = {"step": trained.step, "n": n, "seed": seed}
    try:
        measure(trained, n, seed, record)
    finally:  # what was drawn and scored before something failed is kept, too
        if json_file:
            write_file("--json", json_file, json.dumps(record, indent=2) + "\n")
    _show(record)


def _on_data(trained: "Trained", n: int, seed: int, record: dict[str, Any]) -> None:
    """Programs of both roles behind the data set's first prompt, and the run's best one."""
    from etpo.engine.progress import check_digests
    from etpo.engine.trained import first_state
    from etpo.envs.datasets import load_dataset
    from etpo.envs.remote import open_runner
    from etpo.envs.scoring import Scorer

    config = trained.config
    data = load_dataset(config.dataset, config.target, config.protocol)
    check_digests(trained.digests, {"table": data.digest}, trained.folder.path)
    prompt, _ = first_state(config)
    record |= {"dataset": data.name, "synthetic": data.synthetic}
    with contextlib.closing(open_runner(config.runner, config.sandbox, config.timeout_s)) as sandbox:
        scorer = Scorer(data, sandbox)
        for role in ROLES:
            click.echo(f"Drawing and scoring {n} programs of the {role} …", err=True)
            texts = trained.sample(prompt, n, seed=seed, role=role)
            programs = record[role] = {"programs": [{"text": text} for text in texts]}
            for program, score in zip(programs["programs"], scorer.score_many(texts), strict=True):
                program |= {
                    "reward": score.reward, "outcome": score.outcome, "auc_mean": score.auc_mean,
                    "auc_std": score.auc_std, "error": score.error,
                }  # fmt: skip
            record[role] = _window(programs["programs"]) | programs
        record["best_program"] = _best(trained, scorer)


def _in_environment(trained: "Trained", n: int, seed: int, record: dict[str, Any]) -> None:
    """The first action of both roles in n episodes; episode i is reset with seed + i."""
    from etpo.engine.environments import settings_for
    from etpo.envs import answers
    from etpo.envs.vector import make_env

    assert trained.config.env is not None
    record |= {"env": trained.config.env}
    env = make_env(trained.config.env, **settings_for(trained.config))
    try:
        states = [answers.reset(env, seed=seed + i) for i in range(n)]
        for role in ROLES:
            click.echo(f"Drawing and rewarding {n} actions of the {role} …", err=True)
            drawn = {
                state: trained.sample(state, count, seed=seed, role=role)
                for state, count in Counter(states).items()
            }
            actions = [drawn[state].pop() for state in states]
            programs = record[role] = {"programs": [{"text": action} for action in actions]}
            for i, program in enumerate(programs["programs"]):
                answers.reset(env, seed=seed + i)
                _, reward, _, _, info = answers.step(env, program["text"])
                program |= {"reward": reward, "error": info.get("error")}
            record[role] = _window(programs["programs"]) | programs
    finally:
        env.close()


def _window(programs: list[dict[str, Any]]) -> dict[str, Any]:
    """The measures of programs that were all scored."""
    from etpo.engine.report.summary import Program, window

    return dataclasses.asdict(window(
        Program(i, p["reward"], p.get("outcome"), p.get("auc_mean"), p.get("auc_std"), p.get("error"),
                p["text"])
        for i, p in enumerate(programs)
    ))  # fmt: skip


def _best(trained: "Trained", scorer: "Scorer") -> dict[str, Any] | None:
    """The run's best program on the splits of training and on fresh ones; None where no program ran."""
    if trained.best_action is None:
        return None
    seeds = _fresh_seeds(scorer)
    click.echo(f"Scoring the run's best program on {len(seeds)} fresh splits …", err=True)
    known: Score = scorer.score(trained.best_action)
    best: dict[str, Any] = {"auc_mean": known.auc_mean, "auc_std": known.auc_std, "fresh_splits": len(seeds)}
    if not seeds:
        return best | {"auc_fresh": None, "auc_fresh_std": None, "error_fresh": "no split has two classes"}
    fresh: Score = scorer.fresh(seeds).score(trained.best_action)
    return best | {
        "auc_fresh": fresh.auc_mean, "auc_fresh_std": fresh.auc_std, "error_fresh": fresh.error,
    }  # fmt: skip


def _fresh_seeds(scorer: "Scorer") -> list[int]:
    """Seeds of the splits that training never saw, but for those with a half that holds one class only."""
    from etpo.envs.datasets import DatasetError
    from etpo.envs.scoring import make_split

    seeds = []
    for seed in FRESH_SEEDS:
        with contextlib.suppress(DatasetError):
            seeds.append(make_split(scorer.dataset, seed).seed)
    return seeds


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
    lost = len(FRESH_SEEDS) - best["fresh_splits"]
    why = f" (of {len(FRESH_SEEDS)}; {lost} have a half with one class only)" if lost else ""
    click.echo(f"  on {best['fresh_splits']} fresh splits{why}: {fresh}")


def _auc(mean: float | None, std: float | None) -> str:
    return "–" if mean is None else f"{mean:.4f} ± {std:.4f}"
