"""`etpo bench kernels`: from its options to tables."""

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from etpo.bench.kernels.cases import FUNCTIONS, SHAPES, cases_of, shape_of
from etpo.bench.kernels.limits import copy_bytes_per_s
from etpo.bench.kernels.measure import Row, Tell, measure
from etpo.bench.kernels.output import environment, precision_markdown, to_json, to_markdown, to_text
from etpo.bench.kernels.peers import CONTESTANTS, contestants_of
from etpo.bench.kernels.plot import to_svg
from etpo.bench.kernels.precision import precision_table

PRECISION_SHAPE, PRECISION_TOKENS = "32016x896", 64
CPU_TOKENS, GPU_TOKENS = [256, 1024], [256, 1024, 8192, 16384]


@dataclass(frozen=True)
class Options:
    """The command's options; None, or "auto", is the default for the device."""

    shapes: list[str] | None
    functions: list[str] | None
    peers: list[str] | None
    heads: list[str]
    device: str
    dtype: str
    tokens: list[int] | None
    repeats: int
    threads: int | None
    precision: bool


@dataclass(frozen=True)
class Result:
    """The same rows in several forms; `svg`, and `text` for 80 columns, are empty without times."""

    json: str
    markdown: str
    svg: str
    text: str = ""


def run(options: Options, tell: Tell, save: Callable[[Result], None]) -> Result:
    """Measures what `options` ask for; `save` gets what there is after each case.

    Raises ValueError for a name or device that does not exist.
    """
    device = device_named(options.device)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    contestants = contestants_of(options.peers if options.peers is not None else list(CONTESTANTS))
    wrong = [head for head in options.heads if head not in ("frozen", "trained")]
    if wrong or not options.heads:
        raise ValueError(f"heads: expected some of frozen, trained, got {', '.join(wrong) or 'none'}")
    about: dict[str, Any] = {
        "command": command_of(options),
        "device": device.type,
        "environment": environment(device),
    }
    if options.precision:
        shape = shape_of((options.shapes or [PRECISION_SHAPE])[0])
        n_tokens = (options.tokens or [PRECISION_TOKENS])[0]
        name = "bfloat16" if options.dtype == "auto" else options.dtype
        about |= {"dtype": name, "shape": f"V {shape.n_vocab}, D {shape.d_model}", "n_tokens": n_tokens}
        errors = precision_table(contestants, shape, n_tokens, device, getattr(torch, name), tell)
        return Result(to_json(errors, about), precision_markdown(errors, about), "")
    on_gpu = device.type == "cuda"
    shapes = [shape_of(name) for name in options.shapes or (list(SHAPES) if on_gpu else ["nano"])]
    tokens = options.tokens or (GPU_TOKENS if on_gpu else CPU_TOKENS)
    name = ("bfloat16" if on_gpu else "float32") if options.dtype == "auto" else options.dtype
    functions = options.functions if options.functions is not None else list(FUNCTIONS)
    cases = cases_of(functions, shapes, tokens, options.heads, device, getattr(torch, name))
    about["copy_bytes_per_s"] = copy_bytes_per_s(device)

    def result(rows: list[Row]) -> Result:
        return Result(to_json(rows, about), to_markdown(rows, about), to_svg(rows), to_text(rows))

    return result(measure(cases, contestants, options.repeats, tell, lambda rows: save(result(rows))))


def device_named(name: str) -> torch.device:
    """The device of that name, auto a GPU where there is one. Raises ValueError where it is not here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device: expected cpu, cuda or auto, got {name!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: torch {torch.__version__} sees no GPU here, got {name!r}")
    return device


def command_of(options: Options) -> str:
    """The command line that asks for the same again."""
    words = ["etpo bench kernels"]
    for name in ("shapes", "functions", "peers", "heads", "tokens"):
        values = getattr(options, name)
        if values is not None:
            words.append(f"--{name} {shlex.quote(','.join(map(str, values)))}")
    words += [f"--device {options.device}", f"--dtype {options.dtype}", f"--repeats {options.repeats}"]
    if options.threads is not None:
        words.append(f"--threads {options.threads}")
    return " ".join(words + (["--precision"] if options.precision else []))
