"""Compiles every Triton kernel offline at its shipped tile sizes, by Triton's own launcher, without a GPU.

python -m etpo.bench.compile        writes docs/results/kernels-compile.{md,json}
"""

import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from etpo.kernels.checks import problem_of
from etpo.kernels.gradients import plan_backward
from etpo.kernels.streams import Problem, Source, VocabStats

if TYPE_CHECKING:
    from etpo.kernels.triton.sizes import Tile
    from etpo.kernels.triton.tile import Launch, Target

ARCHS = (80, 90, 100)
# Bytes of shared memory that a block may take.
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}
PROCESSORS = {80: 108, 90: 132, 100: 148}
MATRIX_INSTRUCTIONS = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}

N, V, D = 8192, 128256, 4096
FIELDS = {name: k for k, name in enumerate(VocabStats._fields)}
LOGPROB = ("lse_p", "e_pp", "at_p")
KL = ("lse_p", "lse_u", "e_pu")
VALUE = ("lse_r", "lse_u")


@dataclass(frozen=True)
class KernelBuild:
    """What one kernel came to on one chip. spill_loads, spill_stores: LDL and STL instructions."""

    kernel: str
    arch: int
    block_n: int | None
    block_v: int | None
    block_d: int | None
    num_warps: int
    num_stages: int
    registers: int
    spill_loads: int
    spill_stores: int
    shared_bytes: int
    matrix_instruction: str
    matrix_count: int


class Case(NamedTuple):
    """A problem of meta tensors and the statistics asked of it; streams that train, by index."""

    name: str
    problem: Problem
    fields: tuple[str, ...]
    trained: tuple[int, ...]


def compile_table(archs: Sequence[int] = ARCHS) -> list[KernelBuild]:
    """Every kernel, compiled for each of `archs`.

    Raises ValueError for a chip that is not in SHARED_LIMIT.
    """
    for arch in archs:
        if arch not in SHARED_LIMIT:
            raise ValueError(f"archs: expected some of {tuple(SHARED_LIMIT)}, got {arch}")
    return [build(name, launch, arch) for arch in archs for name, launch in launches(arch)]


def to_markdown(rows: Sequence[KernelBuild]) -> str:
    """The table as Markdown."""
    columns = ("kernel", "chip", "tile N×V×D", "warps", "stages", "registers", "spills (LDL/STL)",
               "shared KiB (limit)", "matrix instructions")  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in rows:
        sizes = "×".join(str(x) for x in (row.block_n, row.block_v, row.block_d) if x is not None) or "–"
        shared = f"{row.shared_bytes / 1024:.0f} ({SHARED_LIMIT[row.arch] / 1024:.0f})"
        matrix = f"{row.matrix_count} {row.matrix_instruction}" if row.matrix_count else "none"
        lines.append(
            f"| {row.kernel} | sm_{row.arch} | {sizes} | {row.num_warps} | {row.num_stages} | "
            f"{row.registers} | {row.spill_loads}/{row.spill_stores} | {shared} | {matrix} |"
        )
    return "\n".join(lines) + "\n"


class Sizes(NamedTuple):
    """Tokens, vocabulary, hidden size, and where the tensors lie: on the meta device they have no values."""

    n: int
    v: int
    d: int
    device: str

    def tensor(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        if self.device == "meta":
            return torch.empty(shape, dtype=dtype, device="meta")
        if dtype == torch.int64:
            return torch.randint(self.v, shape, device=self.device)
        return torch.randn(shape, device=self.device).mul_(0.05).to(dtype)


LLAMA = Sizes(N, V, D, "meta")


def source(
    on: Sizes,
    d: int | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    rich: bool = False,
    lora: bool = False,
    head: Any = None,
) -> Source:
    """A stream with a bias; lora: with a low-rank change of rank 32; rich: with that and a softcap."""
    d = d or on.d
    weight = on.tensor(on.v, d, dtype=dtype) if head is None else head.weight
    change = None
    if rich or lora:
        change = on.tensor(32, d, dtype=torch.float32), on.tensor(on.v, 32, dtype=torch.float32), 2.0
    return Source(
        on.tensor(on.n, d, dtype=dtype), weight, on.tensor(on.v, dtype=dtype), change, 0.7 if rich else 1.0,
        30.0 if rich else None,
    )  # fmt: skip


def cases(on: Sizes) -> Iterator[Case]:
    """Each way through the sweeps that a public function takes, and the heaviest mixtures."""
    targets = on.tensor(on.n, dtype=torch.int64)
    none = (None, None)

    def case(name: str, p: Any, q: Any, r: Any, mix: Any, fields: tuple[str, ...], trained: Any) -> Case:
        has_targets = any(field.startswith("at") for field in fields)
        sources = {k: source for k, source in enumerate((p, q, r)) if source is not None}
        problem = problem_of(sources, targets if has_targets else None, mix, -100)
        return Case(name, problem, fields, trained)

    def logits() -> Source:
        return Source(on.tensor(on.n, on.v), None)

    p, q, r = source(on), source(on, 896), source(on)
    shared = source(on, head=p)
    yield case("linear_logprob", p, *none, (1.0, 1.0), LOGPROB, (0,))
    yield case("linear_logprob, lora softcap", source(on, rich=True), *none, (1.0, 1.0), LOGPROB, (0,))
    yield case("linear_logprob, D 4095", source(on, on.d - 1), *none, (1.0, 1.0), LOGPROB, (0,))
    yield case("linear_logprob, float32", source(on, dtype=torch.float32), *none, (1.0, 1.0), LOGPROB, (0,))
    yield case("linear_kl", p, None, r, (1.0, 0.0), KL, (0,))
    yield case("linear_kl, one head", p, None, shared, (1.0, 0.0), KL, (0, 2))
    yield case("soft_value", None, q, r, (1.0, 20.0), VALUE, (1,))
    yield case("soft_policy_kl", p, q, r, (1.0, 20.0), KL, (0,))
    yield case("soft_policy_kl, one head", p, q, shared, (1.0, 20.0), KL, (0,))
    yield case("vocab_stats", p, q, r, (1.0, 20.0), VocabStats._fields, (0, 1, 2))
    yield case("vocab_stats, one head", p, source(on, head=p), shared, (1.0, 20.0), VocabStats._fields,
               (0, 1, 2))  # fmt: skip
    yield case("vocab_stats, lora beside its base", source(on, lora=True, head=p), None, shared, (1.0, 0.0),
               (*KL, "e_pp", "at_p"), (0,))  # fmt: skip
    yield case("vocab_stats, lora softcap", source(on, rich=True), source(on, 896, rich=True),
               source(on, rich=True), (1.0, 20.0), VocabStats._fields, (0, 1, 2))  # fmt: skip
    yield case("logprob_from_logits", logits(), *none, (1.0, 1.0), LOGPROB, (0,))
    yield case("soft_policy_kl_from_logits", logits(), logits(), logits(), (1.0, 20.0), KL, (0, 1, 2))


class Sweep(NamedTuple):
    """A sweep of a case, "forward" or "backward", and its launches on a target: the kernel, then a merge."""

    name: str
    launches: Callable[["Target"], list["Launch"]]


def sweeps(on: Sizes) -> Iterator[Sweep]:
    """Both sweeps of every case."""
    from etpo.kernels.triton.backward import Backward, dz_dtype
    from etpo.kernels.triton.forward import forward_launches

    for name, problem, fields, trained in cases(on):
        outs = {FIELDS[field]: on.tensor(on.n, dtype=torch.float64) for field in fields}
        yield Sweep(f"{name}: forward", partial(forward_launches, problem, outs))
        plan = plan_backward(problem, set(outs), set(trained))
        dz = {k: on.tensor(on.n, on.v, dtype=dz_dtype(problem.streams.values())) for k in plan.grads}

        def backward(target: "Target", of: Any = (problem, outs, plan), dz: Any = dz) -> list["Launch"]:
            problem, outs, plan = of
            kernel = Backward(problem, outs, outs, plan, target)
            return [kernel.launch(dz, slice(0, on.n), slice(0, on.v))]

        yield Sweep(f"{name}: backward", backward)


def target_for(arch: int, tiles: dict[str, "Tile"] | None = None) -> "Target":
    """The data-centre chip of compute capability `arch`."""
    from etpo.kernels.triton.tile import Target, chip_of

    return Target(chip_of(arch // 10, SHARED_LIMIT[arch]), PROCESSORS[arch], tiles or {})


def launches(arch: int) -> Iterator[tuple[str, "Launch"]]:
    """(name, launch) of every kernel as a problem of Llama's size on `arch` launches it."""
    from etpo.kernels.triton import gather as triton_gather

    merge = None
    for name, made in sweeps(LLAMA):
        sweep, *merges = made(target_for(arch))
        yield name, sweep
        if merges and merge is None and name.startswith("vocab_stats"):
            merge = merges[0]
            yield "merge", merge
    yield from row_launches()
    critic, tokens = source(LLAMA), LLAMA.tensor(N, dtype=torch.int64)
    g = LLAMA.tensor(N, dtype=torch.float32)
    assert critic.weight is not None
    for name, launch in triton_gather.launches(critic.hidden, critic.weight, tokens, g):
        yield f"gather_q: {name}", launch


def row_launches() -> Iterator[tuple[str, "Launch"]]:
    """The kernel on rows of logits that a library product has made, as each function takes it."""
    from etpo.kernels.chunked.rowwise import KL as KL_ROWS
    from etpo.kernels.chunked.rowwise import LOG_RATIO, LOGPROB, Given, Numbers, Wanted
    from etpo.kernels.triton.rows import derive_launch

    planes = [LLAMA.tensor(N, V, dtype=torch.float32) for _ in range(2)]
    low = [LLAMA.tensor(N, V) for _ in range(2)]
    numbers, weights = LLAMA.tensor(N, dtype=torch.float64), LLAMA.tensor(N, dtype=torch.float32)
    tokens = LLAMA.tensor(N, dtype=torch.int64)
    plain = Given(None, None)
    yield "rows of KL", derive_launch(Wanted(KL_ROWS, False, 1.0), planes, plain, Numbers(numbers, None), low)
    yield (
        "rows of KL, weighted, all trained",
        derive_launch(Wanted(KL_ROWS, True, 1.0), planes, Given(None, weights), Numbers(numbers, None), low),
    )
    yield (
        "rows of V*",
        derive_launch(Wanted(LOG_RATIO, True, 1.0), planes, plain, Numbers(numbers, None), low),
    )
    yield (
        "rows of log-probabilities",
        derive_launch(
            Wanted(LOGPROB, False, 1.0), planes[:1], Given(tokens, None), Numbers(numbers, numbers), low[:1]
        ),
    )


class OfflineDriver:
    """What Triton's launcher asks of a machine before it compiles; there is none."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        # The launcher keeps what it has compiled by device: a chip of its own each.
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)


def build(name: str, launch: "Launch", arch: int) -> KernelBuild:
    """Compiles one launch for `arch` and reads registers, spills and instructions out of the machine code."""
    from triton.runtime import driver

    driver.set_active(OfflineDriver(arch))
    try:
        built = launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.options)
    finally:
        if torch.cuda.is_available():
            driver.reset_active()
    registers, sass = inspect(built.asm["cubin"])
    names = ("LDL", "STL", *MATRIX_INSTRUCTIONS.values())
    counts = {kind: len(re.findall(rf"\b{kind}\b", sass)) for kind in names}
    matrix = next((kind for kind in (MATRIX_INSTRUCTIONS[arch], "HMMA") if counts[kind]), "")
    return KernelBuild(
        kernel=name,
        arch=arch,
        block_n=launch.options.get("BLOCK_N"),
        block_v=launch.options.get("BLOCK_V"),
        block_d=launch.options.get("BLOCK_D"),
        num_warps=built.metadata.num_warps,
        num_stages=built.metadata.num_stages,
        registers=registers,
        spill_loads=counts["LDL"],
        spill_stores=counts["STL"],
        shared_bytes=built.metadata.shared,
        matrix_instruction=matrix,
        matrix_count=counts.get(matrix, 0),
    )


def inspect(cubin: bytes) -> tuple[int, str]:
    """(registers a thread, SASS) of machine code, by the tools in Triton's package."""
    tools = nvidia_tools()
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        outputs = [
            subprocess.run(
                [tools / tool, *flags, file.name], capture_output=True, text=True, check=True
            ).stdout
            for tool, *flags in (("cuobjdump", "-res-usage"), ("cuobjdump", "-sass"))
        ]
    found = re.search(r"REG:(\d+)", outputs[0])
    assert found is not None
    return int(found[1]), outputs[1]


def nvidia_tools() -> Path:
    """The folder of ptxas, cuobjdump and nvdisasm."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def main() -> None:
    import triton

    rows = compile_table()
    folder = Path("docs/results")
    folder.mkdir(parents=True, exist_ok=True)
    versions = f"torch {torch.__version__.split('+')[0]}, triton {triton.__version__}"
    head = (
        "# Triton kernels compiled offline\n\n"
        f"`python -m etpo.bench.compile`, {versions}, no GPU: what the compiler made of every kernel at its "
        f"shipped tile sizes, N {N}, V {V}, D {D} (critic 896), bf16 unless said. Nothing here is a time.\n\n"
    )
    (folder / "kernels-compile.md").write_text(head + to_markdown(rows), encoding="utf-8")
    record = {"versions": versions, "rows": [asdict(row) for row in rows]}
    (folder / "kernels-compile.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
