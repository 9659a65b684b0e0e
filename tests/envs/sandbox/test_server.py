"""The server and the trainer may die, be interrupted, be closed: nothing keeps running, and work goes on."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from etpo.bench.sandbox.mix import split_processes
from etpo.envs.sandbox import Sandbox, SandboxError, SplitArrays, client
from etpo.envs.sandbox.box import wire
from tests.envs.programs import FIT, SLEEP, is_gone, wait_until


@pytest.fixture(scope="module")
def arrays(small):
    return SplitArrays(small.x[:30], small.y[:30], small.x[30:])


@pytest.fixture
def slow(arrays):
    """A sandbox that is running a program which never ends."""
    with Sandbox(workers=1, timeout_s=600.0) as box:
        box.submit(SLEEP, arrays, 0)
        assert wait_until(lambda: busy(box))
        yield box


def server_of(box: Sandbox) -> int | None:
    process = box._process
    return None if process is None else process.pid


def busy(box: Sandbox) -> bool:
    process = box._process
    return process is not None and bool(split_processes(process.pid))


def test_killing_the_server_costs_a_second_chance_and_no_more(slow, arrays):
    killed = []

    def kill_twice():
        for _ in range(2):
            assert wait_until(lambda: server_of(slow) not in (None, *killed) and busy(slow))
            killed.append(server_of(slow))
            os.kill(killed[-1], signal.SIGKILL)

    killer = threading.Thread(target=kill_twice)
    later = [slow.submit(FIT, arrays, 0) for _ in range(2)]
    killer.start()
    results = dict(slow.wait() for _ in range(3))
    killer.join()
    assert len(set(killed)) == 2
    assert results.pop(0).outcome == "crashed"
    assert results[later[-1]].outcome == "ok"
    assert wait_until(lambda: is_gone(killed[0]) and is_gone(killed[1]))


def test_a_killed_trainer_leaves_nothing_running(tmp_path):
    script = f"""
    import numpy as np
    from etpo.envs.sandbox import Sandbox, SplitArrays
    box = Sandbox(workers=1, timeout_s=600)
    box.submit({SLEEP!r}, SplitArrays(np.ones((2, 1)), np.arange(2), np.ones((2, 1))), 0)
    print(box._process.pid, box._folder, flush=True)
    box.wait()
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path) as trainer:
        try:
            pid, folder = trainer.stdout.readline().split()
            server = int(pid)
            assert wait_until(lambda: split_processes(server))
            child = split_processes(server)[0]
        finally:
            trainer.kill()
    assert wait_until(lambda: is_gone(server) and is_gone(child) and not os.path.exists(folder))


def test_cancel_and_close_leave_nothing_running(slow, arrays):
    for stop in (slow.cancel, slow.close):
        if not busy(slow):
            assert slow.run([(FIT, arrays, 0)])[0].outcome == "ok"
            slow.submit(SLEEP, arrays, 0)
            assert wait_until(lambda: busy(slow))
        server, folder = slow._process.pid, slow._folder
        child = split_processes(server)[0]
        stop()
        assert is_gone(server)
        assert is_gone(child)
        assert not os.path.exists(folder)
    with pytest.raises(ValueError, match="closed"):
        slow.submit(FIT, arrays, 0)


def test_the_folder_goes_even_where_the_server_cannot_remove_it(slow, arrays):
    folder = slow._folder
    deep = os.open(folder, os.O_RDONLY)
    for _ in range(1100):
        os.mkdir("deep", dir_fd=deep)
        inner = os.open("deep", os.O_RDONLY, dir_fd=deep)
        os.close(deep)
        deep = inner
    os.close(deep)
    os.kill(slow._process.pid, signal.SIGKILL)
    slow.close()
    assert not os.path.exists(folder)


def test_a_server_that_cannot_start_is_one_error(monkeypatch, tmp_path, arrays):
    broken = tmp_path / "server.py"
    broken.write_text("raise OSError('no such luck')")
    monkeypatch.setattr(client, "SERVER_FILE", broken)
    with Sandbox(workers=1) as box, pytest.raises(SandboxError, match=r"exit code 1.*no such luck"):
        box.run([(FIT, arrays, 0)])


def test_a_program_finds_nothing_of_others_in_what_it_has_from_the_server(arrays):
    source = """
import sys
def build_model(x_train, y_train):
    server = sys.modules["__main__"].server
    raise ValueError(f"{len(server.running)} {len(server.free_slots)} {server.control.fileno()}")
"""
    with Sandbox(workers=2) as box:
        said = {result.failure.message for result in box.run([(source, arrays, 0)] * 4)}
    assert said == {"0 0 -1"}


def test_the_mounts_of_rooms_that_have_ended_go(arrays):
    with Sandbox(workers=2) as box:
        if wire.MOUNT_NAMESPACE in box.layers().missing:
            pytest.skip("this machine permits no mount namespace")
        (porter,) = children(box._process.pid)
        (sexton,) = (
            pid for pid in children(porter) if Path(f"/proc/{pid}/comm").read_text() == "etpo-sexton\n"
        )
        held = Path(f"/proc/{sexton}/fd")
        box.run([(FIT, arrays, 0)] * 2)
        assert wait_until(lambda: len(list(held.iterdir())) <= 10)
        before = len(list(held.iterdir()))
        box.run([(FIT, arrays, 0)] * 8)
        assert wait_until(lambda: len(list(held.iterdir())) <= before)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_many_workers_and_more_jobs_than_both_sockets_hold_come_to_an_end(arrays):
    with Sandbox(workers=256) as box:
        results = box.run([("1 / 0", arrays, 0)] * 560)
    assert {result.failure.kind for result in results} == {"ZeroDivisionError"}


def test_of_many_cores_no_more_are_used_than_there_are_users(monkeypatch, arrays):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(384)))
    with Sandbox() as box:
        assert box.workers == 256
        assert box.run([(FIT, arrays, 0)])[0].outcome == "ok"
