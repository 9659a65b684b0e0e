"""`etpo compare`, and the comparison of `etpo bench learning --compare`."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from etpo.cli.errors import write_file

if TYPE_CHECKING:
    from etpo.bench.compare_runs import Runs
    from etpo.bench.compare_variants import Variant


@dataclass(frozen=True)
class Files:
    """Where results go; None where nobody asked."""

    json: Path | None
    markdown: Path | None
    svg: Path | None

    def __post_init__(self) -> None:
        if self.svg is not None and self.svg.suffix != ".svg":
            raise click.UsageError(f"--plot: expected an .svg file, got '{self.svg}'")

    def write(self, json: str, markdown: str, svg: str) -> None:
        """Write what was asked for."""
        named = (
            ("--json", self.json, json),
            ("--markdown", self.markdown, markdown),
            ("--plot", self.svg, svg),
        )
        for option, file, text in named:
            if file is not None:
                write_file(option, file, text)


@click.command("compare")
@click.option("--datasets", default="tic-tac-toe", show_default=True, metavar="NAME,…", help="Data sets.")
@click.option("--algos", default=None, metavar="ALGO,…",
              help="Algorithms; the others are compared with the first. A variant is written "
              "ALGO:OPTION=VALUE[:OPTION=VALUE…]. Default: etpo,ppo-kl,reflection, or the ablation alone."
              )  # fmt: skip
@click.option("--ablation", "ablations", multiple=True, metavar="NAME",
              help="A named set of variants: reflection, backup (by token or by program), beta, gamma, lam, "
              "temperature, q-form or replay; may be given again.")  # fmt: skip
@click.option("--seeds", default=5, show_default=True, type=click.IntRange(min=1), help="Seeds 0 … N − 1.")
@click.option("--steps", default=500, show_default=True, type=click.IntRange(min=1), help="Programs a run.")
@click.option("--set", "settings", multiple=True, metavar="OPTION=VALUE",
              help="An option of `etpo train` for every run; may be given again.")  # fmt: skip
@click.option("--fresh/--no-fresh", default=True, show_default=True,
              help="Score each best program again on split seeds 5–24, beside the best of as many programs "
              "of the frozen model.")  # fmt: skip
@click.option("--jobs", default=1, show_default=True, type=click.IntRange(min=1), help="Runs at a time.")
@click.option("--work", default="runs/compare", show_default=True, type=click.Path(path_type=Path),
              help="Folder of the runs; finished ones are only read.")  # fmt: skip
@click.option("--title", default="Algorithms compared", help="Heading of the Markdown table.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the rows there.")
@click.option("--markdown", type=click.Path(path_type=Path), help="Write the tables there.")
@click.option("--plot", type=click.Path(path_type=Path), help="Write the convergence figure there, an SVG.")
def compare_command(
    datasets: str, algos: str | None, ablations: tuple[str, ...], seeds: int, steps: int,
    settings: tuple[str, ...], fresh: bool, jobs: int, work: Path, title: str, json_file: Path | None,
    markdown: Path | None, plot: Path | None,
) -> None:  # fmt: skip
    """Compare algorithms over data sets and seeds: highest reward, mean of the last 100, curves, tests.

    Every run is an `etpo train` in a folder of its own under --work; the same command again only reads those
    that are finished and makes the rest. To compare algorithms that are tuned alike first, see
    `etpo bench learning --compare`.

    \b
    etpo compare --datasets tic-tac-toe,pharyngitis --algos etpo,ppo-kl,reflection --seeds 5 --jobs 2
    etpo compare --ablation beta --steps 200
    """
    from etpo.bench.compare_table import Grid, run_grid, to_json, to_markdown, to_svg, with_ablations
    from etpo.bench.compare_variants import ablation

    files = Files(json_file, markdown, plot)
    names = _words(datasets)
    if not names:
        raise click.UsageError("--datasets: expected names with commas, got none; see `etpo data list`")
    try:
        sets = [ablation(name) for name in ablations]
    except ValueError as error:
        raise click.UsageError(f"--ablation: {error}") from None
    default = [] if sets else ["etpo", "ppo-kl", "reflection"]
    words = with_ablations(default if algos is None else _words(algos), sets)
    fresh = fresh and not any(pair.startswith("env=") for pair in settings)  # nothing to score programs on
    grid = Grid(_variants("--algos", words), tuple(names), steps, seeds, fresh)
    command = (
        f"etpo compare --datasets {','.join(names)} --algos {','.join(words)} --seeds {seeds} "
        f"--steps {steps} --jobs {jobs}"
    )
    command += _told(settings) + ("" if fresh else " --no-fresh")
    tables = run_grid(grid, _runs(work, jobs, settings, command), click.echo)
    text = to_markdown(grid, tables, title, command)
    click.echo(text)
    files.write(to_json(grid, tables, command), text, to_svg(tables))


def compare_tuned(
    words: Sequence[str], dataset: str, steps: int, n_seeds: int, n_tune: int, settings: Sequence[str],
    work: Path, files: Files, *, decide: bool, fresh: bool, jobs: int, title: str | None,
) -> None:  # fmt: skip
    """`etpo bench learning --compare`: see `bench.compare`.

    Raises:
        UsageError: a name, an option or a value that is not known, or more seeds than are left for reports.
    """
    from etpo.bench.compare import Plan, compare
    from etpo.bench.compare_output import to_json, to_markdown, to_svg
    from etpo.bench.compare_tuning import FIRST_SEED

    if n_seeds > FIRST_SEED:
        raise click.UsageError(
            f"--seeds: expected at most {FIRST_SEED}, as tuning has the others, got {n_seeds}"
        )
    fresh = fresh and not any(pair.startswith("env=") for pair in settings)  # nothing to score programs on
    plan = Plan(_variants("--compare", words), dataset, steps, n_seeds, n_tune, decide, fresh)
    command = (
        f"etpo bench learning --compare {','.join(words)} --tune {n_tune} --dataset {shlex.quote(dataset)} "
        f"--seeds {n_seeds} --steps {steps} --jobs {jobs}"
    )
    command += _told(settings) + (" --decide" if decide else "") + ("" if fresh else " --no-fresh")
    found = compare(plan, _runs(work, jobs, settings, command), click.echo)
    text = to_markdown(found, title or f"Algorithms on {dataset}", command)
    click.echo(text)
    files.write(to_json(found, command), text, to_svg(found))


def _variants(option: str, words: Sequence[str]) -> "tuple[Variant, ...]":
    from etpo.bench.compare_variants import variants

    try:
        return variants(words)
    except ValueError as error:
        raise click.UsageError(f"{option}: {error}") from None


def _runs(work: Path, jobs: int, settings: Sequence[str], command: str) -> "Runs":
    """The work folder, which says from now on that this command was given."""
    from etpo.bench.compare_runs import Runs, write_readme
    from etpo.bench.compare_variants import setting_of

    try:
        common = tuple(setting_of(pair) for pair in settings)
    except ValueError as error:
        raise click.UsageError(f"--set: {error}") from None
    write_readme(work, command)
    return Runs(work.resolve(), jobs, common)


def _told(settings: Sequence[str]) -> str:
    return "".join(f" --set {shlex.quote(pair)}" for pair in settings)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]
