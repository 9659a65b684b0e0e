"""`etpo bench kernels`: what it counts, what it says of contestants that do not run, and its files."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from etpo.bench.kernels import measure as bench
from etpo.bench.kernels.cases import CRITIC, FUNCTIONS, POLICY, Shape, cases_of, make_inputs, shape_of
from etpo.bench.kernels.goals import Goal, goal_lines, goals_of
from etpo.bench.kernels.limits import Products, needed_bytes, needed_flops
from etpo.bench.kernels.memory import peak_bytes
from etpo.bench.kernels.output import to_text
from etpo.bench.kernels.peers import CONTESTANTS, EAGER, Contestant, contestants_of
from etpo.bench.kernels.precision import inputs_at, precision_table
from etpo.cli.main import main

CPU = torch.device("cpu")
TINY = Shape("tiny", 40, 8)
OF_PRODUCTS = "time as a multiple of the fewest products'"


def tiny_case(function: str, *, trained: bool = False, n_tokens: int = 6, dtype: torch.dtype = torch.float32):
    heads = ["trained" if trained else "frozen"]
    return cases_of([function], [TINY], [n_tokens], heads, CPU, dtype)[0]


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("trained", [False, True])
def test_every_function_is_measured_and_agrees_with_its_plain_twin(name, trained):
    case = tiny_case(name, trained=trained, dtype=torch.float64)
    rows = bench.measure_case(case, contestants_of(["etpo chunked", "etpo reference"]), rounds=2)
    names = [EAGER.name, "etpo chunked", "etpo reference"]
    assert [row.contestant for row in rows] == names + ([] if case.function.from_logits else [bench.PRODUCTS])
    for row in rows[:3]:
        assert row.why_not is None
        assert row.error_value < 1e-12
        assert row.error_gradient < 1e-12
        assert row.forward_s.least <= row.forward_s.median <= row.forward_s.most
        assert row.peak_bytes >= row.gradient_bytes > 0
        assert row.same_twice is True
    assert rows[0].ratio_to_eager == 1.0
    learner = 8 * 6 * (TINY.n_vocab if case.function.from_logits else TINY.d_model)
    head = 8 * TINY.n_vocab * TINY.d_model if trained and not case.function.from_logits else 0
    assert rows[1].gradient_bytes == learner + head


def test_a_wrong_result_shows_in_the_errors():
    def wrong(function):
        return lambda x: [1.01 * out for out in function.eager(x)]

    contestant = Contestant("wrong", frozenset(FUNCTIONS), lambda case: None, wrong)
    row = bench.measure_case(tiny_case("linear_kl"), [EAGER, contestant], rounds=1)[1]
    assert row.error_value == pytest.approx(0.01, rel=1e-3)
    assert row.error_gradient == pytest.approx(0.01, rel=1e-3)


def test_who_does_not_run_has_a_row_that_says_why():
    def broken(function):
        raise RuntimeError("two\nlines")

    absent = Contestant("absent", frozenset(FUNCTIONS), lambda case: "absent is not installed", broken)
    fails = Contestant("fails", frozenset(FUNCTIONS), lambda case: None, broken)
    rows = bench.measure_case(tiny_case("linear_kl"), [EAGER, absent, fails, CONTESTANTS["etpo triton"]], 1)
    reasons = {row.contestant: row.why_not for row in rows}
    assert reasons["absent"] == "absent is not installed"
    assert reasons["fails"] == "RuntimeError: two lines"
    assert reasons["etpo triton"] == "needs a GPU, got device cpu"
    assert reasons[EAGER.name] is None


def test_rows_are_saved_after_each_case_and_a_case_that_fails_is_rows(monkeypatch):
    def cannot(case, inputs):
        raise MemoryError("no room")

    cases = [tiny_case("kl_from_logits"), tiny_case("linear_kl")]
    monkeypatch.setattr(bench, "Products", cannot)
    saved = []
    rows = bench.measure(cases, [EAGER], 1, lambda line: None, lambda rows: saved.append(list(rows)))
    assert [len(some) for some in saved] == [1, 2]
    assert saved[0][0].why_not is None
    assert rows[1].why_not == "MemoryError: no room"


def test_a_result_that_changes_from_run_to_run_shows():
    def noisy(function):
        return lambda x: [out * (1 + 0.01 * torch.rand(())) for out in function.eager(x)]

    contestant = Contestant("noisy", frozenset(FUNCTIONS), lambda case: None, noisy)
    rows = bench.measure_case(tiny_case("linear_kl"), [EAGER, contestant], rounds=1)
    assert [row.same_twice for row in rows[:2]] == [True, False]


def rows_of(function: str, heads: str, n_vocab: int, ours: str, **numbers) -> list[bench.Row]:
    row = bench.Row(function, heads, "big", n_vocab, 896, 1024, "float32", "eager")
    row = dataclasses.replace(row, peak_bytes=1100, gradient_bytes=100)
    return [row, dataclasses.replace(row, contestant=ours, **numbers)]


@pytest.mark.parametrize(
    ("function", "heads", "n_vocab", "wanted"),
    [
        (
            "soft_policy_kl", "frozen", 32016,
            [("time as a share of eager's", 0.65, False), (OF_PRODUCTS, 1.15, False)],
        ),
        (
            "soft_policy_kl", "trained", 151936,
            [("time as a share of eager's", 1.5, True), (OF_PRODUCTS, 1.15, False)],
        ),
        (
            "vocab_stats", "frozen", 32016,
            [("time as a share of eager's", 1.5, True)],
        ),
        ("linear_kl", "frozen", 32016, [(OF_PRODUCTS, 1.15, False)]),
        ("linear_logprob", "frozen", 32016, []),
        ("soft_policy_kl", "frozen", 1536, None),
    ],
)  # fmt: skip
def test_goals_on_a_cpu(function, heads, n_vocab, wanted):
    rows = rows_of(
        function, heads, n_vocab, "etpo chunked", ratio_to_eager=0.8, ratio_to_products=1.2, peak_bytes=260
    )
    memory = [("peak memory beside the gradients as a share of eager's", 0.15, False)]
    if wanted is None or function not in ("soft_policy_kl", "vocab_stats"):
        memory = []
    goals = [(goal.what, goal.limit, goal.met) for goal in goals_of(rows, "cpu")]
    assert goals == (wanted or []) + memory
    assert goals_of(rows[:1], "cpu") == []


def test_goals_on_a_gpu():
    spread = bench.Spread(2.0, 1.0, 3.0)
    rows = rows_of(
        "linear_kl", "trained", 128256, "etpo triton", both_s=spread, ratio_to_products=1.25, same_twice=True,
        error_gradient=2e-3, dtype="bfloat16",
    )  # fmt: skip
    rows.append(dataclasses.replace(rows[0], contestant="liger-kernel", both_s=bench.Spread(1.6, 1.0, 3.0)))
    goals = {goal.what: (goal.measured, goal.met) for goal in goals_of(rows, "cuda")}
    assert goals == {
        "share of the fewest products' speed": (0.8, True),
        "time as a share of liger-kernel's": (1.25, False),
        "bitwise the same twice": (1.0, True),
        "error of gradients": (2e-3, True),
    }


def test_goals_read_as_met_or_missed():
    lines = goal_lines([Goal("time", "a", 0.5, 0.6), Goal("speed", "b", 0.5, 0.6, at_least=True)])
    assert lines[-3:-1] == ["| time | a | ≤ 0.5 | 0.6 | missed |", "| speed | b | ≥ 0.5 | 0.6 | met |"]
    assert goal_lines([]) == []


def test_what_holds_all_logits_is_not_run_where_memory_does_not_hold_them(monkeypatch):
    # eager would hold 7 planes of 6·40 float32, and the inputs 3.3 kB
    monkeypatch.setattr(bench, "free_bytes", lambda device: 6000)
    rows = bench.measure_case(tiny_case("linear_kl"), contestants_of(["etpo chunked"]), rounds=1)
    assert "GiB, more than is free" in rows[0].why_not
    assert rows[1].why_not is None
    assert rows[1].ratio_to_eager is None


def test_mean_contestants_are_held_to_the_mean():
    def mean(function):
        return lambda x: [out.mean() for out in function.eager(x)]

    contestant = Contestant("mean", frozenset(FUNCTIONS), lambda case: None, mean, is_mean=True)
    row = bench.measure_case(tiny_case("linear_kl"), [EAGER, contestant], rounds=1)[1]
    assert row.error_value < 1e-5
    assert row.error_gradient < 1e-5


@pytest.mark.parametrize(
    ("name", "frozen", "trained"),
    [
        ("linear_logprob", 2, 3),
        ("linear_logprob_alone", 2, 3),
        ("linear_kl", 3, 4),
        ("soft_value", 3, 4),
        ("soft_policy_kl", 4, 5),
        ("vocab_stats", 4, 5),
        ("kl_from_logits", 0, 0),
    ],
)
def test_the_fewest_products(name, frozen, trained):
    assert sum(FUNCTIONS[name].products(False)) == frozen
    assert sum(FUNCTIONS[name].products(True)) == trained
    if frozen:
        for head, count in ((False, frozen), (True, trained)):
            case = tiny_case(name, trained=head)
            products = Products(case, make_inputs(case))
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
                products.forward()
                products.backward()
            ran = sum(e.count for e in trace.key_averages() if e.key in ("aten::mm", "aten::addmm_"))
            assert ran == count
            assert needed_flops(case) == count * 2 * 6 * 40 * 8


def test_bytes_that_must_move():
    frozen, trained = (tiny_case("linear_kl", trained=t) for t in (False, True))
    assert needed_bytes(frozen) == 4 * (2 * 40 * 8 + 3 * 6 * 8)
    assert needed_bytes(trained) == needed_bytes(frozen) + 4 * 40 * 8
    assert needed_bytes(tiny_case("kl_from_logits")) == 4 * 3 * 6 * 40


def test_gradients_are_asked_of_the_learner_alone():
    assert FUNCTIONS["soft_value"].learner == CRITIC
    assert {f.learner for name, f in FUNCTIONS.items() if not name.startswith("soft_value")} == {POLICY}


def test_peak_counts_what_is_held_at_a_time():
    def run() -> None:
        torch.empty(1000)
        torch.empty(500)

    assert peak_bytes(run, CPU) == 4000


def test_precision_of_ours_and_of_rounded_logits():
    rows = precision_table(
        contestants_of(["etpo chunked", "etpo triton"]), TINY, 16, CPU, torch.bfloat16, lambda line: None
    )
    ours = [row for row in rows if row.contestant == "etpo chunked"]
    assert [row.kl_aimed for row in ours] == [1e-4, 1e-3, 1e-2, 1e-1, 1.0]
    assert all(abs(row.kl_mean / row.kl_aimed - 1) < 0.1 for row in ours)
    assert all(row.error_gradient <= 3e-3 for row in ours)
    eager = [row.error_gradient for row in rows if row.contestant == EAGER.name]
    assert eager[0] > 0.1 > eager[-1] > 3e-3
    assert all(row.why_not for row in rows if row.contestant == "etpo triton")


def test_precision_inputs_have_one_head():
    case = tiny_case("linear_kl", trained=True, n_tokens=16, dtype=torch.bfloat16)
    inputs, kl = inputs_at(0.01, case)
    assert torch.equal(inputs.weight[0], inputs.weight[2])
    assert kl == pytest.approx(0.01, rel=0.1)


def test_shapes_by_name_and_by_size():
    assert shape_of("qwen2.5-0.5b")[1:] == (151936, 896)
    assert shape_of("32016x896")[1:] == (32016, 896)
    for wrong in ("gpt", "32016", "0x8", "axb"):
        with pytest.raises(ValueError, match=f"got '{wrong}'"):
            shape_of(wrong)


@pytest.fixture
def quick(monkeypatch):
    """No gigabytes copied, no processes started."""
    monkeypatch.setattr("etpo.bench.kernels.limits.COPY_BYTES", 1 << 16)
    monkeypatch.setattr("etpo.bench.kernels.output.import_seconds", lambda: 0.05)


SMALL = ["bench", "kernels", "--shapes", "40x8", "--tokens", "6", "--repeats", "1", "--device", "cpu"]


def test_the_command_writes_json_markdown_and_a_plot(tmp_path: Path, quick):
    files = {name: tmp_path / "sub" / f"k.{name}" for name in ("json", "markdown", "svg")}
    peers = ["--peers", "etpo chunked,liger-kernel", "--functions", "linear_kl,kl_from_logits"]
    written = [
        w for k, f in zip(("--json", "--markdown", "--plot"), files.values(), strict=True) for w in (k, f)
    ]
    result = CliRunner().invoke(main, [str(word) for word in [*SMALL, *peers, *written]])
    assert result.exit_code == 0, result.output
    table = json.loads(files["json"].read_text())
    assert {"processor", "cores", "torch_threads", "torch", "trl", "date", "import_s"} <= set(
        table["environment"]
    )
    assert table["copy_bytes_per_s"] > 0
    assert table["command"].startswith(
        "etpo bench kernels --shapes 40x8 --functions linear_kl,kl_from_logits"
    )
    assert len(table["rows"]) == 2 * 4 + 2
    spreads = ("forward_s", "backward_s", "both_s")
    on_screen = to_text([
        bench.Row(**row | {name: row[name] and bench.Spread(**row[name]) for name in spreads})
        for row in table["rows"]
    ])  # fmt: skip
    assert max(map(len, on_screen.splitlines())) <= 80
    assert (
        on_screen.count("both ms")
        == on_screen.count("tokens")
        == len({(row["shape"], row["n_tokens"], row["function"], row["heads"]) for row in table["rows"]})
    )
    assert "not run:" in on_screen
    assert "| liger-kernel (the mean over tokens alone) | not run:" in files["markdown"].read_text()
    svg = files["svg"].read_text()
    assert svg.count("<rect") == 1 + 2 * 3 + 2
    assert "not run:" in svg


def test_the_command_for_precision(tmp_path: Path, quick):
    out = tmp_path / "p.json"
    words = [*SMALL[:6], "--precision", "--peers", "etpo chunked", "--device", "cpu", "--json", str(out)]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    assert "| 1.2e+00 |" not in result.stdout
    table = json.loads(out.read_text())
    assert table["dtype"] == "bfloat16"
    assert len(table["rows"]) == 10


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--shapes", "gpt"], "shapes: expected one of nano"),
        (["--functions", "kl"], "functions: expected some of linear_logprob"),
        (["--peers", "me"], "peers: expected some of eager"),
        (["--heads", "thawed"], "heads: expected some of frozen, trained, got thawed"),
        (["--tokens", "many"], "got 'many'"),
        (["--device", "abacus"], "device: expected cpu, cuda or auto"),
        (["--plot", "times.png"], "expected an .svg file"),
    ],
)
def test_wrong_words_are_named(words, text, quick):
    result = CliRunner().invoke(main, [*SMALL, *words])
    assert result.exit_code in (1, 2)
    assert text in " ".join(result.output.split())


def test_compile_only_prints_the_table_of_the_compiler(monkeypatch):
    asked = []

    def compile_table(archs):
        asked.append(archs)
        return [{"kernel": "stats"}]

    fake = SimpleNamespace(compile_table=compile_table, to_markdown=lambda rows: f"rows: {len(rows)}")
    monkeypatch.setitem(sys.modules, "etpo.bench.compile", fake)
    result = CliRunner().invoke(main, ["bench", "kernels", "--compile-only", "--archs", "90,100"])
    assert result.exit_code == 0, result.output
    assert result.stdout == "rows: 1\n"
    assert asked == [[90, 100]]


def test_the_sandbox_command_prints_json(monkeypatch):
    measure = "etpo.bench.sandbox.throughput.measure"
    monkeypatch.setattr(measure, lambda workers, seconds: {"workers": workers})
    result = CliRunner().invoke(main, ["bench", "sandbox", "--workers", "2"])
    assert json.loads(result.stdout) == {"workers": 2}


def test_importing_the_kernels_loads_no_triton_no_transformers_no_sklearn():
    code = (
        "import sys, etpo.kernels; "
        "print(sorted({'triton', 'transformers', 'sklearn', 'etpo.engine', 'etpo.envs'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
