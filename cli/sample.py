"""`etpo sample`: programs from a trained run or a model, shown."""

from dataclasses import replace
from pathlib import Path

import click

from etpo.cli.errors import Failed


@click.command()
@click.argument("source", metavar="DIR|MODEL")
@click.option("-n", "n", type=click.IntRange(min=1), default=5, show_default=True, help="How many programs.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the draws.")
@click.option("--temperature", type=click.FloatRange(min=0, min_open=True), default=1.0, show_default=True,
              help="1 draws from the policy itself, less is tamer.")  # fmt: skip
@click.option("--dataset", help="Data set that the prompt names.  [default: the run's, or tic-tac-toe]")
@click.option("--target", help="The target's column; needed for a CSV file.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
def sample(
    source: str, n: int, seed: int, temperature: float, dataset: str | None, target: str | None, device: str
) -> None:
    """Print programs drawn from a trained run's policy, or from a model.

    DIR is a run's folder. MODEL is a model folder, a hub name (owner/name), or the bundled etpo-nano.
    """
    from etpo.engine.config import Config, resolve

    folder = Path(source).expanduser()
    config_file = folder / "config.toml"
    is_run = config_file.is_file()
    if folder.is_dir() and not is_run and not (folder / "config.json").is_file():
        raise Failed(
            f"{source}: expected the folder of a run (with config.toml) or of a model (with config.json), "
            "got a folder with neither; give another"
        )
    config = replace(resolve({}, config_file) if is_run else Config(model=source), device=device)
    if dataset is not None:
        config = replace(config, dataset=dataset, target=target, env=None)
    elif target is not None:
        config = replace(config, target=target)

    from etpo.engine.models.language_model import load_language_model
    from etpo.engine.models.open import device_of, torch_dtype
    from etpo.engine.trained import draw, first_state, load, quiet_transformers
    from etpo.envs.prompts import as_program

    prompt, note = first_state(config)
    quiet_transformers()
    if is_run:
        texts = load(folder, device).sample(prompt, n, seed=seed, temperature=temperature)
    else:
        model, tokenizer = load_language_model(source, torch_dtype(config), device_of(config))
        texts = draw(
            model,
            tokenizer,
            prompt,
            n,
            seed=seed,
            temperature=temperature,
            max_new_tokens=config.max_new_tokens,
        )
    for number, text in enumerate(texts, start=1):
        click.echo(f"# program {number} of {n}{note}")
        click.echo((text if config.env else as_program(text)).rstrip() + "\n")
