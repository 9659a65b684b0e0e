"""Runs a program of the grammar in this process, on a small table, and says how it failed.

Only for the grammar's own programs: nothing here protects against a program (see `sandbox.py` for that). The
error lines are the sandbox's own, which a test holds them to.
"""

import contextlib
import io
import re
import traceback
import warnings
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection._search import BaseSearchCV

from etpo.engine.pretrain.grammar.program import Size
from etpo.envs.prompts import as_program, describe_error
from etpo.envs.sandbox import refuse
from etpo.envs.sandbox.box.stand_ins import not_allowed
from etpo.envs.scoring import check_proba

_FILE = "<program>"
_FEW_TRAIN, _FEW_VAL = 101, 97
_MAX_ROWS, _MAX_FEATURES = 2000, 60
# What an error that depends on the number of rows speaks of.
_OF_ROWS = re.compile(rf"\b({_FEW_TRAIN}|{_FEW_TRAIN - 1}|{_FEW_VAL})\b|rank|samples|members|n_splits")


def first_error(body: str, size: Size) -> str | None:
    """The error line of a body on a table of `size`, or None where it runs.

    A few rows stand for all, but where the error speaks of their number.
    """
    n_train = size.n_rows // 2
    n_val = size.n_rows - n_train
    if n_train <= _FEW_TRAIN:
        return _run(body, size, n_train, n_val)
    error = _run(body, size, _FEW_TRAIN, _FEW_VAL)
    if error is not None and _OF_ROWS.search(error):
        return _run(body, size, n_train, n_val)
    return error


def table(size: Size) -> NDArray[np.float64]:
    """[rows, features]: whole numbers, zeros and ones, and real numbers of both signs, column by column."""
    return _table()[: size.n_rows, : size.n_features]


@lru_cache(maxsize=1)
def _table() -> NDArray[np.float64]:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((_MAX_ROWS, _MAX_FEATURES)).round(2)
    values[:, 0::3] = rng.integers(0, 3, values[:, 0::3].shape)
    values[:, 1::3] = rng.integers(0, 2, values[:, 1::3].shape)
    return values


def _run(body: str, size: Size, n_train: int, n_val: int) -> str | None:
    program = as_program(body)
    if (verdict := refuse(program)) is not None:
        failure = verdict[1]
        kind = type(failure.kind, (Exception,), {})
        return describe_error(kind(failure.message), max(1, failure.line - 1) if failure.line else None)
    x = table(size)
    x_train, x_val = x[:n_train].copy(), x[n_train : n_train + n_val]
    y_train = np.arange(n_train) % size.n_classes
    scope: dict[str, Any] = {}
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        np.errstate(all="ignore"),
        _searches_refused(),
    ):
        warnings.simplefilter("ignore")
        try:
            exec(compile(program, _FILE, "exec"), scope)
            model = scope["build_model"](x_train, y_train)
            if model is None:
                raise TypeError("build_model returned None; it must return the fitted classifier")
            if not hasattr(model, "predict_proba"):
                raise AttributeError(
                    f"{type(model).__name__} has no predict_proba; return a classifier that has it"
                )
            proba = model.predict_proba(x_val)
        except Exception as error:
            kind = type(type(error).__name__, (Exception,), {})
            return describe_error(kind(str(error)), _line(error))
    if problem := check_proba(np.asarray(proba, dtype=np.float64), n_val, size.n_classes, size.n_classes):
        return f"invalid output: {problem}"
    return None


@contextlib.contextmanager
def _searches_refused() -> Iterator[None]:
    """Fitting a search is refused here as it is in the sandbox, with the same words."""
    own_fit = BaseSearchCV.fit
    kind = type("refused", (Exception,), {})

    def fit(self: Any, *_: Any, **__: Any) -> None:
        raise kind(not_allowed(type(self).__name__))

    BaseSearchCV.fit = fit
    try:
        yield
    finally:
        BaseSearchCV.fit = own_fit


def _line(error: BaseException) -> int | None:
    """1-based line of the body: the last frame inside the program, one less for the signature."""
    lines = [
        line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == _FILE
    ]
    return max(1, lines[-1] - 1) if lines else None
