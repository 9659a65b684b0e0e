"""`etpo bench`: measured tables."""

import json
import sys
from pathlib import Path

import click

from etpo.cli.errors import Group, write_file


@click.group(cls=Group)
def bench() -> None:
    """Measure: learning beside the frozen model, the sandbox's throughput, the kernels beside their peers."""


@bench.command()
@click.option("--dataset", default="tic-tac-toe", show_default=True, help="Data set of every run.")
@click.option("--seeds", default=None, type=click.IntRange(min=1),
              help="Seeds 0 … N − 1; default 5, with --compare 16.")  # fmt: skip
@click.option("--first-seed", default=0, show_default=True, help="Seed of the first run.")
@click.option("--steps", default=None, type=click.IntRange(min=1),
              help="Programs a run; default 500, with --compare 200.")  # fmt: skip
@click.option(
    "--ablation", is_flag=True, help="One factor at a time around the default, not only default and frozen."
)
@click.option("--rows", default=None, help="Names of rows of the ablation, with commas: those alone.")
@click.option("--compare", default=None, metavar="ALGO,…",
              help="Compare algorithms, paired by seed, each with the first; a variant is written "
              "ALGO:OPTION=VALUE, such as grpo:grpo=dapo.")  # fmt: skip
@click.option("--tune", default=None, type=click.IntRange(min=0), metavar="N",
              help="With --compare: tuning runs of each algorithm over its own step sizes, on seeds that are "
              "not reported; a multiple of 6 tries every setting of each alike; default 0.")  # fmt: skip
@click.option(
    "--decide", is_flag=True, help="With --compare: no more than 16 seeds once every difference is decided."
)
@click.option("--set", "settings", multiple=True, metavar="OPTION=VALUE",
              help="With --compare: an option of `etpo train` for every run; may be given again."
              )  # fmt: skip
@click.option("--fresh/--no-fresh", default=True, show_default=True,
              help="Score each best program again on split seeds 5–24 (with --compare also those of the "
              "model that learns nothing).")  # fmt: skip
@click.option("--jobs", default=1, show_default=True, type=click.IntRange(min=1), help="Runs at a time.")
@click.option("--work", default="runs/bench", show_default=True, type=click.Path(path_type=Path),
              help="Folder of the runs; finished ones are only read.")  # fmt: skip
@click.option("--title", default=None, help="Heading of the Markdown table.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the rows there.")
@click.option("--markdown", type=click.Path(path_type=Path), help="Write the table there.")
@click.option(
    "--plot", type=click.Path(path_type=Path), help="With --compare: write the figure there, an SVG."
)
def learning(
    dataset: str, seeds: int | None, first_seed: int, steps: int | None, ablation: bool, rows: str | None,
    compare: str | None, tune: int | None, decide: bool, settings: tuple[str, ...], fresh: bool, jobs: int,
    work: Path, title: str | None, json_file: Path | None, markdown: Path | None, plot: Path | None,
) -> None:  # fmt: skip
    """Train with several seeds, beside the frozen model with as many programs; or compare algorithms.

    \b
    etpo bench learning --dataset tic-tac-toe --seeds 5
    etpo bench learning --compare etpo,ppo-kl,rloo,grpo --tune 6 --seeds 16 --steps 200 --jobs 2
    """
    if compare is not None:
        if ablation or rows is not None or first_seed:
            raise click.UsageError("--compare: expected no --ablation, --rows or --first-seed beside it")
        from etpo.cli.compare import Files, compare_tuned

        files = Files(json_file, markdown, plot)
        compare_tuned(
            _words(compare) or [], dataset, steps or 200, seeds or 16, tune or 0, settings, work, files,
            decide=decide, fresh=fresh, jobs=jobs, title=title,
        )  # fmt: skip
        return
    if tune is not None or decide or settings or plot is not None:
        raise click.UsageError("--tune, --decide, --set, --plot: expected --compare ALGO,… beside them")
    from etpo.bench.learning import ABLATION, DEFAULT, FROZEN, run_table, to_json, to_markdown, variants_named

    seeds, steps = seeds or 5, steps or 500
    if rows is not None:
        variants = variants_named(_words(rows) or [])
    else:
        variants = ABLATION if ablation else (DEFAULT, FROZEN)
    work.mkdir(parents=True, exist_ok=True)
    table = run_table(
        dataset, variants, list(range(first_seed, first_seed + seeds)), steps, work.resolve(), jobs=jobs,
        fresh=fresh, tell=click.echo,
    )  # fmt: skip
    command = (
        f"etpo bench learning --dataset {dataset} --seeds {seeds} --first-seed {first_seed} --steps {steps}"
    )
    command += f" --rows '{rows}'" if rows is not None else " --ablation" if ablation else ""
    command += f" --jobs {jobs}" + ("" if fresh else " --no-fresh")
    text = to_markdown(table, title or f"Learning on {dataset}", command)
    click.echo(text)
    _write({"--json": (json_file, to_json(table, command)), "--markdown": (markdown, text)})


@bench.command()
@click.option(
    "--workers", default=None, type=click.IntRange(min=1), help="Processes at once; default one a core."
)
@click.option("--seconds", default=3.0, show_default=True, type=click.FloatRange(min=0, min_open=True),
              help="Seconds of a round.")  # fmt: skip
@click.option("--hostile", default=None, type=click.IntRange(min=1),
              help="Run that many hostile programs instead, and compare what is there before and after."
              )  # fmt: skip
@click.option("--seed", default=0, show_default=True, help="Of the choice of hostile programs.")
@click.option("--relays", default=None, type=click.IntRange(min=1),
              help="Score programs that predict from what an earlier split told them, so many times each."
              )  # fmt: skip
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the result there too.")
def sandbox(
    workers: int | None, seconds: float, hostile: int | None, seed: int, relays: int | None,
    json_file: Path | None,
) -> None:  # fmt: skip
    """Split processes, and whole programs, that the sandbox runs in a second; prints one JSON object.

    With --hostile the exit code is 1 where a program left something behind or had an outcome that it must
    not have; with --relays, where one scored above 0.55 and passed the audits.
    """
    if relays is not None:
        from etpo.bench.sandbox.relays import measure_relays

        result = measure_relays(relays, workers, lambda line: click.echo(line, err=True))
    elif hostile is None:
        from etpo.bench.sandbox.throughput import measure

        result = measure(workers, seconds)
    else:
        from etpo.bench.sandbox.mix import run_mix

        result = run_mix(hostile, seed, workers, lambda line: click.echo(line, err=True))
    text = json.dumps(result, indent=2) + "\n"
    click.echo(text, nl=False)
    _write({"--json": (json_file, text)})
    through = [name for name, relay in result.get("relays", {}).items() if not relay["held"]]
    if result.get("leaked") or result.get("unexpected") or through:
        click.get_current_context().exit(1)


@bench.command()
@click.option("--shapes", default=None,
              help="Names (nano, qwen2.5-0.5b, codellama-7b, llama-3-8b) or VxD, with commas; default nano "
              "on a CPU, the four on a GPU.")  # fmt: skip
@click.option("--functions", default=None, help="Functions of etpo.kernels, with commas; default all.")
@click.option("--peers", default=None, help="Rows beside eager, with commas; default all that are known.")
@click.option("--heads", default="frozen,trained", show_default=True, help="Which heads learn, with commas.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, or auto.")
@click.option("--dtype", default="auto", show_default=True,
              type=click.Choice(["auto", "float32", "bfloat16", "float16", "float64"]),
              help="Of the inputs; auto is float32 on a CPU, bfloat16 on a GPU and in --precision."
              )  # fmt: skip
@click.option("--tokens", default=None, help="Numbers of tokens, with commas; default 256,1024 (CPU), "
              "256,1024,8192,16384 (GPU), 64 in --precision.")  # fmt: skip
@click.option("--repeats", default=5, show_default=True, type=click.IntRange(min=1), help="Rounds of a case.")
@click.option(
    "--threads", default=None, type=click.IntRange(min=1), help="Threads of torch; default its own."
)
@click.option("--precision", is_flag=True, help="The error of KL's gradient at KL 1e-4 … 1, and no times.")
@click.option("--compile-only", is_flag=True, help="Compile the Triton kernels offline, and run nothing.")
@click.option("--archs", default="80,90,100", show_default=True, help="For --compile-only, with commas.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the rows there.")
@click.option("--markdown", type=click.Path(path_type=Path), help="Write the tables there.")
@click.option("--plot", type=click.Path(path_type=Path), help="Write the bars there, an SVG.")
def kernels(
    shapes: str | None, functions: str | None, peers: str | None, heads: str, device: str, dtype: str,
    tokens: str | None, repeats: int, threads: int | None, precision: bool, compile_only: bool, archs: str,
    json_file: Path | None, markdown: Path | None, plot: Path | None,
) -> None:  # fmt: skip
    """Time, memory and error of the kernels, beside plain PyTorch and every peer that is installed."""
    if plot is not None and (plot.suffix != ".svg" or precision or compile_only):
        raise click.UsageError(f"--plot: expected an .svg file, and times to draw, got {str(plot)!r}")
    if compile_only:
        from etpo.bench.compile import compile_table, to_markdown

        rows = compile_table(_whole_numbers("--archs", archs))
        text = to_markdown(rows)
        click.echo(text)
        as_json = json.dumps(rows, indent=1, default=vars) + "\n"
        _write({"--markdown": (markdown, text), "--json": (json_file, as_json)})
        return
    from etpo.bench.kernels.run import Options, Result, run

    options = Options(
        shapes=_words(shapes), functions=_words(functions), peers=_words(peers), heads=_words(heads) or [],
        device=device, dtype=dtype, tokens=None if tokens is None else _whole_numbers("--tokens", tokens),
        repeats=repeats, threads=threads, precision=precision,
    )  # fmt: skip

    def save(result: Result) -> None:
        _write({
            "--json": (json_file, result.json),
            "--markdown": (markdown, result.markdown),
            "--plot": (plot, result.svg),
        })  # fmt: skip

    result = run(options, lambda line: click.echo(line, err=True), save)
    click.echo(result.text if result.text and sys.stdout.isatty() else result.markdown)
    save(result)


def _words(text: str | None) -> list[str] | None:
    return None if text is None else [word.strip() for word in text.split(",") if word.strip()]


def _whole_numbers(option: str, text: str) -> list[int]:
    words = _words(text) or []
    if not words or not all(word.isdigit() and int(word) > 0 for word in words):
        raise click.BadParameter(
            f"expected whole numbers above 0 with commas, got {text!r}", param_hint=option
        )
    return [int(word) for word in words]


def _write(files: dict[str, tuple[Path | None, str]]) -> None:
    """Writes each option's text to its file; None stands for a file that nobody asked for."""
    for option, (file, text) in files.items():
        if file is not None:
            write_file(option, file, text)


@bench.command()
@click.option("--minutes", default=9.0, show_default=True, type=click.FloatRange(min=0.0, min_open=True),
              help="Time limit; steps that do not fit are named in the JSON.")  # fmt: skip
@click.option("--json", "json_file", required=True, type=click.Path(path_type=Path),
              help="Written after every case.")  # fmt: skip
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, or auto.")
def gpu(minutes: float, json_file: Path, device: str) -> None:
    """All that only a GPU can show: exactness, tiles, peers, the engine on a 7B-shaped random model.

    On a CPU the same steps run on tiny shapes. Exits with 1 where a function was not exact.
    """
    from etpo.bench.gpu import run
    from etpo.bench.kernels.run import device_named

    def save(text: str) -> None:
        _write({"--json": (json_file, text)})

    found = run(minutes, device_named(device), lambda line: click.echo(line, err=True), save)
    if not found.is_right:
        click.get_current_context().exit(1)
