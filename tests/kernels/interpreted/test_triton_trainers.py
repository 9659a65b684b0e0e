"""What trainers bring, as in `tests/kernels/test_trainers.py`, on the Triton backend."""

from tests.kernels.test_trainers import *  # noqa: F403
