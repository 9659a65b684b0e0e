"""What is said of a program without running it."""

import pytest

from etpo.envs.sandbox import refuse
from tests.envs.programs import program


@pytest.mark.parametrize(
    "source",
    [
        "from sklearn.model_selection import GridSearchCV",
        "from sklearn.model_selection import RandomizedSearchCV as R",
        "import sklearn.model_selection as m\nm.HalvingGridSearchCV",
        "GridSearchCV(1, 2)",
        "from skopt import BayesSearchCV",
    ],
)
def test_search_estimators_are_refused_unrun(source):
    outcome, failure = refuse(program(source))
    assert outcome == "refused"
    assert failure.message.endswith("SearchCV is not allowed; choose the hyperparameters and fit one model")
    assert failure.line == source.count("\n") + 2


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("import sklearn.model_selection as m\ngetattr(m, 'Grid' + 'SearchCV')", "GridSearchCV"),
        ("from sklearn.model_selection import validation_curve", "validation_curve"),
        (
            "from sklearn.model_selection import cross_val_score as cv\n"
            "best = max(grid, key=lambda c: cv(c, x_train, y_train).mean())",
            "cross_val_score in a loop",
        ),
    ],
)
def test_the_same_search_spelled_or_written_otherwise_is_refused_too(source, what):
    outcome, failure = refuse(program(source))
    assert (outcome, failure.message) == (
        "refused", f"{what} is not allowed; choose the hyperparameters and fit one model"
    )  # fmt: skip


def test_talking_about_a_search_is_allowed():
    assert refuse(program("'''GridSearchCV'''  # GridSearchCV\nreturn search_cv(x_train)")) is None


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
