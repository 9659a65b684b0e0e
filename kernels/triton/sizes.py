"""Tile sizes of the Triton kernels. No GPU has been measured yet: registers and shared memory chose these.

bench/compile.py compiles each of them for sm_80, sm_90 and sm_100, and a test holds that none spills.
"""

from typing import NamedTuple


class Tile(NamedTuple):
    """block_n tokens by block_v vocabulary entries, block_d of the hidden size at a time."""

    block_n: int
    block_v: int
    block_d: int
    num_warps: int
    num_stages: int


# By the number of float32 tiles [block_n, block_v] that live at once, one more where a head has a low-rank
# term or a softcap. Hopper and Blackwell read by tensor descriptors, which need no registers for addresses;
# tiles read by pointers fit the 99 KiB of shared memory of small chips.
TILES = {
    "pointers": {
        1: Tile(128, 128, 32, 8, 4),
        2: Tile(128, 64, 64, 8, 3),
        3: Tile(64, 64, 64, 8, 3),
        4: Tile(64, 32, 64, 8, 3),
    },
    "hopper": {
        1: Tile(128, 256, 64, 8, 3),
        2: Tile(128, 128, 64, 8, 4),
        3: Tile(128, 64, 64, 8, 3),
        4: Tile(64, 64, 64, 8, 3),
    },
    "blackwell": {
        1: Tile(128, 128, 64, 8, 4),
        2: Tile(128, 64, 64, 8, 4),
        3: Tile(128, 64, 64, 8, 3),
        4: Tile(64, 64, 64, 8, 3),
    },
}
# Kernels that have a tile of their own, by `tile.kernel_name`: found by compiling, without a spill.
BY_KERNEL: dict[str, dict[str, Tile]] = {
    "pointers": {},
    "hopper": {
        "backward p u, of r, p = r": Tile(128, 128, 64, 8, 3),
        "forward p u, of q r, p = r": Tile(128, 128, 64, 8, 3),
        "backward p u, of q r, p = r": Tile(128, 128, 64, 8, 3),
    },
    "blackwell": {
        "forward p u, of r, p = r": Tile(128, 128, 64, 8, 4),
        "backward p u, of r, p = r": Tile(128, 128, 64, 8, 4),
        "backward p u, of q r, p = r": Tile(128, 128, 64, 8, 4),
    },
}
# Float32 matrices take the plain multiply-add units: smaller tiles, which hold their operands in registers.
FLOAT32 = Tile(64, 64, 16, 8, 2)
# Given logits: whole rows are read once, in order.
LOGITS = Tile(1, 2048, 1, 8, 1)
# Logits of a library product: a row is read twice, and the second time lies in a cache.
ROW = Tile(1, 4096, 1, 8, 1)
# Below it, bf16 has no matrix units.
CAPABILITY = (8, 0)

# In the interpreter a tile costs some hundred microseconds whatever its size.
INTERPRETED = Tile(16, 32, 16, 1, 1)
# The row of TILES that the interpreter goes by: pointers, or tensor descriptors.
CHIP_INTERPRETED = "pointers"

# Products and sums may fuse: newer Triton warns where nobody says so. Sweeps may take every register: left to
# itself, ptxas rather spills a few at 128.
COMPILER = {"enable_fp_fusion": True}
# What NVIDIA's compiler alone knows.
NVIDIA_SWEEP = {"maxnreg": 255}

# Neighbouring programs share this many token blocks, so that their hidden states stay in the L2 cache.
GROUP_N = 16
# Programs of a forward sweep for each multiprocessor at least, and the share of their time that
# multiprocessors may wait for the last wave where some number of splits allows it.
WAVES = 1
MOST_IDLE = 0.03
# Bytes of the derivative by the logits that a backward holds at a time, and the most tokens of one piece.
DZ_BYTES = 1 << 29
DZ_ROWS = 8192
# Tokens of a program that merges or gathers, and hidden entries of one step.
MERGE_ROWS = 128
GATHER_COLUMNS = 512
