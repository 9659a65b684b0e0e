"""The `etpo` command: a group of subcommands, one file each, which import heavy libraries when they run."""

import click

from etpo import __version__
from etpo.cli.bench import bench
from etpo.cli.compare import compare_command
from etpo.cli.data import data
from etpo.cli.doctor import doctor
from etpo.cli.errors import Group
from etpo.cli.eval import evaluate
from etpo.cli.export import export
from etpo.cli.perplexity import perplexity
from etpo.cli.pretrain import pretrain
from etpo.cli.report import report, watch
from etpo.cli.sample import sample
from etpo.cli.score import score
from etpo.cli.serve_sandbox import serve_sandbox
from etpo.cli.train import train


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="etpo")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Teach a language model to act by running what it writes.

    Start with `etpo train --dataset tic-tac-toe`: the bundled model learns on a CPU in a few minutes.
    Exit codes: 0 done, 1 failed, 2 wrong use, 130 interrupted (after saving).
    """


# Each with its line in the list of commands, short enough for 80 columns.
COMMANDS: dict[click.Command, str] = {
    train: "Train a language model by running its programs.",
    report: "Write the page of a run, or one that compares several.",
    watch: "Serve the page of a run, live while it trains.",
    compare_command: "Compare algorithms over data sets and seeds.",
    evaluate: "Score fresh programs of a trained run.",
    sample: "Print programs of a trained run or of a model.",
    score: "Run one program, and print its reward.",
    serve_sandbox: "Run programs that other machines send.",
    export: "Write a run's model to a folder of its own.",
    perplexity: "See whether language modelling was kept.",
    bench: "Measure learning, kernels, sandbox on this machine.",
    data: "List, fetch and check data sets.",
    doctor: "Print versions, devices and the sandbox's layers.",
    pretrain: "Make the bundled model again, from a seed.",
}
for command, summary in COMMANDS.items():
    command.short_help = summary
    main.add_command(command)
