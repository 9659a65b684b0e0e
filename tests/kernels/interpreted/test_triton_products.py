"""As few products as in `tests/kernels/test_products.py`, on the Triton backend."""

from tests.kernels.test_products import *  # noqa: F403
