"""What was measured on a GPU: tiles of the sweeps, and which way a function of one number a token takes.

`measured.json` ships, by the name of the GPU; `python -m etpo.bench.tune` writes it. A GPU that does not
stand there, and a kernel that does not stand under it, keep the rules of `sizes` and of `backends`.
"""

import json
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

from etpo.kernels.triton.sizes import Tile

FILE = Path(__file__).with_name("measured.json")
# Ways to one number a token: logits by library products and one kernel on their rows, or a kernel on their
# rows in PyTorch, each with the derivative made in the forward sweep; or the sweep that keeps logits in
# registers and makes them again in backward.
PRODUCTS, CHUNKED, REGISTERS = ROUTES = ("products", "chunked", "registers")


class Measured(NamedTuple):
    """Of one GPU: the best route by `route_key`, and the best tile by `tile.kernel_name`."""

    routes: dict[str, str]
    tiles: dict[str, Tile]


NOTHING = Measured({}, {})


def route_key(kind: str, *, trained: bool) -> str:
    """The key of a number ("kl", "log_ratio", "logprob") whose heads ask for a gradient, or not."""
    return f"{kind}, {'trained' if trained else 'frozen'}"


def read_table(text: str) -> dict[str, Measured]:
    """The table of a JSON text, by the name of a GPU. Raises ValueError for what is no such table."""
    table = {}
    for gpu, entry in json.loads(text).items():
        wrong = {route for route in entry["routes"].values() if route not in ROUTES}
        if wrong:
            raise ValueError(f"routes of {gpu}: expected some of {ROUTES}, got {sorted(wrong)}")
        tiles = {name: Tile(*(int(size) for size in sizes)) for name, sizes in entry["tiles"].items()}
        table[gpu] = Measured(dict(entry["routes"]), tiles)
    return table


def write_table(table: dict[str, Measured]) -> str:
    """The inverse of `read_table`."""
    entries = {gpu: {"routes": m.routes, "tiles": m.tiles} for gpu, m in sorted(table.items())}
    return json.dumps(entries, indent=1, sort_keys=True) + "\n"


@lru_cache
def shipped() -> dict[str, Measured]:
    """The table that ships."""
    return read_table(FILE.read_text(encoding="utf-8"))


@lru_cache
def measured_on(device: torch.device) -> Measured:
    """What ships of the GPU `device`."""
    if device.type != "cuda":
        return NOTHING
    return shipped().get(torch.cuda.get_device_name(device), NOTHING)
