"""`etpo pretrain`: builds the bundled model anew."""

import time
from pathlib import Path
from typing import Any

import click

from etpo.cli.errors import new_folder
from etpo.engine.report.summary import duration

EVERY_S = 10.0


@click.command()
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="The model's folder, new or empty."
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Decides every bit of it."
)
@click.option(
    "--tokens", type=click.IntRange(min=1), default=8_000_000, show_default=True, help="Tokens to read."
)
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True),
              help="Read fewer tokens, where this machine would take longer than this.")  # fmt: skip
@click.option(
    "--threads", type=click.IntRange(min=0), default=0, show_default=True, help="0: one for each core."
)
def pretrain(out: Path, seed: int, tokens: int, minutes: float | None, threads: int) -> None:
    """Pretrain the small bundled model on programs that a grammar writes: about 20 minutes on two cores.

    Interrupted, it goes on from its last checkpoint when called again with the same options.
    """
    new_folder(out)

    from etpo.engine.pretrain.train import pretrain as run

    numbers = run(out, seed=seed, minutes=minutes, tokens=tokens, threads=threads, progress=Teller())
    for line in lines_of(numbers):
        click.echo(line)
    click.echo(f"Wrote {out}; train it with: etpo train --model {out}")


def lines_of(numbers: dict[str, Any], inside: str = "") -> list[str]:
    """A line for each number; those of a dictionary stand under its name."""
    lines = []
    for name, value in numbers.items():
        if isinstance(value, dict):
            lines += lines_of(value, f"{inside}{name} ")
        else:
            text = (
                f"{value:,.4g}"
                if isinstance(value, float)
                else f"{value:,}"
                if isinstance(value, int)
                else value
            )
            lines.append(f"{inside + str(name):<32}{text}")
    return lines


class Teller:
    """A line for each new stage, and one every few seconds within it."""

    def __init__(self) -> None:
        self._stage = ""
        self._told_at = 0.0

    def __call__(self, state: dict[str, Any]) -> None:
        now, stage = time.monotonic(), state["stage"]
        is_last = state.get("step") is not None and state["step"] == state.get("of")
        if stage == self._stage and now - self._told_at < EVERY_S and not is_last:
            return
        self._stage, self._told_at = stage, now
        parts = [stage]
        for key in ("documents", "step"):
            if key in state:
                parts.append(f"{key} {state[key]:,} of {state['of']:,}")
        if "loss" in state:
            left_s = state["wall_s"] / state["step"] * (state["of"] - state["step"])
            parts += [f"loss {state['loss']:.4f}", f"left {duration(left_s)}"]
        click.echo("  ".join(parts))
