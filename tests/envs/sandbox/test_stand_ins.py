"""Programs as people write them score as plain scikit-learn does; searches are refused when fitted."""

import math
import warnings

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import train_test_split

from etpo.envs.datasets import load_dataset
from etpo.envs.sandbox import SplitArrays
from etpo.envs.scoring import Scorer
from tests.envs.programs import program

HEAD = """
import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.tree import DecisionTreeClassifier
def fit_one(s, x, y):
    return DecisionTreeClassifier(random_state=s, max_features=3).fit(x, y)
class Bag:
    def __init__(self, models): self.models = models
    def predict_proba(self, x): return np.mean([m.predict_proba(x) for m in self.models], axis=0)
"""
HONEST = {
    "loky": """
from joblib import Parallel, delayed
def build_model(x, y):
    return Bag(Parallel(n_jobs=2, backend="loky")(delayed(fit_one)(s, x, y) for s in range(3)))
""",
    "multiprocessing back end": """
from joblib import Parallel, delayed, parallel_backend
def build_model(x, y):
    with parallel_backend("multiprocessing", n_jobs=2):
        return Bag(Parallel()(delayed(fit_one)(s, x, y) for s in range(3)))
""",
    "pool": """
import multiprocessing as mp
def build_model(x, y):
    with mp.get_context("spawn").Pool(2) as pool:
        models = pool.starmap(fit_one, [(s, x, y) for s in range(2)])
        models += [pool.apply_async(fit_one, (2, x, y)).get()]
    return Bag(models)
""",
    "executor": """
from concurrent.futures import ProcessPoolExecutor
def build_model(x, y):
    with ProcessPoolExecutor(max_workers=2) as pool:
        return Bag([f.result() for f in [pool.submit(fit_one, s, x, y) for s in range(3)]])
""",
    "process and queue": """
import multiprocessing
def build_model(x, y):
    queue = multiprocessing.Queue()
    jobs = [multiprocessing.Process(target=lambda s=s: queue.put((s, fit_one(s, x, y)))) for s in range(2)]
    [j.start() for j in jobs]; [j.join() for j in jobs]
    return Bag([m for _, m in sorted([queue.get() for _ in jobs], key=lambda p: p[0])])
""",
    "float16": """
class Half:
    def __init__(self, m): self.m = m
    def predict_proba(self, x): return self.m.predict_proba(x).astype(np.float16)
def build_model(x, y): return Half(LogisticRegression().fit(x, y))
""",
    "lambda": "build_model = lambda x, y: LogisticRegression().fit(x, y)\n",
    "annotated lambda": "build_model: object = lambda x, y: LogisticRegression().fit(x, y)\n",
    "own module": """
import pickle, sys, copy
class W(LogisticRegression): pass
def build_model(x, y):
    assert sys.modules[__name__].W is W and W.__module__ == __name__
    return copy.deepcopy(pickle.loads(pickle.dumps(W().fit(x, y))))
""",
    "report": """
from sklearn.model_selection import cross_val_score, GridSearchCV, cross_validate
NOTE = "no GridSearchCV here"
def build_model(x, y):
    for name, model in (("a", LogisticRegression()), ("b", DecisionTreeClassifier(random_state=0))):
        for scoring in ("accuracy", "roc_auc"):
            print(name, cross_val_score(model, x, y, scoring=scoring).mean(), cross_validate(model, x, y))
    return LogisticRegression().fit(x, y)
""",
    "stacking": """
from sklearn.ensemble import StackingClassifier
def build_model(x, y):
    parts = [(str(d), DecisionTreeClassifier(max_depth=d, random_state=0)) for d in (1, 3)]
    return StackingClassifier(parts, LogisticRegression()).fit(x, y)
""",
    "search by hand": """
def build_model(x, y):
    half = len(x) // 2
    tries = [LogisticRegression(C=c).fit(x[:half], y[:half]) for c in (0.1, 1.0, 10.0)]
    return max(tries, key=lambda m: m.score(x[half:], y[half:]))
""",
    "futures import": """
from __future__ import annotations
from dataclasses import dataclass
@dataclass
class M:
    m: LogisticRegression | None = None
    def predict_proba(self, x): return self.m.predict_proba(x)
def build_model(x, y): return M(LogisticRegression().fit(x, y))
""",
}


def plain(source: str, data) -> float:
    """The score as plain scikit-learn gives it, here, with threads where the program asks for processes."""
    aucs = []
    for seed in range(5):
        x, x_val, y, y_val = train_test_split(data.x, data.y, test_size=0.5, random_state=seed)
        np.random.seed(seed)  # noqa: NPY002 - what random_state=None reads
        space = {"__name__": "__main__"}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(source, space)
            aucs.append(roc_auc_score(y_val, space["build_model"](x, y).predict_proba(x_val)[:, 1]))
    return float(np.mean(aucs))


# Here these would start processes that cannot find their module, or look for it in ours.
ONLY_IN_THE_BOX = {
    "loky", "multiprocessing back end", "pool", "executor", "process and queue", "own module",
    "futures import",
}  # fmt: skip


@pytest.mark.parametrize("name", HONEST)
def test_an_honest_program_scores_as_plain_scikit_learn(sandbox, name):
    data = load_dataset("tic-tac-toe")
    future = "from __future__" in HONEST[name]
    source = HONEST[name].replace("from __future__ import annotations\n", "") if future else HONEST[name]
    source = ("from __future__ import annotations\n" if future else "") + HEAD + source
    score = Scorer(data, sandbox, audit_share=1.0).score(source)
    assert (score.outcome, score.error) == ("ok", None)
    if name not in ONLY_IN_THE_BOX:
        assert score.auc_mean == plain(source, data)


@pytest.mark.parametrize(
    "body",
    [
        "from sklearn.model_selection import GridSearchCV as G\nG(T(), GRID).fit(x_train, y_train)",
        "import sklearn.model_selection as m\nm.RandomizedSearchCV(T(), GRID).fit(x_train, y_train)",
        "from sklearn.experimental import enable_halving_search_cv\nfrom sklearn.model_selection import "
        "HalvingGridSearchCV as H\nH(T(), GRID).fit(x_train, y_train)",
        "import importlib, sklearn.model_selection._search as s\n"
        "importlib.reload(s).GridSearchCV(T(), GRID).fit(x_train, y_train)",
        "from sklearn.model_selection import validation_curve as v\n"
        "v(T(), x_train, y_train, param_name='max_depth', param_range=[1, 2])",
        "from sklearn.model_selection import cross_val_score as c\n"
        "f = lambda d: c(T(max_depth=d), x_train, y_train).mean()\nbest = max((1, 2), key=f)",
        "from sklearn.model_selection import cross_validate as c\n"
        "from sklearn.pipeline import make_pipeline as p\n"
        "for d in (1, 2): c(p(T(max_depth=d)), x_train, y_train)",
    ],
    ids=["grid", "random", "halving", "reloaded", "curve", "cross-validation", "pipelines"],
)
def test_a_search_is_refused_when_it_is_fitted(sandbox, small, body):
    arrays = SplitArrays(small.x[:30], small.y[:30], small.x[30:])
    source = program(
        "from sklearn.tree import DecisionTreeClassifier as T\nGRID = {'max_depth': [1, 2]}\n" + body
    )
    (result,) = sandbox.run([(source, arrays, 0)])
    assert result.outcome == "refused", result.failure
    assert "is not allowed; choose the hyperparameters and fit one model" in result.failure.message


def test_a_million_frames_end_as_an_error_in_time(sandbox, small):
    arrays = SplitArrays(small.x[:30], small.y[:30], small.x[30:])
    body = "import sys\nsys.setrecursionlimit(10**9)\ndef f(n): return f(n + 1)\nf(0)"
    sandbox.submit(program(body), arrays, 0, timeout_s=20.0)
    _, result = sandbox.wait()
    assert result.outcome in ("error", "memory"), result.failure
    assert math.isfinite(result.wall_s)


def test_the_validation_half_is_not_behind_the_training_half(sandbox, small):
    arrays = SplitArrays(small.x[:30], small.y[:30], small.x[30:])
    body = "a = x_train\nwhile getattr(a, 'base', None) is not None: a = a.base\nprint(len(a))"
    (result,) = sandbox.run([(program(body), arrays, 0)])
    assert int(result.stdout) == 30 * 2 * 8
