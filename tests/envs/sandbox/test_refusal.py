"""What is said of a program without running it."""

import pytest

from etpo.envs.sandbox import refuse
from tests.envs.programs import program


def test_a_search_is_no_offence_before_it_is_fitted():
    assert (
        refuse(program("from sklearn.model_selection import GridSearchCV  # GridSearchCV\nreturn 1")) is None
    )


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("def build_model(x_train, y_train):\n    x = (", 2),
        ("a\0b", None),
        ("-" * 60_000 + "1", None),
        ("a" + ".a" * 30_000, None),
        ("x = 1\n" * 20_000, None),
        ("'\ud800'", None),
    ],
)
def test_text_that_cannot_be_parsed_is_an_error(source, line):
    outcome, failure = refuse(source)
    assert (outcome, failure.kind) == ("error", "SyntaxError")
    assert failure.line == line
