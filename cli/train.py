"""`etpo train`: every field of the configuration is an option."""

import contextlib
import dataclasses
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

import click
from click.core import ParameterSource

from etpo.cli.errors import INTERRUPTED, Failed, is_disk_full
from etpo.cli.progress import progress_view
from etpo.engine.config import PRESETS, Config, option, resolve, to_toml
from etpo.engine.report.summary import data_name, duration, existing_run
from etpo.engine.run_folder import RunFolder, default_out, write_atomically

if TYPE_CHECKING:
    from etpo.engine.loop import Outcome

# What may stand beside --resume: it changes how far and where the run goes on, not what it is.
RESUMABLE = ("steps", "threads", "device", "checkpoint_every")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")

HELP = {
    "dataset": "Data set by name (see `etpo data list`), or the path of a CSV file.",
    "target": "The target's column; needed for a CSV file.",
    "env": "Another environment in the data set's place: a gymnasium id or module:Class.",
    "model": "Model folder, hub name (owner/name), or the bundled etpo-nano.",
    "algo": "etpo trains; reflection only retries with the error message, the model stays as it is.",
    "preset": "A named set of options; flags and --config override it.",
    "steps": "Programs executed in all, counted over all environments.",
    "seed": "Seed of every random draw.",
    "envs": "Environments that are stepped together.",
    "rollout_steps": "Programs that each environment executes between two updates.",
    "max_new_tokens": "Longest program in tokens; a longer one is executed as it stands.",
    "temperature": "Of sampling; 1 draws from the policy itself.",
    "top_k": "Draw from the k likeliest tokens; 0: from all.",
    "top_p": "Draw from the likeliest tokens that make up this probability; 1: from all.",
    "max_episode_steps": "Failed programs after which an episode starts anew.",
    "prompt_form": "How the task is put to the model; auto: as its tokenizer asks for (docs/prompts.md).",
    "reflection": "Show a failed program and its error in the next prompt; without, each attempt is fresh.",
    "agent": "openai:MODEL behind an OpenAI-compatible HTTP API, for --algo reflection; key: OPENAI_API_KEY.",
    "base_url": "Where that API is.  [default: https://api.openai.com/v1]",
    "agent_timeout_s": "Seconds that the API may take for one answer.",
    "agent_retries": "Further tries where the API is busy, fails or does not answer.",
    "prompt_price": "US dollars a million tokens sent to the API, to count the cost.",
    "completion_price": "US dollars a million tokens that the API wrote.",
    "beta": "Weight β of the KL to the reference, in reward units.",
    "gamma": "Discount γ from one program to the next (inside a program it is 1).",
    "lam": "λ of the Retrace traces: 0 looks one token ahead, 1 to the end of the episode.",
    "q_form": "How Q is read from the critic's logits.",
    "backup": "Value of the next state: expected under the policy, or soft (log-sum-exp).",
    "roles": "Separate weights (full), adapters on one base (lora), or by size (auto).",
    "lora_rank": "Rank of the adapters.",
    "optimizer": "Optimiser of policy and critic; auto: momentum SGD for full weights, AdamW for adapters.",
    "lr": "Learning rate of the policy.",
    "critic_lr": "Learning rate of the critic.",
    "value_lr": "Learning rate of the critic's scalar head.",
    "clip_norm": "Largest norm of a gradient.",
    "huber_delta": "Where the critic's loss turns from square to linear, in reward units.",
    "tau": "Share of itself that the target network keeps at each step.",
    "max_kl_update": "Bound on the KL by which one update may move the policy, nat a token.",
    "replay_capacity": "Programs kept for later updates.",
    "replay_weight": "Of a replayed program in the critic's loss; truncated: its min(1, π/μ); none: 1; auto: "
    "truncated for --q-form normalised.",
    "minibatch": "Programs in one gradient step.",
    "updates_per_batch": "Gradient steps between two rollouts.",
    "protocol": "How the data set is prepared; paper does as the authors' code does.",
    "sandbox": "strict refuses to run with fewer than all layers (see `etpo doctor`); off asks twice.",
    "timeout_s": "Seconds that a program may take on one of its five splits.",
    "device": "auto, cpu, cuda or cuda:N.",
    "dtype": "Of the weights; auto: bfloat16 for adapters on a GPU, else float32.",
    "threads": "CPU threads; 0: one for each core.",
    "checkpoint_every": "Programs between two checkpoints.",
    "out": "The run's folder, new or empty.  [default: runs/<dataset>-<algo>-s<seed>-<time>]",
}


def config_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """One option for each field of `Config`, in its order."""
    for field in reversed(dataclasses.fields(Config)):
        command = click.option(
            _declaration(field.name), field.name, type=_click_type(field.name), default=field.default,
            show_default=field.default is not None, help=HELP.get(field.name),
        )(command)  # fmt: skip
    return command


def _declaration(name: str) -> str:
    is_switch = get_type_hints(Config)[name] is bool
    return f"{option(name)}/{option('no_' + name)}" if is_switch else option(name)


def _click_type(name: str) -> click.ParamType:
    hint = get_type_hints(Config)[name]
    if name == "preset":
        return click.Choice(list(PRESETS))
    if get_origin(hint) is Literal:
        return click.Choice([str(word) for word in get_args(hint)])
    kinds = [kind for kind in get_args(hint) or (hint,) if kind is not type(None)]
    basic: dict[type, click.ParamType] = {
        int: click.INT, float: click.FLOAT, str: click.STRING, bool: click.BOOL,
    }  # fmt: skip
    return basic[kinds[0]]


@click.command()
@config_options
@click.option(
    "--config", "config_file", type=click.Path(path_type=Path), help="TOML file with the same keys."
)
@click.option(
    "--resume", type=click.Path(path_type=Path), metavar="DIR",
    help="Go on with the run in DIR, as its config.toml says; of the other options only "
    + ", ".join(map(option, RESUMABLE)) + " may be given.",
)  # fmt: skip
@click.pass_context
def train(ctx: click.Context, config_file: Path | None, resume: Path | None, **values: Any) -> None:
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
    config, folder = _resumed(resume, given, config_file) if resume else _new(given, config_file)
    with _held(folder):
        if resume:
            _rewrite_config(config, folder)
        try:
            outcome = _run(config, folder, resumed=resume is not None)
        except KeyboardInterrupt:
            outcome = None
        finally:
            if resume is None:
                _discard_if_unused(folder)
        _tell(folder, outcome)
    if outcome is None or outcome.interrupted:
        _tell_how_to_resume(folder)
        ctx.exit(INTERRUPTED)


def _new(given: dict[str, Any], config_file: Path | None) -> tuple[Config, RunFolder]:
    config = resolve(given, config_file)
    path = Path(config.out).expanduser() if config.out else default_out(config)
    config = dataclasses.replace(
        config, out=str(path), dataset=_absolute(config.dataset), model=_absolute(config.model)
    )
    check_data(config)
    if config.agent is None:
        check_model(config.model)
    else:
        check_agent(config)
    return config, RunFolder.create(path, config)


def _resumed(path: Path, given: dict[str, Any], config_file: Path | None) -> tuple[Config, RunFolder]:
    others = [option(name) for name in given if name not in RESUMABLE] + (["--config"] if config_file else [])
    if others:
        allowed = ", ".join(map(option, RESUMABLE))
        raise click.UsageError(
            f"--resume {path}: expected only {allowed} beside it, got {', '.join(others)}; the rest is in "
            "the run's config.toml"
        )
    folder = existing_run(path)
    config = resolve(given, folder.config_file)
    check_data(config)
    if config.agent is not None:
        check_agent(config)
    elif not folder.reference.is_dir():
        check_model(config.model)
    return config, folder


@contextlib.contextmanager
def _held(folder: RunFolder) -> Iterator[None]:
    """Hold the run's folder while it is written to: two trainings in one folder would mix their records."""
    fd = os.open(folder.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Failed(
                f"{folder.path}: expected a run that stands still, got one that another `etpo train` is "
                "writing to; wait for its end, or stop it"
            ) from error
        except OSError:  # some network file systems know no such locks
            pass
        yield
    finally:
        os.close(fd)


def _rewrite_config(config: Config, folder: RunFolder) -> None:
    try:
        write_atomically(folder.config_file, to_toml(config))
    except OSError as error:
        raise Failed(
            f"--resume {folder.path}: expected a folder that can be written, got {error.strerror}"
        ) from error


def _absolute(name: str) -> str:
    """A path that is there as an absolute one, so that the run can be resumed from any folder; names stay."""
    path = Path(name).expanduser()
    is_file = path.is_file() and path.suffix.lower() == ".csv"
    return str(path.resolve()) if is_file or (path / "config.json").is_file() else name


def check_data(config: Config) -> None:
    """Say what is wrong with the data before anything slow starts."""
    if config.env is None:
        from etpo.envs.datasets import load_dataset

        load_dataset(config.dataset, config.target, config.protocol)


def check_agent(config: Config) -> None:
    """Say what is wrong with the agent's options before anything starts; nothing is sent."""
    from etpo.engine.agents import agent_of

    agent_of(config)


def check_model(name: str) -> None:
    """Say what is missing in a model folder before anything slow starts; loading finds out the rest."""
    path = Path(name).expanduser()
    if path.is_dir() and not any((path / file).is_file() for file in TOKENIZER_FILES):
        raise Failed(
            f"--model {name}: expected a tokenizer (tokenizer.json) beside the weights, got a folder without "
            "one; save it there with tokenizer.save_pretrained"
        )


def _run(config: Config, folder: RunFolder, *, resumed: bool) -> "Outcome":
    model = config.agent or config.model
    title = f"{config.algo} · {model} on {data_name(config)} · seed {config.seed} · {folder.path}"
    try:
        with progress_view(config, title, resumed=resumed) as view:
            from etpo.engine.loop import train as run_loop  # imports torch: the view is up before
            from etpo.engine.trained import quiet_transformers

            quiet_transformers()
            return run_loop(config, folder, resume=resumed, observe=view)
    except Exception as error:
        if is_disk_full(error):
            has_saved = folder.checkpoints.exists()
            go_on = f"go on: etpo train --resume {folder.path}" if has_saved else "start again"
            raise Failed(
                f"{folder.path}: expected to save, got no space left on the disk; earlier checkpoints are "
                f"whole: free some space, then {go_on}"
            ) from error
        raise


def _discard_if_unused(folder: RunFolder) -> None:
    """Take away what a run wrote that failed before its first checkpoint, so that `--out` is free again."""
    if not folder.checkpoints.exists() and not folder.metrics_file.exists():
        folder.config_file.unlink(missing_ok=True)
        for model in (folder.reference, folder.path / ".reference.partial"):
            shutil.rmtree(model, ignore_errors=True)
        with contextlib.suppress(OSError):
            folder.path.rmdir()


def _tell(folder: RunFolder, outcome: "Outcome | None") -> None:
    from etpo.engine.report.page import write_report
    from etpo.engine.report.summary import learned

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
    click.echo(f"Report: {report}")


def _tell_how_to_resume(folder: RunFolder) -> None:
    if folder.checkpoints.exists():
        click.echo(f"Stopped; to go on: etpo train --resume {folder.path}", err=True)
    else:
        click.echo("Stopped before the first checkpoint; nothing was kept.", err=True)
