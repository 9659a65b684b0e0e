"""`etpo report`: the page of a run, or one that compares several. `etpo watch`: the same page, live."""

import json
from pathlib import Path
from typing import Any

import click

from etpo.cli.errors import write_file
from etpo.engine.run_folder import RunFolder

RUNS = click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN…")


@click.command()
@RUNS
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Where the page goes. [default: RUN/report.html; of several runs: compare.html]",
)
@click.option("--json", "as_json", is_flag=True, help="Print the numbers as JSON, and write no page.")
def report(runs: tuple[Path, ...], out: Path | None, as_json: bool) -> None:
    """Write the page of a run, also of one that was cut off; of several runs, one page that compares them.

    A page is one file that needs no network: curves, the credit of every token, the best programs, errors,
    all programs. Runs whose settings differ in the seed alone are one group, shown as a mean with its
    interval.

    \b
    etpo report runs/tic-tac-toe-etpo-s0-20260101-120000
    etpo report runs/* --out compare.html
    """
    folders = [RunFolder.existing(path) for path in dict.fromkeys(runs)]
    if as_json:
        from etpo.engine.report.compare import comparison

        click.echo(json.dumps(comparison(folders), indent=2))
        return
    if len(folders) == 1:
        from etpo.engine.report.page import run_page

        page, place = run_page(folders[0]), out or folders[0].report_file
    else:
        from etpo.engine.report.compare import comparison_page

        page, place = comparison_page(folders), out or Path("compare.html")
    write_file("--out", place, page)
    click.echo(f"Report: {place}")


@click.command()
@click.argument("run", type=click.Path(path_type=Path), metavar="RUN")
@click.option("--port", type=click.IntRange(0, 65535), default=8321, show_default=True,
              help="Port on this machine; 0: any that is free.")  # fmt: skip
def watch(run: Path, port: int) -> None:
    """Serve a run's page, live while it trains, to browsers on this machine. Ctrl-C ends it.

    The page renews itself after each iteration. The server listens on the loopback address alone; to look
    from another machine, forward the port: ssh -L 8321:localhost:8321 HOST.
    """
    from etpo.engine.report.live import server_of

    folder = RunFolder.existing(run)
    server: Any = server_of(folder, port)
    click.echo(f"{run}: http://127.0.0.1:{server.server_port} (Ctrl-C ends it)")
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        click.echo()
    finally:
        server.server_close()
