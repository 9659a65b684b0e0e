"""The Triton backend without a GPU: refused in plain words, and interpreted in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from etpo.kernels import linear_logprob

INTERPRETED = Path(__file__).parent / "interpreted"
ON_A_CPU = os.environ.get("TRITON_INTERPRET") != "1"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not ON_A_CPU, reason="the folder is then collected itself")
def test_the_kernels_in_the_interpreter():
    """Runs tests/kernels/interpreted, which needs TRITON_INTERPRET=1 before triton is imported."""
    pytest.importorskip("triton")
    options = ["--import-mode=importlib", "-p", "no:cacheprovider", "-W", "ignore"]
    command = [sys.executable, "-m", "pytest", *options, f"--confcutdir={INTERPRETED}", str(INTERPRETED)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    root = INTERPRETED.parents[2]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.skipif(not ON_A_CPU, reason="the interpreter takes tensors on a CPU")
def test_a_cpu_is_refused():
    pytest.importorskip("triton")
    hidden, weight = torch.randn(2, 3), torch.randn(5, 3)
    with pytest.raises(ValueError, match="on a CPU only with TRITON_INTERPRET=1"):
        linear_logprob(hidden, weight, torch.tensor([0, 1]), backend="triton")


def test_float64_is_refused():
    hidden, weight = torch.randn(2, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"takes float32, bfloat16 and float16, got torch\.float64"):
        linear_logprob(hidden, weight, torch.tensor([0, 1]), backend="triton")


def test_triton_is_imported_at_first_use():
    code = "import sys, etpo.kernels; print('triton' in sys.modules)"
    plain = "import sys, torch; print('triton' in sys.modules)"
    answers = [
        subprocess.run([sys.executable, "-c", c], capture_output=True, text=True, check=True).stdout
        for c in (plain, code)
    ]
    assert answers[0] == answers[1]
