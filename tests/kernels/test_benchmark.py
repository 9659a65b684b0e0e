"""pytest-benchmark entries for the cases of `etpo bench kernels`; `pytest --benchmark-only` runs them.

They time forward + backward on the smallest shape; the command measures the others, beside peers and limits.
"""

import pytest
import torch

from etpo.bench.kernels.cases import FUNCTIONS, SHAPES, cases_of, make_inputs
from etpo.bench.kernels.measure import run_once

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("backend", ["eager", "chunked", "triton"])
@pytest.mark.parametrize("heads", ["frozen", "trained"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_forward_and_backward(benchmark, name, heads, backend):
    function = FUNCTIONS[name]
    if backend == "triton" and DEVICE.type != "cuda":
        pytest.skip("needs a GPU")
    if function.from_logits and heads == "trained":
        pytest.skip("given logits have no head")
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    case = cases_of([name], [SHAPES["nano"]], [256], [heads], DEVICE, dtype)[0]
    inputs = make_inputs(case)
    call = function.eager if backend == "eager" else lambda x: function.run(x, backend)
    values, gradients = benchmark(run_once, case, call, inputs)
    assert all(bool(torch.isfinite(t).all()) for t in [*values, *gradients])
