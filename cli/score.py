"""`etpo score`: one program's reward."""

import contextlib
import json
import tokenize
from pathlib import Path

import click

from etpo.cli.errors import Failed


@click.command()
@click.argument("program", type=click.Path(path_type=Path))
@click.option(
    "--dataset", required=True, help="Data set by name (see `etpo data list`), or path of a CSV file."
)
@click.option("--target", help="The target's column; needed for a CSV file.")
@click.option("--protocol", type=click.Choice(["default", "paper"]), default="default", show_default=True,
              help="How the data set is prepared; paper does as the authors' code does.")  # fmt: skip
@click.option("--timeout-s", type=click.FloatRange(min=0, min_open=True), default=10.0, show_default=True,
              help="Processor seconds that the program may take on one of its five splits.")  # fmt: skip
@click.option("--sandbox", type=click.Choice(["strict", "default"]), default="default", show_default=True,
              help="strict refuses to run with fewer than all protections (see `etpo doctor`).")  # fmt: skip
@click.option("--audit", is_flag=True,
              help="Audit the program, too: does it know labels that it was not given?")  # fmt: skip
@click.option("--runner", default="local", show_default=True,
              help="local, docker:IMAGE, podman:IMAGE, or `etpo serve-sandbox` at"
              " http://HOST:PORT,….")  # fmt: skip
def score(
    program: Path,
    dataset: str,
    target: str | None,
    protocol: str,
    timeout_s: float,
    sandbox: str,
    audit: bool,
    runner: str,
) -> None:
    """Run PROGRAM in the sandbox and print its reward as one JSON object.

    PROGRAM is a Python file that defines build_model(x_train, y_train), or that function's bare body. The
    reward is the mean ROC AUC over five random halvings of the data, or −1 where the program fails. The exit
    code is 0 whatever the program did.
    """
    try:
        with tokenize.open(program) as file:  # reads byte order marks and coding lines as Python does
            source = file.read()
    except (OSError, UnicodeDecodeError, SyntaxError) as error:
        reason = error.strerror if isinstance(error, OSError) else "text that is not UTF-8"
        raise Failed(
            f"{program}: expected a Python file, got: {reason}; give the path of a program"
        ) from error

    from etpo.envs.datasets import load_dataset

    data = load_dataset(dataset, target, protocol)

    from etpo.envs.remote import open_runner
    from etpo.envs.scoring import Scorer

    with contextlib.closing(open_runner(runner, sandbox, timeout_s)) as box:
        result = Scorer(data, box, audit_share=float(audit)).score(source)
    record = {
        "reward": result.reward, "outcome": result.outcome, "auc_mean": result.auc_mean,
        "auc_std": result.auc_std, "error": result.error, "wall_s": round(result.wall_s, 4),
    }  # fmt: skip
    if data.synthetic:
        record["synthetic"] = True
    click.echo(json.dumps(record))
