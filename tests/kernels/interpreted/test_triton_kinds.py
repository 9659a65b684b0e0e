"""The kinds of input of `tests/kernels/test_kinds.py`, on the Triton backend."""

from tests.kernels.test_kinds import *  # noqa: F403
