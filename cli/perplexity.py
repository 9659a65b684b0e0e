"""`etpo perplexity`: how well a trained policy still predicts texts, beside the model that it started as."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from etpo.cli.errors import write_file

if TYPE_CHECKING:
    from etpo.engine.perplexity import Perplexity


@click.command("perplexity")
@click.argument("run", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--text", "files", multiple=True, type=click.Path(path_type=Path), metavar="FILE",
              help="A text in UTF-8; may be given again. Default: three small texts of the package's own, "
              "English prose, Python code, and a table's description.")  # fmt: skip
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the numbers there.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
def perplexity(run: Path, files: tuple[Path, ...], json_file: Path | None, device: str) -> None:
    """Perplexity of texts under the trained policy of the run in RUN, and under its reference.

    A policy that learned to act at the cost of its language shows here: its perplexity rises.

    \b
    etpo perplexity runs/tic-tac-toe-etpo-s0-20260101-120000
    etpo perplexity runs/my-run --text notes.txt --text code.py
    """
    from etpo.engine.run_folder import RunFolder

    RunFolder.existing(run)  # what is wrong with it is said before anything slow starts

    from etpo.engine.perplexity import before_and_after, own_texts, read_text
    from etpo.engine.trained import load, quiet_transformers

    texts = {str(file): read_text(file) for file in files} if files else own_texts()
    quiet_transformers()
    trained = load(run, device)
    for line in trained.notes:
        click.echo(f"Passed over a damaged checkpoint: {line}", err=True)
    found = before_and_after(trained, texts)
    _show(found, trained.step)
    if json_file:
        write_file("--json", json_file, json.dumps(_record(found, trained.step), indent=2) + "\n")


def _show(found: "dict[str, dict[str, Perplexity]]", step: int) -> None:
    width = max(map(len, found))
    click.echo(f"Perplexity of a token, after {step} programs of training")
    click.echo(f"{'text':{width}}{'tokens':>9}{'reference':>12}{'policy':>12}{'change':>9}")
    for name, both in found.items():
        before, after = both["reference"], both["policy"]
        change = after.perplexity / before.perplexity - 1
        click.echo(f"{name:{width}}{before.n_tokens:>9}{before.perplexity:>12.3f}{after.perplexity:>12.3f}"
                   f"{change:>+9.1%}")  # fmt: skip


def _record(found: "dict[str, dict[str, Perplexity]]", step: int) -> dict[str, Any]:
    texts = [
        {"text": name} | {role: dataclasses.asdict(one) for role, one in both.items()}
        for name, both in found.items()
    ]
    return {"step": step, "texts": texts}
