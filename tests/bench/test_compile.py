"""The Triton kernels, compiled offline for Hopper: registers, shared memory and instructions."""

import json

import pytest

from etpo.bench.compile import SHARED_LIMIT, KernelBuild, OfflineDriver, compile_table, launches, to_markdown

pytest.importorskip("triton")

# What lives in registers beside a product: reading rows, merging splits.
NO_PRODUCT = ("merge", "gather_q", "from_logits", "float32", "rows of")


@pytest.fixture(scope="module")
def table():
    return compile_table([90])


@pytest.mark.timeout(900)
def test_no_kernel_spills_registers(table):
    assert len(table) > 30
    assert [row.kernel for row in table if row.spill_loads or row.spill_stores] == []


@pytest.mark.timeout(900)
def test_products_run_on_the_matrix_units(table):
    """Hopper's own instruction wherever tensor descriptors can read the matrices, and nearly everywhere."""
    for row in table:
        if any(word in row.kernel for word in NO_PRODUCT):
            assert row.matrix_count == 0, row
        else:
            assert row.matrix_count >= 4, row
            assert row.matrix_instruction == "HGMMA", row


@pytest.mark.timeout(900)
def test_shared_memory_is_within_the_limit(table):
    assert all(0 <= row.shared_bytes <= SHARED_LIMIT[90] for row in table)
    assert max(row.shared_bytes for row in table) > 100_000


def test_an_unknown_chip_is_refused():
    with pytest.raises(ValueError, match=r"archs: expected some of \(80, 90, 100\), got 70"):
        compile_table([90, 70])


def test_rows_as_markdown_and_json():
    row = KernelBuild("a kernel", 90, 128, 64, 32, 8, 3, 200, 1, 2, 2048, "HGMMA", 4)
    line = "| a kernel | sm_90 | 128×64×32 | 8 | 3 | 200 | 1/2 | 2 (227) | 4 HGMMA |"
    assert to_markdown([row]).splitlines()[2] == line
    assert json.loads(json.dumps([row], default=vars))[0]["registers"] == 200


@pytest.mark.timeout(900)
def test_a_kernel_compiles_for_rocm_too():
    """What NVIDIA's compiler alone knows is not asked of AMD's."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class Rocm(OfflineDriver):
        def get_current_target(self):
            return GPUTarget("hip", "gfx942", 64)

    _, launch = next(launches(80))
    driver.set_active(OfflineDriver(80))
    assert launch.options["maxnreg"] == 255
    driver.set_active(Rocm(942))
    assert "maxnreg" not in launch.options
    assert launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.options) is not None
