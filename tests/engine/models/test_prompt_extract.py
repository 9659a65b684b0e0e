"""What is taken from a model's answer, and what is left in it."""

import pytest

from etpo.engine.models.prompt_extract import extract, signature_of

BODY = "    m = Model()\n    return m.fit(x_train, y_train)\n"
WHOLE = "def build_model(x_train, y_train):\n" + BODY
IMPORTS = "import numpy as np\nfrom a.b import (\n    Model,\n)\n\n"
BRACKET = "    x = f(\n1,\n)\n    return x\n"
STRING = "    x = '''\na\n'''\n    return x\n"
STRINGS = "def build_model(x, y):\n    return '''a\n  \n   b\n'''\n"
ODD = "s = 'a\x0c\u2028b'\nreturn s\n"
WRAPPED = WHOLE + "build_model = f(build_model)\n"
SPACED = WHOLE.replace("build_model(", "build_model (")
ASSIGNED = "import m\nbuild_model = lambda x, y: m.f(x, y)\n"
BRANCH = "import m\nif m.v > 2:\n    def build_model(x, y):\n        return 1\n"
HELPER = "def scale(x):\n    return x / 2\n\n\n"

CASES = {
    "a body": (BODY, BODY),
    "a body with text behind it": (BODY + "\n# Test\nprint(build_model(x, y))\n", BODY),
    "a body with another function behind it": (BODY + "\n\ndef main():\n    pass\n", BODY),
    "a body with a blank line and a comment at the margin": (
        "    x = 1\n\n# scale\n    return x\n",
        "    x = 1\n\n# scale\n    return x\n",
    ),
    "a bracket that is open at the margin": (BRACKET + "x", BRACKET),
    "a string at the margin": (STRING + "x()", STRING),
    "a body with a mistake and text behind it": ("    x = (\n\nIt is\n", "    x = (\n\nIt is\n"),
    "the repeated prompt": ("# Data set wine.\n" + WHOLE, WHOLE),
    "a whole function with text behind it": (WHOLE + "\nThis fits a model.\n", WHOLE),
    "imports and a helper": (IMPORTS + HELPER + WHOLE, IMPORTS + HELPER + WHOLE),
    "a call behind the function": (WHOLE + "\nmodel = build_model(x, y)\nprint(model)\n", WHOLE),
    "a helper behind the function": (WHOLE + "\n" + HELPER, WHOLE + "\n" + HELPER.rstrip() + "\n"),
    "a fenced block": (f"Here it is:\n\n```python\n{IMPORTS}{WHOLE}```\nIt is good.", IMPORTS + WHOLE),
    "a fenced body": (f"```\n{BODY}```", BODY),
    "a fenced string": (f"```\n{STRINGS}```", STRINGS),
    "a fenced string in a list": (
        "1. so\n   ```\n   " + STRINGS.replace("\n", "\n   ") + "\n   ```\n",
        STRINGS,
    ),
    "a string with other line ends": (ODD + "\nIt is so.", ODD),
    "a blank before the bracket": ("So:\n" + SPACED, SPACED),
    "an assignment": ("Sure\n" + ASSIGNED + "print(build_model)\n", ASSIGNED),
    "a branch": (BRANCH + "build_model(x, y)\n", BRANCH),
    "a constant before the function": ("# so\nC = 2\n" + WHOLE, "C = 2\n" + WHOLE),
    "a function that is wrapped": (WRAPPED + "print(1)\n", WRAPPED),
    "a byte order mark": ("\ufeff" + WHOLE, WHOLE),
    "a block in a list": ("- so:\n  ```python\n  " + WHOLE.replace("\n", "\n  ") + "\n  ```\n", WHOLE),
    "a block that is not closed": (f"```python\n{WHOLE}", WHOLE),
    "two blocks": (f"```bash\npip install x\n```\nthen\n```python\n{WHOLE}```", WHOLE),
    "two tries": (f"```python\n{WHOLE.replace('m.', 'n.')}```\nno:\n```python\n{WHOLE}```", WHOLE),
    "tildes": (f"~~~python\n{WHOLE}~~~", WHOLE),
    "prose before the code": ("from what I see, this works:\n" + IMPORTS + WHOLE, IMPORTS + WHOLE),
    "a bare body with prose behind it": (
        "m = Model()\nreturn m.fit(x, y)\n\nThis is a model that fits.",
        "m = Model()\nreturn m.fit(x, y)\n",
    ),
    "a mistake stays": ("    retrun 1\n", "    retrun 1\n"),
    "a mistake in the whole function stays": (
        WHOLE.replace("return", "retrun"),
        WHOLE.replace("return", "retrun"),
    ),
    "a bare body with a mistake": ("x = = 3\nreturn x\n", "x = = 3\nreturn x\n"),
    "nothing": ("", ""),
    "prose": ("I cannot do that.", "I cannot do that."),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_surrounds_the_function_is_cut(case):
    said, expected = CASES[case]
    assert extract(said, "build_model") == expected


@pytest.mark.parametrize("case", CASES)
def test_taking_twice_takes_no_more(case):
    once = extract(CASES[case][0], "build_model")
    assert extract(once, "build_model") == once


def test_a_state_names_its_function():
    assert signature_of("# Task\ndef f(a, b=1):\n") == ("f", "a, b=1")
    assert signature_of("def f(a):\n    return 1\n# Corrected:\ndef g(a):\n") == ("g", "a")
    assert signature_of("def f(a):\n    return 1\n") is None
    assert signature_of("row 0 column 1") is None


def test_other_names_are_not_the_function():
    assert extract("def build_model_2(x):\n    return 1\n", "build_model").startswith("def build_model_2")
