"""`etpo export`: a role of a run as a folder that `from_pretrained` loads."""

from pathlib import Path

import click

from etpo.cli.errors import new_folder


@click.command()
@click.argument("run", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="New or empty folder.")
@click.option("--role", type=click.Choice(["policy", "critic", "target", "reference"]), default="policy",
              show_default=True, help="Which of the run's models.")  # fmt: skip
@click.option("--merge", is_flag=True, help="Merge an adapter into its base; full weights are whole anyway.")
def export(run: Path, out: Path, role: str, merge: bool) -> None:
    """Write a model of the run in DIR, with its tokenizer, to a folder for transformers.

    A run with full weights gives a model folder. A run with adapters (lora) gives an adapter in PEFT's
    format, or with --merge a model folder. Weights are safetensors.
    """
    from etpo.engine.run_folder import RunFolder

    RunFolder.existing(run)
    new_folder(out)

    from etpo.engine.trained import load, quiet_transformers

    quiet_transformers()
    trained = load(run, device="cpu")
    trained.export(out, role, merge=merge)  # type: ignore[arg-type]
    what = "adapter" if (out / "adapter_config.json").is_file() else "model"
    click.echo(f"Wrote the {role} after {trained.step} programs as {what}: {out}")
