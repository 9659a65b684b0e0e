"""`etpo eval`: fresh programs of the trained policy beside those of the model that it started as."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from etpo.cli.errors import Failed

if TYPE_CHECKING:
    from etpo.engine.summary import Window
    from etpo.engine.trained import Trained
    from etpo.envs.scoring import Score, Scorer

ROLES: tuple[Literal["policy", "reference"], ...] = ("policy", "reference")


@click.command("eval")
@click.argument("run", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "-n", "n", type=click.IntRange(min=1), default=100, show_default=True, help="Programs from each."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the draws.")
@click.option(
    "--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the numbers there."
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
def evaluate(run: Path, n: int, seed: int, json_file: Path | None, device: str) -> None:
    """Draw fresh programs from the trained policy of the run in DIR and from its reference, and score them.

    All are drawn behind the data set's first prompt, at temperature 1. The best program of the run is scored
    on twenty more random halvings of the data, which training never saw (auc_fresh).
    """
    from etpo.engine.config import resolve
    from etpo.engine.summary import existing_run

    config = resolve({}, existing_run(run).config_file)
    if config.env is not None:
        raise click.UsageError(f"{run}: expected a run on a data set, got one on --env {config.env}; "
                               "see metrics.jsonl for its rewards")  # fmt: skip

    from etpo.engine.trained import first_state, load, quiet_transformers
    from etpo.envs.datasets import load_dataset
    from etpo.envs.sandbox import Sandbox
    from etpo.envs.scoring import Scorer

    data = load_dataset(config.dataset, config.target, config.protocol)
    prompt, note = first_state(config)
    quiet_transformers()
    trained = load(run, device)
    for line in trained.notes:
        click.echo(f"Passed over a damaged checkpoint: {line}", err=True)
    with Sandbox(config.sandbox, config.timeout_s) as sandbox:
        scorer = Scorer(data, sandbox)
        windows: dict[str, Window] = {role: _window(trained, scorer, prompt, n, seed, role) for role in ROLES}
        best = _best(trained, scorer)
    _show(
        windows,
        best,
        f"{data.name}{note}, {n} fresh programs each, after {trained.step} programs of training",
    )
    if json_file:
        record: dict[str, Any] = {
            "dataset": data.name, "synthetic": data.synthetic, "step": trained.step, "n": n, "seed": seed,
            "best_program": best,
        }  # fmt: skip
        record |= {role: dataclasses.asdict(window) for role, window in windows.items()}
        try:
            json_file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise Failed(
                f"--json {json_file}: expected a file that can be written, got: {error.strerror}"
            ) from error


def _window(
    trained: "Trained", scorer: "Scorer", prompt: str, n: int, seed: int, role: Literal["policy", "reference"]
) -> "Window":
    from etpo.engine.summary import Program, window

    click.echo(f"Drawing and scoring {n} programs of the {role} …", err=True)
    texts = trained.sample(prompt, n, seed=seed, role=role)
    scores = scorer.score_many(texts)
    return window(
        Program(i, s.reward, s.outcome, s.auc_mean, s.auc_std, s.error, hash(text))
        for i, (s, text) in enumerate(zip(scores, texts, strict=True))
    )


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


def _show(windows: dict[str, "Window"], best: dict[str, Any] | None, title: str) -> None:
    measures = (
        ("runnable share", "runnable_share", "{:.0%}"), ("mean reward", "reward_mean", "{:.4f}"),
        ("mean AUC of those that ran", "auc_mean", "{:.4f}"), ("best AUC", "auc_best", "{:.4f}"),
        ("distinct share", "distinct_share", "{:.0%}"),
    )  # fmt: skip
    click.echo(title)
    click.echo(f"{'':28}" + "".join(f"{role:>12}" for role in windows))
    for name, key, form in measures:
        values = [getattr(window, key) for window in windows.values()]
        click.echo(f"{name:28}" + "".join(f"{'–' if v is None else form.format(v):>12}" for v in values))
    if best is None:
        click.echo("No program of the run ran to its end.")
        return
    fresh = best["error_fresh"] or _auc(best["auc_fresh"], best["auc_fresh_std"])
    click.echo(f"Best program of the run: AUC {_auc(best['auc_mean'], best['auc_std'])}")
    click.echo(f"  on twenty fresh splits: {fresh}")


def _auc(mean: float | None, std: float | None) -> str:
    return "–" if mean is None else f"{mean:.4f} ± {std:.4f}"
