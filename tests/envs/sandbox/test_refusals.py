"""Searches over hyperparameters are found however they are spelled, and nothing else is."""

import ast

import pytest

from etpo.envs.sandbox.refusals import forbidden_search

LOOP = "from sklearn.model_selection import cross_val_score\n"


@pytest.mark.parametrize(
    ("source", "what", "line"),
    [
        ("from sklearn.model_selection import GridSearchCV", "GridSearchCV", 1),
        ("x = 1\nfrom sklearn.model_selection import RandomizedSearchCV as R", "RandomizedSearchCV", 2),
        ("import sklearn.model_selection as m\nm.HalvingGridSearchCV(a, b)", "HalvingGridSearchCV", 2),
        ("from sklearn.model_selection import *\nHalvingRandomSearchCV(a, b)", "HalvingRandomSearchCV", 2),
        ("import sklearn\ngetattr(sklearn.model_selection, 'GridSearchCV')", "GridSearchCV", 2),
        ("getattr(m, 'Grid' + 'SearchCV')", "GridSearchCV", 1),
        ("vars(m)['GridSearchCV']", "GridSearchCV", 1),
        ("m.__dict__.get('GridSearchCV')", "GridSearchCV", 1),
        ("import operator\noperator.attrgetter('GridSearchCV')(m)", "GridSearchCV", 2),
        ("import sklearn.model_selection._search.GridSearchCV", "GridSearchCV", 1),
        ("from skopt import BayesSearchCV", "BayesSearchCV", 1),
        ("from sklearn.model_selection import validation_curve", "validation_curve", 1),
        (LOOP + "for c in grid:\n    cross_val_score(f(c), x, y)", "cross_val_score in a loop", 3),
        (LOOP + "while True:\n    cross_val_score(m, x, y)", "cross_val_score in a loop", 3),
        (LOOP + "s = [cross_val_score(f(c), x, y).mean() for c in grid]", "cross_val_score in a loop", 2),
        (
            LOOP + "max(grid, key=lambda c: cross_val_score(f(c), x, y).mean())",
            "cross_val_score in a loop",
            2,
        ),
        ("from m import cross_validate as cv\nfor c in g:\n    cv(c)", "cross_validate in a loop", 3),
        ("import m\ncv = m.cross_val_score\nfor c in g:\n    cv(c)", "cross_val_score in a loop", 4),
        (
            "for c in g:\n    def f():\n        return m.cross_val_predict(c)",
            "cross_val_predict in a loop",
            3,
        ),
    ],
)
def test_a_search_is_found(source, what, line):
    assert forbidden_search(ast.parse(source)) == (what, line)


@pytest.mark.parametrize(
    "source",
    [
        "'''GridSearchCV'''  # GridSearchCV\nsearch_cv(x)",
        "note = 'GridSearchCV'\nprint('GridSearchCV')",
        "raise ValueError('no GridSearchCV')",
        LOOP + "score = cross_val_score(m, x, y)",
        LOOP + "for s in cross_val_score(m, x, y):\n    print(s)",
        "from sklearn.linear_model import LogisticRegressionCV\nLogisticRegressionCV().fit(x, y)",
        "for depth in (2, 3):\n    m = Tree(depth).fit(x, y)",
        "{'a': 1}['a']",
        "x = " + " + ".join(["'a'"] * 500),
    ],
)
def test_nothing_else_is(source):
    assert forbidden_search(ast.parse(source)) is None
