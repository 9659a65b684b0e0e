"""`etpo train`: every field of the configuration is an option."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from etpo.cli.errors import INTERRUPTED
from etpo.cli.options import GroupedCommand, config_options
from etpo.cli.progress import progress_view
from etpo.engine.callbacks import Callbacks, observed
from etpo.engine.config import Config, resolve
from etpo.engine.interrupt import stoppable
from etpo.engine.loggers import loggers_of
from etpo.engine.opening import RESUMABLE, open_folder, placed
from etpo.engine.options import flag
from etpo.engine.report.summary import data_name, duration
from etpo.engine.run_folder import RunFolder

if TYPE_CHECKING:
    from etpo.engine.progress import Observer, Outcome


@click.command(cls=GroupedCommand)
@config_options
@click.option(
    "--config", "config_file", type=click.Path(path_type=Path), help="TOML file with the same keys."
)
@click.option(
    "--resume", type=click.Path(path_type=Path), metavar="DIR",
    help="Go on with the run in DIR, as its config.toml says; of the other options only "
    + ", ".join(map(flag, RESUMABLE)) + " may be given.",
)  # fmt: skip
@click.pass_context
def train(ctx: click.Context, /, config_file: Path | None, resume: Path | None, **values: Any) -> None:
    """Train a language model by running the programs that it writes.

    A flag goes before --config, --config before --preset, and --preset before the default. The run's folder
    holds config.toml, metrics.jsonl, programs.jsonl, best_program.py, checkpoints and report.html. Ctrl-C
    saves and stops; --resume goes on.

    \b
    etpo train --dataset tic-tac-toe
    etpo train --dataset my.csv --target outcome --model Qwen/Qwen2.5-Coder-0.5B --steps 2000
    etpo train --resume runs/tic-tac-toe-etpo-s0-20260101-120000 --steps 1000
    """
    given = {k: v for k, v in values.items() if ctx.get_parameter_source(k) is not ParameterSource.DEFAULT}
    config = _resumed(resume, given, config_file) if resume else placed(resolve(given, config_file))
    if "env" in given and "dataset" in given:
        raise click.UsageError(
            f"--dataset {config.dataset}: expected no data set beside --env {config.env}, which takes its "
            "place; leave one of them out"
        )
    with stoppable(), open_folder(config, resume=resume is not None) as folder:
        if resume:
            click.echo(f"Goes on from program {_last_checkpoint(folder)}.")
        try:
            outcome = _run(config, folder, resumed=resume is not None)
        except KeyboardInterrupt:
            outcome = None
        _tell(folder, outcome)
    if outcome is None or outcome.interrupted:
        _tell_how_to_resume(folder)
        ctx.exit(INTERRUPTED)


def _resumed(path: Path, given: dict[str, Any], config_file: Path | None) -> Config:
    """The configuration of the run in `path`, with the few changes that are allowed."""
    others = [flag(name) for name in given if name not in RESUMABLE] + (["--config"] if config_file else [])
    if others:
        allowed = ", ".join(map(flag, RESUMABLE))
        raise click.UsageError(
            f"--resume {path}: expected only {allowed} beside it, got {', '.join(others)}; the rest is in "
            "the run's config.toml"
        )
    return resolve(given | {"out": str(path)}, RunFolder.existing(path).config_file)


def _last_checkpoint(folder: RunFolder) -> int:
    """The step of the newest checkpoint by its name, 0 where there is none."""
    steps = [int(path.name.rpartition("-")[2]) for path in folder.checkpoints.glob("step-*[0-9]")]
    return max(steps, default=0)


def _run(config: Config, folder: RunFolder, *, resumed: bool) -> "Outcome":
    model = config.agent or config.model
    title = f"{config.algo} · {model} on {data_name(config)} · seed {config.seed} · {folder.path}"
    told = Callbacks(loggers_of(config))
    with progress_view(config, title, resumed=resumed) as view:
        from etpo.engine.loop import train as run_loop  # imports torch: the view is up before
        from etpo.engine.trained import quiet_transformers

        def run(observe: "Observer") -> "Outcome":
            def both(metrics: dict[str, Any]) -> None:
                view(metrics)
                observe(metrics)

            return run_loop(config, folder, resume=resumed, observe=both)

        quiet_transformers()
        return observed(run, told, config, folder.path)


def _tell(folder: RunFolder, outcome: "Outcome | None") -> None:
    from etpo.engine.report.page import write_report
    from etpo.engine.report.summary import learned, warnings

    for note in outcome.notes if outcome else ():
        click.echo(f"Passed over a damaged checkpoint: {note}", err=True)
    if not folder.metrics_file.exists():
        return
    report = write_report(folder)
    told = learned(folder)
    click.echo(f"Executed {told.n_programs} programs in {duration(told.wall_s)}.")
    for name, window in (("First", told.first), ("Last", told.last)):
        ran = "" if told.best is None and not told.has_auc else f"{window.runnable_share:.0%} ran, "
        click.echo(f"  {name} {window.n}: {ran}mean reward {window.reward_mean:.3f}.")
    if told.best is not None:
        spread = f" ± {told.best.auc_std:.4f}" if told.best.auc_std is not None else ""
        click.echo(f"  Best program: AUC {told.best.auc_mean:.4f}{spread} (step {told.best.step}), "
                   f"in {folder.best_file}.")  # fmt: skip
    elif told.has_auc:
        click.echo("  No program ran to its end.")
    if told.kl_ref is not None:
        click.echo(f"  KL from the model that it started as: {max(told.kl_ref, 0.0):.3f} nat a token.")
    spent = told.metrics[-1]
    if "prompt_tokens" in spent:
        sent, written = spent["prompt_tokens"], spent["completion_tokens"]
        click.echo(f"  The API counted {sent:,} tokens sent and {written:,} written: "
                   f"{spent['cost_usd']:.2f} US dollars at the prices given.")  # fmt: skip
    for warning in warnings(told):
        click.echo(f"Warning: {warning}", err=True)
    click.echo(f"Report: {report}")


def _tell_how_to_resume(folder: RunFolder) -> None:
    if folder.checkpoints.exists():
        click.echo(f"Stopped; to go on: {folder.resume_command}", err=True)
    else:
        click.echo("Stopped before the first checkpoint; nothing was kept.", err=True)
