"""`pytest tests/kernels --device cuda` makes the tensors of these tests on a GPU, and takes triton too."""

from collections.abc import Iterator

import pytest
import torch

# What watches the allocator or the products of a CPU, starts processes, or is about machines without a GPU.
OF_A_CPU = ("test_memory.py", "test_shards.py", "test_triton.py", "test_products.py", "test_benchmark.py")


@pytest.fixture(autouse=True)
def device(request: pytest.FixtureRequest) -> Iterator[None]:
    """The default device of new tensors."""
    name = request.config.getoption("--device")
    if name == "cpu":
        yield
        return
    if not torch.cuda.is_available():
        pytest.skip(f"--device {name}: torch sees no GPU here")
    if request.path.name in OF_A_CPU or request.path.parent.name == "interpreted":
        pytest.skip("is about a CPU")
    with torch.device(name):
        yield
