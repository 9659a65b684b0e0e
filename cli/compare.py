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
