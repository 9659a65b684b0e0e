"""Program repair: the bundled tasks, the verdicts, and what the box does not learn."""

import contextlib
import json
import textwrap

import pytest

from etpo.engine.models.prompt_extract import signature_of
from etpo.envs.program_repair.env import ProgramRepair, _equal, first_prompt, judge
from etpo.envs.program_repair.tasks import load_tasks

TASKS = {task.name: task for task in load_tasks()}
REPAIRED = {
    "clamp": "return max(low, min(x, high))",
    "fibonacci": "a, b = 0, 1\nfor _ in range(n):\n    a, b = b, a + b\nreturn a",
    "mean": "return sum(numbers) / len(numbers) if numbers else None",
    "run_lengths": ("from itertools import groupby\nreturn [(c, len(list(g))) for c, g in groupby(text)]"),
    "count_words": "from collections import Counter\nreturn dict(Counter(text.lower().split()))",
    "merge": "return sorted(a + b)",
}


def attempt(name: str, body: str, sandbox):
    return judge(TASKS[name], textwrap.indent(body, "    ") + "\n", sandbox)


def test_there_are_many_tasks_and_each_is_whole():
    assert len(TASKS) == len(load_tasks()) >= 24
    for task in load_tasks():
        assert len(task.tests) >= 4
        name, _, parameters = task.signature.removeprefix("def ").partition("(")
        assert name == task.name
        n_parameters = len(parameters.split(","))
        assert all(len(arguments) == n_parameters for arguments, _ in task.tests)
        assert signature_of(first_prompt(task)) is not None
        call, _, result = task.example.partition(" == ")
        assert call.startswith(f"{task.name}(")
        assert result


@pytest.mark.parametrize("name", TASKS)
def test_what_is_faulty_fails_some_hidden_tests_and_not_all(name):
    """Here, not in the box: the bundled sources are our own."""
    task = TASKS[name]
    space: dict = {}
    exec(task.faulty, space)
    passed = 0
    for arguments, expected in task.tests:
        with contextlib.suppress(IndexError, KeyError, ZeroDivisionError):
            passed += space[name](*json.loads(json.dumps(arguments))) == expected
    assert 0 < passed < len(task.tests)


@pytest.mark.parametrize("name", REPAIRED)
def test_a_repaired_function_passes_all(sandbox, name):
    verdict = attempt(name, REPAIRED[name], sandbox)
    assert (verdict.reward, verdict.error) == (1.0, None)
    assert verdict.passed == len(TASKS[name].tests)


def test_a_partly_right_function_loses_what_it_lacks(sandbox):
    verdict = attempt("clamp", "return x", sandbox)
    assert (verdict.reward, verdict.passed) == (-(1 - 4 / 6), 4)
    assert verdict.error == "4 of 6 hidden tests pass"
    whole = judge(TASKS["clamp"], "def clamp(x, low, high):\n    return x\n", sandbox)
    assert whole.reward == verdict.reward
    bare = judge(TASKS["clamp"], "return x", sandbox)
    assert bare.reward == verdict.reward
    raising = attempt("mean", "return sum(numbers) / len(numbers)", sandbox)
    assert raising.error == "4 of 5 hidden tests pass, 1 raise an exception"
    assert raising.reward == -(1 - 0.8)


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("retrun x", "line 1: SyntaxError: invalid syntax"),
        ("y = x\nreturn nothing", "line 2: NameError: name 'nothing' is not defined"),
        ("import os\nos._exit(0)", "crashed: the process ended before the model"),
        ("raise SystemExit", "SystemExit"),
        ("return lambda: 1", "TypeError: the result is of type function"),
        ("return 'x' * 2000", "ValueError: the result is too long"),
    ],
)
def test_what_does_not_run_earns_minus_one_and_says_why(sandbox, body, error):
    verdict = attempt("clamp", body, sandbox)
    assert (verdict.reward, verdict.passed) == (-1.0, 0)
    assert error in verdict.error


@pytest.mark.parametrize("shape", ["(6, 0)", "(0, 2)", "(6, 3)", "(1, 900)"])
def test_a_forged_table_of_results_is_not_believed(sandbox, shape):
    forged = f"""
    import os, struct
    n, m = {shape}
    os.write(4, struct.pack("<4sBIdIIIII", b"etpo", 0, 0, 0, n, m, 0, 0, 0) + bytes(8 * n * m))
    os._exit(0)
    """
    verdict = attempt("clamp", textwrap.dedent(forged), sandbox)
    assert (verdict.reward, verdict.error) == (-1.0, "error: the results cannot be read")


def test_a_program_at_the_size_limit_is_an_error(sandbox):
    for size in (65_300, 65_480, 65_536):
        verdict = attempt("clamp", "x = 1".ljust(size - 40), sandbox)
        assert verdict.reward == -1.0
        assert "longer than 65536 bytes" in verdict.error or size == 65_300


def test_no_hidden_argument_reaches_the_next_prompt(sandbox):
    verdict = attempt("clamp", "raise ValueError((x, low, high))", sandbox)
    assert verdict.error == "line 1: ValueError: (7, 0, 5)", "the example, which the prompt shows anyway"
    verdict = attempt("clamp", "if x != 7:\n    raise ValueError(x)\nreturn 5", sandbox)
    assert "ValueError" not in verdict.error
    clever = "import builtins\nseen = builtins.__dict__.setdefault('seen', [])\nseen.append(x)\n"
    verdict = attempt("clamp", clever + "if low != 0 or x != 7:\n    raise ValueError(seen)", sandbox)
    assert "-3" not in verdict.error


def test_an_endless_loop_is_a_timeout(sandbox, monkeypatch):
    monkeypatch.setattr(sandbox, "timeout_s", 0.5)
    verdict = attempt("clamp", "while True:\n    pass", sandbox)
    assert verdict.reward == -1.0
    assert verdict.error.startswith("timeout: ")


@pytest.mark.parametrize(
    "body",
    [
        # equal to everything; a subclass that says so; a text instead of the value; a number for a truth
        "class Any:\n    def __eq__(self, other):\n        return True\nreturn Any()",
        "class Int(int):\n    def __eq__(self, other):\n        return True\nreturn Int(3)",
        "return str(max(low, min(x, high)))",
        "return float(max(low, min(x, high))) + 0.01",
    ],
)
def test_no_result_counts_that_is_not_the_expected_value_and_type(sandbox, body):
    assert attempt("clamp", body, sandbox).reward <= 0.0


@pytest.mark.parametrize(
    ("got", "expected", "same"),
    [
        (1, True, False), (True, 1, False), (1.0, 1, False), ((1,), [1], False), (None, 0, False),
        ({"a": [1.0]}, {"a": [1]}, False), ({"a": 1}, {"a": 1, "b": 2}, False), ([1], [1, 2], False),
        (float("nan"), 0.5, False), (0.5 + 1e-6, 0.5, False), (0.1 + 0.2, 0.3, True),
        ({"a": [(1, "x")]}, {"a": [(1, "x")]}, True),
    ],
)  # fmt: skip
def test_results_are_compared_by_value_and_type(got, expected, same):
    assert _equal(got, expected) is same


def test_the_expected_results_are_not_in_the_box(sandbox):
    """All that the child's memory and the harness hold: arguments, but no result that is not one of them."""
    body = """
        import gc, sys
        frame = sys._getframe(1)
        held = repr(frame.f_locals) + repr(frame.f_globals.get("__doc__")) + repr(
            [o for o in gc.get_objects() if isinstance(o, (list, tuple, dict)) and len(o) < 50][:5000]
        )
        raise ValueError("leaked" if "102334155" in held else "nothing")
    """
    verdict = attempt("fibonacci", textwrap.dedent(body).strip(), sandbox)
    assert "ValueError: nothing" in verdict.error


@pytest.fixture
def env(sandbox, monkeypatch):
    env = ProgramRepair(max_episode_steps=2, timeout_s=20.0)
    yield env
    env.close()


def test_an_episode_reflects_and_ends(env):
    first, info = env.reset(seed=0)
    task = TASKS[info["task"]]
    assert first == first_prompt(task)
    assert first.endswith(f"# Corrected:\n{task.signature}")
    assert not any(repr(expected) in first for _, expected in task.tests[3:] if len(repr(expected)) > 6)
    again, reward, terminated, truncated, info = env.step("    return nothing\n")
    assert (reward, terminated, truncated) == (-1.0, False, False)
    assert again == (
        f"{first}    return nothing\n# Failed: line 1: NameError: name 'nothing' is not defined\n"
        f"# Corrected:\n{task.signature}"
    )
    assert info["tests"] == len(task.tests)
    assert env.step("    return nothing\n")[3] is True


def test_an_episode_earns_most_by_the_repair(env):
    """Four fifths of the tests, again and again, must not be worth more than all of them once."""
    while env.reset()[1]["task"] != "mean":
        pass
    almost = [env.step("    return sum(numbers) / len(numbers)\n")[1] for _ in range(2)]
    while env.reset()[1]["task"] != "mean":
        pass
    assert sum(almost) < env.step(REPAIRED["mean"])[1]


def test_a_repair_terminates_and_a_checkpoint_goes_on(env):
    env.reset(seed=3)
    env.step("    return None\n")
    state = json.loads(json.dumps(env.state_dict()))
    other = ProgramRepair(max_episode_steps=2, timeout_s=20.0)
    assert other.load_state_dict(state) == env.prompt
    assert other.judge is env.judge  # one warm server for both
    assert other.reset()[0] == env.reset()[0]  # the same next task
    names = set()
    for _ in range(60):
        prompt, info = env.reset()
        names.add(info["task"])
        if info["task"] == "clamp":
            obs, reward, terminated, truncated, info = env.step(REPAIRED["clamp"])
            assert (obs, reward, terminated, truncated) == (prompt, 1.0, True, False)
    assert len(names) > 15
    other.close()


def test_without_reflection_the_state_stays(sandbox):
    env = ProgramRepair(reflection=False, timeout_s=20.0)
    first, _ = env.reset(seed=0)
    assert env.step("    return nothing\n")[0] == first
    env.close()
    with pytest.raises(ValueError, match="closed"):
        env.step("    return 1\n")
    with pytest.raises(ValueError, match="got 0"):
        ProgramRepair(max_episode_steps=0)


def test_it_is_trained_on_and_evaluated_from_the_command_line(tiny_folder, tmp_path):
    from click.testing import CliRunner

    from etpo.cli.main import main

    out = tmp_path / "run"
    words = ["train", "--env", "etpo.envs.program_repair.env:ProgramRepair", "--model", str(tiny_folder),
             "--steps", "4", "--envs", "2", "--max-new-tokens", "4", "--threads", "1", "--no-reflection",
             "--max-episode-steps", "1", "--out", str(out)]  # fmt: skip
    trained = CliRunner().invoke(main, words)
    assert trained.exit_code == 0, trained.output
    programs = [json.loads(line) for line in (out / "programs.jsonl").read_text().splitlines()]
    assert [(p["env"], p["episode"], p["t"]) for p in programs] == [
        (0, 0, 0),
        (1, 0, 0),
        (0, 1, 0),
        (1, 1, 0),
    ]
    assert all(p["error"] and p["reward"] <= 0 for p in programs)
    assert not any("# Failed" in p["prompt"] for p in programs)
    told = CliRunner().invoke(main, ["eval", str(out), "-n", "2", "--json", str(tmp_path / "e.json")])
    assert told.exit_code == 0, told.output
    assert json.loads((tmp_path / "e.json").read_text())["policy"]["reward_mean"] <= 0
