"""Tiles of the sweeps and routes of the functions, measured on the GPU at hand, within a time limit.

python -m etpo.bench.tune [--minutes 5] [--out kernels/triton/measured.json]
python -m etpo.bench.tune --compile-only [--arch 90]      which candidates spill no registers; needs no GPU

Each kernel of `etpo.bench.compile` is run with every candidate that compiles without a spill, and the
quickest stays; then each function of one number a token by each route. The table is written after every
kernel, so that a run that ends early loses one.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from etpo.bench import compile as offline
from etpo.bench.kernels import cases, measure
from etpo.kernels import backends
from etpo.kernels.triton import measured
from etpo.kernels.triton.measured import Measured
from etpo.kernels.triton.sizes import Tile

if TYPE_CHECKING:
    from etpo.kernels.triton.tile import Launch, Target

# By chip: what may beat the rule of sizes.TILES.
CANDIDATES = {
    "pointers": (
        Tile(128, 128, 32, 8, 4), Tile(128, 64, 64, 8, 3), Tile(64, 128, 64, 8, 3), Tile(64, 64, 64, 8, 3),
    ),
    "hopper": (
        Tile(128, 256, 64, 8, 3), Tile(128, 256, 64, 8, 4), Tile(256, 128, 64, 8, 3),
        Tile(128, 128, 64, 8, 4), Tile(128, 128, 64, 8, 3), Tile(128, 128, 128, 8, 2),
        Tile(128, 64, 64, 8, 4), Tile(64, 128, 64, 8, 4),
    ),
    "blackwell": (
        Tile(128, 128, 64, 8, 4), Tile(128, 128, 128, 8, 2), Tile(128, 64, 64, 8, 4), Tile(64, 128, 64, 8, 4),
    ),
}  # fmt: skip
# Large enough that every multiprocessor is busy.
ON_A_GPU = offline.Sizes(4096, 32768, 2048, "cuda")
ROUTE_SHAPE, ROUTE_TOKENS = "32768x4096", 4096
REPEATS = 5
LEAST_REGISTERS = 64
# Functions by the kind of their number.
KINDS = {"kl": "soft_policy_kl", "log_ratio": "soft_value", "logprob": "linear_logprob_alone"}
Tell = Callable[[str], None]


class Choice(NamedTuple):
    """A kernel with a choice of tiles: its name in the table, its case, its usual tile."""

    name: str
    case: str
    usual: Tile
    launches: Callable[["Target"], list["Launch"]]


def choices(on: offline.Sizes, target: "Target") -> Iterator[Choice]:
    """Every kernel that multiplies in registers, once."""
    seen = set()
    for case, launches in offline.sweeps(on):
        launch = launches(target)[0]
        if launch.name not in seen and "float32" not in case and "from_logits" not in case:
            seen.add(launch.name)
            yield Choice(launch.name, case, tile_of(launch), launches)


def tile_of(launch: "Launch") -> Tile:
    """The tile that a sweep is launched with."""
    sizes = (launch.constants[name] for name in ("BLOCK_N", "BLOCK_V", "BLOCK_D", "num_warps", "num_stages"))
    return Tile(*sizes)


def quickest(times: dict[Tile, float], usual: Tile) -> Tile | None:
    """The tile with the least time; None where it is not quicker than the usual one by 1 %."""
    best = min(times, key=lambda tile: times[tile], default=usual)
    return best if times and times[best] < 0.99 * times.get(usual, float("inf")) else None


def tune_tiles(target: "Target", until: float, tell: Tell, save: Callable[[dict[str, Tile]], None]) -> None:
    """Runs every kernel with every candidate until the clock says `until`; `save` gets all found so far."""
    found: dict[str, Tile] = {}
    for choice in choices(ON_A_GPU, target):
        times: dict[Tile, float] = {}
        chip = "pointers" if "unaligned" in choice.name else target.chip
        for tile in dict.fromkeys((choice.usual, *CANDIDATES[chip])):
            if time.monotonic() > until:
                tell(f"out of time at {choice.name}")
                return
            seconds = run_seconds(choice.launches(target._replace(tiles={choice.name: tile})))
            if seconds is not None:
                times[tile] = seconds
        best = quickest(times, choice.usual)
        if best is not None:
            found[choice.name] = best
        shown = ", ".join(f"{'×'.join(map(str, t))}: {1e3 * s:.3g} ms" for t, s in times.items())
        tell(f"{choice.name}: {shown}")
        save(found)


def run_seconds(launches: list["Launch"]) -> float | None:
    """The least time of a kernel on the GPU; None where it does not compile, or spills registers."""
    launch = launches[0]
    try:
        built = launch.kernel[launch.grid](*launch.args, **launch.options)
        torch.cuda.synchronize()
    except Exception:
        return None
    # Too large a tile may compile to a kernel that does nothing.
    if built.n_spills or built.n_regs < LEAST_REGISTERS:
        return None
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        launch.kernel[launch.grid](*launch.args, **launch.options)
        end.record()
        torch.cuda.synchronize()
        times.append(1e-3 * start.elapsed_time(end))
    return float(min(times))


def route_times(case: cases.Case, rounds: int) -> dict[str, float]:
    """Seconds of forward and backward by each route, the least of `rounds`, on the device of the case."""
    inputs = cases.make_inputs(case)
    times: dict[str, float] = {}
    for route in measured.ROUTES:
        with backends.routed(route):
            for k in range(rounds + 1):
                clock: list[float] = []
                measure.run_once(case, lambda x: case.function.run(x, "auto"), inputs, clock)
                if k:
                    times[route] = min(times.get(route, float("inf")), sum(clock))
    return times


def tune_routes(
    shape: cases.Shape, n_tokens: int, device: torch.device, dtype: torch.dtype, until: float, tell: Tell,
    rounds: int = REPEATS,
) -> dict[str, str]:  # fmt: skip
    """The quickest route of each kind of number, with frozen and with trained heads."""
    routes: dict[str, str] = {}
    for kind, function in KINDS.items():
        for trained in (False, True):
            if time.monotonic() > until:
                tell("out of time at the routes")
                return routes
            case = cases.Case(cases.FUNCTIONS[function], shape, n_tokens, trained, device, dtype)
            times = route_times(case, rounds)
            key = measured.route_key(kind, trained=trained)
            routes[key] = min(times, key=lambda route: times[route])
            tell(f"{key}: " + ", ".join(f"{route} {1e3 * s:.4g} ms" for route, s in times.items()))
    return routes


def compile_candidates(arch: int, tell: Tell = print) -> dict[str, list[Tile]]:
    """By kernel: the candidates that compile for `arch` without a spill and within its shared memory."""
    fitting: dict[str, list[Tile]] = {}
    target = offline.target_for(arch)
    for choice in choices(offline.LLAMA, target):
        chip = "pointers" if "unaligned" in choice.name else target.chip
        good = []
        for tile in CANDIDATES[chip]:
            launch = choice.launches(target._replace(tiles={choice.name: tile}))[0]
            try:
                built = offline.build(choice.case, launch, arch)
            except Exception:
                continue
            spills = built.spill_loads + built.spill_stores
            # Too large a tile may compile to a kernel that does nothing.
            if not spills and built.matrix_count and built.shared_bytes <= offline.SHARED_LIMIT[arch]:
                good.append(tile)
        fitting[choice.name] = good
        usual = "×".join(map(str, choice.usual))
        tell(f"{choice.name} (usual {usual}): " + (", ".join("×".join(map(str, t)) for t in good) or "none"))
    return fitting


def tune(minutes: float, out: Path, tell: Tell = print) -> None:
    """Measures tiles in two thirds of the time and routes in the rest; `out` holds the table of all GPUs."""
    from etpo.kernels.triton.tile import target_of

    device = torch.device("cuda", torch.cuda.current_device())
    start = time.monotonic()
    table = measured.read_table(out.read_text(encoding="utf-8")) if out.is_file() else {}
    gpu = torch.cuda.get_device_name(device)

    def save(tiles: dict[str, Tile], routes: dict[str, str]) -> None:
        out.write_text(measured.write_table(table | {gpu: Measured(routes, tiles)}), encoding="utf-8")

    tiles: dict[str, Tile] = {}

    def keep(found: dict[str, Tile]) -> None:
        tiles.update(found)
        save(tiles, {})

    tune_tiles(target_of(device), start + 40 * minutes, tell, keep)
    shape = cases.shape_of(ROUTE_SHAPE)
    routes = tune_routes(shape, ROUTE_TOKENS, device, torch.bfloat16, start + 60 * minutes, tell)
    save(tiles, routes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--out", type=Path, default=measured.FILE)
    parser.add_argument("--compile-only", action="store_true")
    parser.add_argument("--arch", type=int, default=90, choices=offline.ARCHS)
    options = parser.parse_args()
    if options.compile_only:
        compile_candidates(options.arch)
    elif torch.cuda.is_available():
        tune(options.minutes, options.out)
    else:
        parser.error("there is no GPU here; --compile-only needs none")


if __name__ == "__main__":
    main()
