"""The reflection prompt's error line, and the prompt itself."""

import ast

import pytest

from etpo.envs.prompts import (
    SIGNATURE,
    as_program,
    clean_message,
    defines,
    describe_error,
    reflection_prompt,
    task_prompt,
)


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
    assert len(line) == len("line 3: ") + 160, "the exception's name counts"
    assert describe_error(type("N" * 500, (Exception,), {})(), None) == "N" * 159 + "…"
    hidden = describe_error(ValueError("\x1b[2Ja\x00\u200bb\u202e\tc"), None)
    assert hidden == "ValueError: [2Jab c"
    assert describe_error(KeyError(), None) == "KeyError"


@pytest.mark.parametrize("c", "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029")
@pytest.mark.parametrize("indent", ["    ", ""])
def test_a_line_ends_where_python_ends_it(c, indent):
    body = f"{indent}s = 'a{c}b'\n{indent}return s\n"
    assert as_program(body) == f"{SIGNATURE}    s = 'a{c}b'\n    return s\n"


def test_strings_over_several_lines_are_left_as_they_are():
    body = "a = '''x\n y\n\nz'''\nb = f\"\"\"{a}\nw\n\"\"\"\nc = 'u\\\nv'\nif a:\n    return a, b, c\n"
    space = {}
    exec(as_program(body), space)
    assert space["build_model"](0, 0) == ("x\n y\n\nz", "x\n y\n\nz\nw\n", "uv")


@pytest.mark.parametrize(
    "program",
    [
        "def build_model (x, y):\n    return 1\n",
        "build_model = lambda x, y: 1\n",
        "if True:\n    def build_model(x, y):\n        return 1\n",
        "def make(x, y):\n    return 1\nbuild_model = make\n",
        "from m import f as build_model\n",
        "try:\n    import m\nexcept ImportError:\n    def build_model(x, y): return 1\n",
        "class build_model:\n    pass\n",
        "a = build_model = max\n",
        "\ufeffdef build_model(x, y):\n    return 1\n",
        "def build_model(x, y):\n    return 1 +\n",
    ],
)
def test_a_program_is_known_by_its_syntax_tree(program):
    assert as_program(program) == program.removeprefix("\ufeff")


@pytest.mark.parametrize(
    "body",
    [
        "s = '''\ndef build_model(x, y):\n'''\nreturn s\n",
        "build_model = 1\nreturn build_model\n",
        "def f():\n    build_model = 1\nreturn f\n",
        "    build_model = 1\n    return build_model\n",
    ],
)
def test_a_body_that_only_names_the_function_is_a_body(body):
    assert not defines(body, "build_model")
    ast.parse(as_program(body))
    assert as_program(body).startswith(SIGNATURE)
