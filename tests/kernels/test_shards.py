"""Sharded vocabularies on two and three processes, held to the whole vocabulary on one."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from etpo.kernels import Stream, vocab_stats

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("size", [2, 3])
def test_shards_give_what_the_whole_gives(size, tmp_path):
    """Float64 to 1e-12, float32 as close as two orders of summation: statistics, losses, all gradients."""
    worker = [sys.executable, "-W", "ignore", str(Path(__file__).parent / "shard_worker.py")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    logs = [tmp_path / f"rank{rank}" for rank in range(size)]
    ranks = []
    for rank, log in enumerate(logs):
        command = [*worker, str(rank), str(size), str(tmp_path / "store")]
        with log.open("w") as out:
            ranks.append(subprocess.Popen(command, env=environment, cwd=ROOT, stdout=out, stderr=out))
    try:
        # One rank that fails leaves the others waiting for it.
        while all(rank.poll() is None for rank in ranks):
            time.sleep(0.05)
        if all(rank.returncode in (None, 0) for rank in ranks):
            for rank in ranks:
                rank.wait(timeout=120)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    for rank in ranks:
        assert rank.returncode == 0, "\n".join(log.read_text()[-2000:] for log in logs)


def test_a_shard_is_a_shard():
    stream = Stream(torch.zeros(2, 3), torch.zeros(5, 3), shard=(None, 0))
    with pytest.raises(ValueError, match=r"policy.shard: expected a VocabShard, got \(None, 0\)"):
        vocab_stats(stream)
