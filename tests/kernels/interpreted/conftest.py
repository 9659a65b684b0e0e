"""These modules run the Triton kernels in Triton's interpreter, which has to be on before triton is imported.

tests/kernels/test_triton.py runs them in a process of their own; by hand:
TRITON_INTERPRET=1 python -m pytest --confcutdir=tests/kernels/interpreted tests/kernels/interpreted
"""

import os
from typing import Any

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]

if INTERPRETED:
    from triton.runtime.interpreter import InterpretedFunction

    from tests.kernels.interpreted.cases import CUTS, cutting

    triton_call = InterpretedFunction.__call__
    called: set[Any] = set()

    def call_device_function(self: Any, *args: Any, **kwargs: Any) -> Any:
        """As Triton's own, which swaps the language out again in each call: half the time of a small tile.

        For this package's functions the kernel around them has done that, for Triton's the first call.
        """
        if self.fn in called or not self.fn.__module__.startswith("triton."):
            return self.rewrite()(*args, **kwargs)
        called.add(self.fn)
        return triton_call(self, *args, **kwargs)

    InterpretedFunction.__call__ = call_device_function

    @pytest.fixture(autouse=True)
    def seed():
        torch.manual_seed(0)

    @pytest.fixture(params=CUTS)
    def cut(request):
        with cutting(request.param):
            yield request.param
