"""What the sandbox server does once, so that each of its forks is cheap. Imports nothing of etpo.

A fork of the warm server costs page faults: its page tables are copied, and each page that the child then
writes to (a reference count is enough) is copied too. Measured for a LogisticRegression on 250×9: about 12 ms
of processor time, of which 2 ms are the fit; 22 ms without the steps below.
"""

import contextlib
import gc
import importlib
import pkgutil
import warnings
from collections.abc import Iterable, Iterator

from . import memory, stand_ins

# What programs import and what scikit-learn imports late. All of it is loaded before the first fork: a child
# that changed its user may be unable to read the interpreter's own files.
MODULES = """
numpy numpy.fft numpy.linalg numpy.ma numpy.polynomial numpy.random numpy.testing scipy.cluster.hierarchy
scipy.fft scipy.integrate scipy.interpolate scipy.linalg scipy.ndimage scipy.optimize scipy.signal
scipy.sparse scipy.sparse.csgraph scipy.sparse.linalg scipy.spatial scipy.spatial.distance scipy.special
scipy.stats pandas pandas.api.types joblib threadpoolctl abc argparse bisect collections.abc
concurrent.futures.process concurrent.futures.thread copy csv ctypes datetime decimal encodings.ascii
encodings.idna encodings.latin_1 enum fractions functools glob hashlib heapq inspect io itertools json
linecache logging math multiprocessing.managers multiprocessing.pool multiprocessing.popen_fork
multiprocessing.shared_memory multiprocessing.synchronize operator os pathlib pickle pprint queue random re
shutil socket statistics string subprocess sys tempfile textwrap threading time timeit traceback types
typing unittest uuid warnings weakref
"""
# Tests, vendored code and what pulls in optional packages (torch among them, with threads of its own).
SKIPPED = {"tests", "conftest", "externals", "_build_utils", "_testing", "_test_common", "estimator_checks"}


def warm_up() -> None:
    """Import, run a little, and have the memory lie so that forks copy little of it."""
    warnings.simplefilter("ignore")
    import sklearn

    for name in [*MODULES.split(), *_submodules(sklearn.__path__, "sklearn.")]:
        with contextlib.suppress(Exception):  # optional dependencies, such as matplotlib
            importlib.import_module(name)
    _leave_proc_alone()
    _run_a_little()
    stand_ins.put_in()
    gc.collect()
    gc.freeze()  # a collection in a child then leaves all of this alone
    memory.settle()


def _submodules(folders: Iterable[str], prefix: str) -> Iterator[str]:
    for module in pkgutil.iter_modules(list(folders), prefix):
        name = module.name.rpartition(".")[2]
        if name not in SKIPPED:
            yield module.name
            if module.ispkg:
                yield from _submodules([f"{folder}/{name}" for folder in folders], module.name + ".")


def _leave_proc_alone() -> None:
    """A program has no /proc: threadpoolctl, which scikit-learn's neighbours call, is to ask the loader."""
    import threadpoolctl

    threadpoolctl._HAS_PROCFS = False  # older releases do not look at it, and ask the loader anyway


def _run_a_little() -> None:
    """Fit what needs no OpenMP region, so that what happens at a first fit has happened before the fork."""
    import numpy as np
    import pandas as pd
    from scipy.optimize import minimize
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.naive_bayes import GaussianNB
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.tree import DecisionTreeClassifier

    x = np.arange(40.0).reshape(20, 2) % 7
    y = np.arange(20) % 2
    for model in (DecisionTreeClassifier(), GaussianNB(), LinearDiscriminantAnalysis()):
        make_pipeline(StandardScaler(), model).fit(x, y).predict_proba(x)
    minimize(lambda w: (float(w @ w), 2 * w), np.ones(3), jac=True, method="L-BFGS-B")
    pd.get_dummies(pd.DataFrame(x).astype(str)).to_numpy()
