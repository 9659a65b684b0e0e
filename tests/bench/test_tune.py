"""The table of tiles and routes: written, read, followed; and who is quickest."""

import pytest
import torch

pytest.importorskip("triton")

from etpo.bench import compile as offline
from etpo.bench import tune
from etpo.kernels import backends, linear_kl
from etpo.kernels.chunked import rowwise
from etpo.kernels.triton import measured, sizes
from etpo.kernels.triton.forward import steps_of
from etpo.kernels.triton.measured import Measured
from etpo.kernels.triton.sizes import Tile

ONE, OTHER = Tile(128, 128, 64, 8, 4), Tile(128, 64, 64, 8, 3)


def test_a_table_reads_as_it_was_written():
    table = {"a GPU": Measured({"kl, frozen": "products"}, {"forward p": ONE})}
    assert measured.read_table(measured.write_table(table)) == table
    with pytest.raises(ValueError, match=r"routes of a GPU: expected some of .*, got \['magic'\]"):
        measured.read_table('{"a GPU": {"routes": {"kl, frozen": "magic"}, "tiles": {}}}')


def test_the_table_that_ships_can_be_read():
    assert isinstance(measured.shipped(), dict)
    assert measured.measured_on(torch.device("cpu")) == measured.NOTHING


def test_the_quickest_tile_must_be_quicker_by_more_than_noise():
    assert tune.quickest({ONE: 1.0, OTHER: 0.995}, ONE) is None
    assert tune.quickest({ONE: 1.0, OTHER: 0.9}, ONE) == OTHER
    assert tune.quickest({OTHER: 0.9}, ONE) == OTHER
    assert tune.quickest({}, ONE) is None


def test_kernels_have_names_of_their_own_and_take_their_tile_from_the_table():
    target = offline.target_for(90)
    found = {choice.name: choice for choice in tune.choices(offline.LLAMA, target)}
    assert len(found) > 15
    assert {"forward p", "backward p u, of q r, p = r", "forward p q r u, p = q = r"} <= set(found)
    choice = found["forward p u, of q r"]
    other = choice.launches(target._replace(tiles={choice.name: OTHER, "forward p": ONE}))[0]
    assert tune.tile_of(other) == OTHER
    assert choice.usual == tune.tile_of(choice.launches(target)[0]) != OTHER


@pytest.mark.parametrize("n_rows", [128, 1000, 8192, 16384])
@pytest.mark.parametrize("n_processors", [108, 132, 148])
def test_few_processors_wait_for_the_last_wave(n_rows, n_processors):
    n_blocks, n_columns = -(-n_rows // 128), -(-128256 // 128)
    steps = steps_of(n_blocks, n_columns, n_processors)
    n_programs = n_blocks * -(-n_columns // steps)
    waves = -(-n_programs // n_processors)
    tiles = n_blocks * n_columns
    # However the tiles are dealt out, the last of them do not fill all processors.
    unavoidable = 1 - tiles / (n_processors * -(-tiles // n_processors))
    assert 1 - tiles / (n_processors * waves * steps) <= max(sizes.MOST_IDLE, unavoidable) + 1e-12


def test_auto_takes_the_route_of_the_table(monkeypatch):
    taken = []
    monkeypatch.setattr(rowwise, "number", lambda problem, kind, arithmetic: taken.append(arithmetic))
    monkeypatch.setattr(backends, "CHUNKED", backends.CHUNKED._replace(number=backends.AUTO_ON_CUDA.number))
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(7, 4)
    for route in (None, *measured.ROUTES):
        table = Measured({} if route is None else {"kl, frozen": route, "kl, trained": "chunked"}, {})
        monkeypatch.setattr(measured, "measured_on", lambda device, table=table: table)
        linear_kl(hidden, weight, hidden.detach(), weight)
    # None is the rule where nothing was measured; in registers no number is asked for.
    assert taken == [rowwise.TRITON, rowwise.TRITON, rowwise.PYTORCH]
    with backends.routed("registers"):
        linear_kl(hidden, weight, hidden.detach(), weight)
    assert len(taken) == 3
