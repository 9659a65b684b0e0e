"""The reflection prompt's error line, and the prompt itself."""

import pytest

from etpo.envs.prompts import SIGNATURE, clean_message, describe_error, reflection_prompt, task_prompt


def test_a_reflection_shows_the_program_its_error_and_asks_again():
    task = task_prompt("wine", 178, 13, 3)
    assert reflection_prompt(task, "    return 1", "line 1: E: m") == (
        f"{task}    return 1\n# Failed: line 1: E: m\n# Corrected:\n{SIGNATURE}"
    )
    other = reflection_prompt("# T\ndef f(x):\n", "    return 1\n", "E", "def f(x):\n")
    assert other == "# T\ndef f(x):\n    return 1\n# Failed: E\n# Corrected:\ndef f(x):\n"


@pytest.mark.parametrize(
    ("message", "cleaned"),
    [
        ("cannot import name 'A' from 'b' (/usr/lib/b/__init__.py)", "cannot import name 'A' from 'b'"),
        ("cannot import name 'A' from 'b' (unknown location)", "cannot import name 'A' from 'b'"),
        ("No such file or directory: '/tmp/box-x1/0-7/data.csv'", "No such file or directory: 'data.csv'"),
        ("/usr/lib/libx.so.1: cannot open shared object", "libx.so.1: cannot open shared object"),
        ("cannot open path=/a/b/c.txt", "cannot open path=c.txt"),
        ("<f object at 0x7f00deadbeef>", "<f object at 0x…>"),
        ("bad array=[1. 2. 3.] given", "bad array=[…] given"),
        ("one of {'b', 'a'}", "one of {'a', 'b'}"),
        ("see https://scikit-learn.org/stable/modules/impute.html", None),
        ("unsupported operand type(s) for /: 'str' and 'int'", None),
        ("a ratio of 1/2/3 or and/or", None),
    ],
)
def test_a_message_keeps_what_helps(message, cleaned):
    assert clean_message(message) == (message if cleaned is None else cleaned)


def test_an_error_is_one_short_line():
    error = ValueError("first\n  second " + "x" * 300)
    line = describe_error(error, 3)
    assert line.startswith("line 3: ValueError: first second xxx")
    assert line.endswith("x…")
    assert len(line) == len("line 3: ValueError: ") + 160
    assert describe_error(KeyError(), None) == "KeyError"
