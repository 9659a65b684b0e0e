"""`etpo bench`: measured tables."""

from pathlib import Path

import click

from etpo.cli.errors import Group


@click.group(cls=Group)
def bench() -> None:
    """Measure: learning tables beside the frozen model, and the sandbox's throughput."""


@bench.command()
@click.option("--dataset", default="tic-tac-toe", show_default=True, help="Data set of every run.")
@click.option("--seeds", default=5, show_default=True, type=click.IntRange(min=1), help="Seeds 0 … N − 1.")
@click.option("--first-seed", default=0, show_default=True, help="Seed of the first run.")
@click.option("--steps", default=500, show_default=True, type=click.IntRange(min=1), help="Programs a run.")
@click.option(
    "--ablation", is_flag=True, help="One factor at a time around the default, not only default and frozen."
)
@click.option("--fresh/--no-fresh", default=True, show_default=True,
              help="Score each best program again on split seeds 5–24.")  # fmt: skip
@click.option("--jobs", default=1, show_default=True, type=click.IntRange(min=1), help="Runs at a time.")
@click.option("--work", default="runs/bench", show_default=True, type=click.Path(path_type=Path),
              help="Folder of the runs; finished ones are only read.")  # fmt: skip
@click.option("--title", default=None, help="Heading of the Markdown table.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the rows there.")
@click.option("--markdown", type=click.Path(path_type=Path), help="Write the table there.")
def learning(
    dataset: str, seeds: int, first_seed: int, steps: int, ablation: bool, fresh: bool, jobs: int, work: Path,
    title: str | None, json_file: Path | None, markdown: Path | None,
) -> None:  # fmt: skip
    """Train with several seeds, beside the frozen model with as many programs."""
    from etpo.bench.learning import ABLATION, DEFAULT, FROZEN, run_table, to_json, to_markdown

    work.mkdir(parents=True, exist_ok=True)
    variants = ABLATION if ablation else (DEFAULT, FROZEN)
    rows = run_table(
        dataset, variants, list(range(first_seed, first_seed + seeds)), steps, work.resolve(), jobs=jobs,
        fresh=fresh, tell=click.echo,
    )  # fmt: skip
    command = (
        f"etpo bench learning --dataset {dataset} --seeds {seeds} --first-seed {first_seed} --steps {steps}"
    )
    command += (" --ablation" if ablation else "") + f" --jobs {jobs}" + ("" if fresh else " --no-fresh")
    text = to_markdown(rows, title or f"Learning on {dataset}", command)
    click.echo(text)
    for file, content in ((json_file, to_json(rows, command)), (markdown, text)):
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content, encoding="utf-8")
