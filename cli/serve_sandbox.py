"""`etpo serve-sandbox`: runs programs for a trainer on another machine."""

import os
import sys

import click

from etpo.cli.errors import Failed


@click.command("serve-sandbox")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8765, show_default=True,
              help="Port to listen on; 0: a free one.")  # fmt: skip
@click.option("--sandbox", type=click.Choice(["strict", "default"]), default="default", show_default=True,
              help="strict refuses to run with fewer than all protections (see `etpo doctor`).")  # fmt: skip
@click.option("--stdio", is_flag=True,
              help="Answer on standard input and output instead; needs no token.")  # fmt: skip
def serve_sandbox(host: str, port: int, sandbox: str, stdio: bool) -> None:
    """Run programs for others who have the token in ETPO_RUNNER_TOKEN, until interrupted.

    They send programs and what these learn from; labels to score by stay with them. Nothing is encrypted:
    listen on a network of your own only, or through a tunnel.
    """
    from etpo.envs.container import serve
    from etpo.envs.remote import TOKEN_VARIABLE, make_answer, make_server
    from etpo.envs.sandbox import Sandbox

    if stdio:
        with Sandbox(sandbox) as box:
            box.layers()
            serve(make_answer(box), sys.stdin.buffer, sys.stdout.buffer)
        return
    token = os.environ.get(TOKEN_VARIABLE)
    if not token:
        raise Failed(f"expected a token in {TOKEN_VARIABLE}, got none; choose one, the same on both sides")
    with Sandbox(sandbox) as box:
        box.layers()
        try:
            server = make_server(box, token, host, port)
        except OSError as error:
            raise Failed(f"--host {host} --port {port}: expected a free address, got: {error}") from error
        click.echo(f"{box.workers} programs at once at http://{host}:{server.server_port}")
        with server:
            server.serve_forever()
