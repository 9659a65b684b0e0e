"""Breaks each kernel in a copy of the package, a line at a time, and records which test notices.

python tests/kernels/mutate.py          all of them, and writes docs/results/kernels-mutations.md
python tests/kernels/mutate.py WORD     those whose kernel holds WORD, and writes nothing

Run it on a tree whose kernel tests pass. Each mutation is a process forked from one that has imported torch,
triton and pytest, and runs the tests of its kernel up to the first that fails. Not part of a test run.
"""

import json
import os
import shutil
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "docs" / "results" / "kernels-mutations.md"

HEAD = """# Broken kernels and the tests that notice

`python tests/kernels/mutate.py`: one line broken at a time in a copy of the package, and the first test of
its kernel that fails.

| kernel | broken | first test that fails |
|---|---|---|
"""

# Tests by kernel, the quickest first.
CPU_TESTS = ["test_public_faults.py", "test_contract.py", "test_chunked.py"]
PARTS = ("faults", "contract", "statistics", "modes")
TRITON_TESTS = [f"interpreted/test_triton_{part}.py" for part in PARTS]
TESTS = {
    "reference": ["test_reference.py", "test_contract.py"],
    "chunked": CPU_TESTS,
    "rowwise": [*CPU_TESTS, "test_trainers.py"],
    "triton rows": ["interpreted/test_triton_rows.py", *TRITON_TESTS],
    "triton forward": TRITON_TESTS,
    "triton backward": TRITON_TESTS,
    "triton from_logits": TRITON_TESTS,
    "chunked from_logits": CPU_TESTS,
}


class Mutation(NamedTuple):
    """`old`, which stands once in kernels/`file`, becomes `new`."""

    kernel: str
    what: str
    file: str
    old: str
    new: str


MUTATIONS = [
    Mutation("reference", "log-sum-exp without the maximum taken off", "reference.py",
             "return torch.logsumexp(z, dim=-1)", "return z.exp().sum(-1).log()"),
    Mutation("reference", "E_p[z_q] without its gradient", "reference.py",
             'z if field == "e_q" else', 'z.detach() if field == "e_q" else'),
    Mutation("reference", "low-rank term without its scale", "reference.py",
             "z = z + scale * (", "z = z + ("),
    Mutation("reference", "an ignored row keeps its logits", "reference.py",
             "value.masked_fill(ignored, 0.0)", "value"),
    Mutation("chunked", "tail of the vocabulary not swept", "chunked/heads.py",
             "for v in range(0, self.n_vocab, self.block))",
             "for v in range(0, max(1, self.n_vocab - self.block + 1), self.block))"),
    Mutation("chunked", "running maximum starts at 0", "chunked/rowwise.py",
             "top = z.amax(1)\n", "top = z.amax(1).clamp(min=0.0)\n"),
    Mutation("chunked", "blocks merged without moving the level of the first", "chunked/statistics.py",
             "means[E_PP - E_PR] += part[LSE_P] - lse_p", "means[E_PP - E_PR] += new[LSE_P] - lse_p"),
    Mutation("chunked", "cotangent of lse_p dropped", "chunked/derivatives.py",
             "constant = cot.g[LSE_P] * scale", "constant = cot.g[LSE_P] * 0"),
    Mutation("chunked", "gradient of the low-rank term without its scale", "gradients.py",
             "            d_low.mul_(scale)\n", ""),
    Mutation("rowwise", "maximum of a row starts at 0", "chunked/rowwise.py",
             "lse_p, lse_u = softmax_into(prob, p), softmax_into(prob_u, u)",
             "lse_p, lse_u = softmax_into(prob, p), softmax_into(prob_u, u).clamp(min=0.0)"),
    Mutation("rowwise", "cotangents collapsed to the first token's", "chunked/rowwise.py",
             "column = g[:, None].to(problem.dtype)", "column = g[:1, None].to(problem.dtype)"),
    Mutation("rowwise", "derivative without its mean", "chunked/rowwise.py",
             "p.sub_(mean[:, None]).mul_(prob)", "p.mul_(prob)"),
    Mutation("rowwise", "derivative by u without its share", "chunked/heads.py",
             "alpha = share / self.source.temperature", "alpha = 1.0 / self.source.temperature"),
    Mutation("rowwise", "a weighted number that is infinite keeps its derivative", "chunked/rowwise.py",
             "if not bool(live.all()):", "if False:"),
    Mutation("triton rows", "derivative without its mean", "triton/rows.py",
             " - mean[:, None]\n", "\n"),
    Mutation("triton rows", "what r does through u left out", "triton/rows.py",
             "dz = share * prob_u - prob", "dz = -prob"),
    Mutation("triton rows", "log-sum-exp rounded to float32", "triton/rows.py",
             "return tl.exp((z - high[:, None]) - low[:, None])", "return tl.exp(z - high[:, None])"),
    Mutation("triton rows", "a weight that is not multiplied", "triton/rows.py",
             "0.0, dz * weight)", "0.0, dz)"),
    Mutation("chunked from_logits", "temperature left out", "chunked/heads.py",
             "return torch.mul(inputs.hidden, 1.0 / source.temperature, out=out)",
             "return torch.mul(inputs.hidden, 1.0, out=out)"),
    Mutation("chunked from_logits", "a gradient in place is added to the logits", "gradients.py",
             "tile[rows].copy_(dz) if", "tile[rows].add_(dz) if"),
    Mutation("triton forward", "tail of the vocabulary counts as logits of 0", "triton/tile.py",
             'z, float("-inf"))', "z, 0.0)"),
    Mutation("triton forward", "running maximum starts at 0", "triton/forward.py",
             "zero = tl.zeros([BLOCK_N], tl.float32)\n    m_p = zero + MINUS_INF",
             "zero = tl.zeros([BLOCK_N], tl.float32)\n    m_p = zero"),
    Mutation("triton forward", "a split merged without its weight", "triton/forward.py",
             "old, new = scale(m_p, new_p), scale(mk_p, new_p)",
             "old, new = scale(m_p, new_p), scale(mk_p, mk_p)"),
    Mutation("triton forward", "contrast with the reference keeps its block's level", "triton/forward.py",
             "s_pr = rescale_sum(s_pr, l_p, shift - other, alpha)",
             "s_pr = rescale_sum(s_pr, l_p, shift, alpha)"),
    Mutation("triton forward", "low-rank term left out", "triton/tile.py",
             "for k in range(0, n_rank, BLOCK_RANK):", "for k in range(0, 0, BLOCK_RANK):"),
    Mutation("triton backward", "stores beyond the end of the vocabulary", "triton/backward.py",
             "mask = inside[:, None] & (columns < shape.n_vocab)[None, :]",
             "mask = inside[:, None] & (columns < shape.n_vocab + 1)[None, :]"),
    Mutation("triton backward", "cotangent of E_p[z_p − z_r] left out of the constant", "triton/backward.py",
             "(number(g.lse_p, rows, inside) + g_pr + g_pu)", "(number(g.lse_p, rows, inside) + g_pu)"),
    Mutation("triton backward", "cotangent of E_p[z_p − u] without z_q's coefficient", "triton/backward.py",
             "under_p -= shape.mix_q * g_pu", "under_p -= g_pu"),
    Mutation("triton backward", "gradient of the low-rank term without its scale", "gradients.py",
             "            d_low.mul_(scale)\n", ""),
    Mutation("triton backward", "a piece overwrites the sum of those before", "gradients.py",
             "total[where]), fresh", "total[where]), True"),
    Mutation("triton backward", "log-sum-exp rounded to float32", "triton/backward.py",
             "return (z - high[:, None]) - low[:, None]", "return z - high[:, None]"),
    Mutation("triton backward", "ignored rows keep their derivative", "triton/backward.py",
             "live &= tokens != ignore_index", "live &= tokens != ignore_index - 1"),
    Mutation("triton from_logits", "temperature left out", "triton/tile.py",
             "return without_tail(z * part.slope, shape", "return without_tail(z, shape"),
    Mutation("triton from_logits", "rows addressed in int32", "triton/tile.py",
             "rows = tl.minimum(row + tl.arange(0, ROWS), n_rows - 1).to(tl.int64)",
             "rows = tl.minimum(row + tl.arange(0, ROWS), n_rows - 1)"),
    Mutation("triton from_logits", "autograd not told of a gradient in place", "triton/backward.py",
             "        torch.autograd.graph.increment_version(logits)\n", "        pass\n"),
    Mutation("triton from_logits", "one gradient for logits that two streams share", "gradients.py",
             "gradients.append(sum(found[1:], found[0]))", "gradients.append(found[0])"),
]  # fmt: skip


def break_copy(mutation: Mutation, folder: Path) -> None:
    """A copy of the package and of the kernel tests in `folder`, with the mutation made."""
    (folder / "etpo").mkdir()
    shutil.copy(ROOT / "etpo" / "__init__.py", folder / "etpo")
    shutil.copytree(ROOT / "kernels", folder / "etpo" / "kernels")
    shutil.copytree(ROOT / "tests" / "kernels", folder / "tests" / "kernels")
    file = folder / "etpo" / "kernels" / mutation.file
    text = file.read_text(encoding="utf-8")
    if text.count(mutation.old) != 1:
        raise ValueError(f"{mutation.file}: expected once {mutation.old!r}, got {text.count(mutation.old)}")
    file.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")


class FirstFailure:
    """A pytest plugin: the id of the first test that fails."""

    def __init__(self) -> None:
        self.name = ""

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed and not self.name:
            self.name = report.nodeid.split("::", 1)[-1]


def first_failure(mutation: Mutation, folder: Path) -> str:
    """The name of the test that notices the mutation, "" for none; run in a process of its own."""
    result = folder / "result.json"
    child = os.fork()
    if child == 0:
        import pytest

        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        plugin = FirstFailure()
        tests = [f"tests/kernels/{name}" for name in TESTS[mutation.kernel]]
        options = ["-x", "--import-mode=importlib", "-p", "no:cacheprovider", "--rootdir=.", "-c", os.devnull]
        code = pytest.main([*options, "--benchmark-skip", *tests], plugins=[plugin])
        result.write_text(json.dumps([int(code), plugin.name]), encoding="utf-8")
        os._exit(0)
    os.waitpid(child, 0)
    if not result.exists():
        return "the process died"
    code, name = json.loads(result.read_text(encoding="utf-8"))
    if code not in (0, 1):
        raise RuntimeError(f"{mutation.kernel}, {mutation.what}: pytest ended with {code}")
    return name


def main() -> None:
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    os.environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    for module in ("hypothesis", "pytest", "torch", "triton.runtime.interpreter"):
        import_module(module)
    rows = []
    for mutation in MUTATIONS:
        if word not in mutation.kernel:
            continue
        with tempfile.TemporaryDirectory() as folder:
            break_copy(mutation, Path(folder))
            caught = first_failure(mutation, Path(folder))
        rows.append(f"| {mutation.kernel} | {mutation.what} | {f'`{caught}`' if caught else '**none**'} |")
        print(rows[-1], flush=True)
    if not word:
        TABLE.write_text(HEAD + "\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
