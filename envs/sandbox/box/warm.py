"""What the sandbox server does once, so that each of its forks is cheap. Imports nothing of etpo.

A fork of the warm server costs page faults: its page tables are copied, and each page that the child then
writes to (a reference count is enough) is copied too. Measured for a LogisticRegression on 250×9: about 12 ms
of processor time, of which 2 ms are the fit; 22 ms without the steps below.
"""

import contextlib
import ctypes
import gc
import importlib
import pkgutil
import warnings
from collections.abc import Callable, Iterable, Iterator

from . import stand_ins
from .proc import open_proc

MADV_POPULATE_READ, MADV_COLLAPSE = 22, 25
HUGE_PAGE_BYTES = 2 * 2**20

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
    """Import, run a little, and lay the memory out so that forks copy little of it."""
    warnings.simplefilter("ignore")
    import sklearn

    for name in [*MODULES.split(), *_submodules(sklearn.__path__, "sklearn.")]:
        with contextlib.suppress(Exception):  # optional dependencies, such as matplotlib
            importlib.import_module(name)
    _leave_proc_alone()
    _run_a_little()
    stand_ins.put_in()
    _hold_pages()
    gc.collect()
    gc.freeze()  # a collection in a child then leaves all of this alone
    with contextlib.suppress(OSError):
        _use_huge_pages()


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


def _hold_pages() -> None:
    """Bring all pages of the loaded libraries into memory, and lock them there where that is permitted.

    A page that is absent when a program touches it would be there for the next one, which can tell.
    """
    madvise, mlock = _madvise(), ctypes.CDLL(None).mlock
    mlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    for start, end, mode, name in _regions():
        if name.startswith("/") and mode[0] == "r" and mlock(start, end - start) != 0:
            madvise(start, end - start, MADV_POPULATE_READ)


def _madvise() -> Callable[..., int]:
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return madvise


def _regions() -> list[tuple[int, int, str, str]]:
    """Start, end, rights and file of each region of this process's memory."""
    with open_proc("self/maps") as file:
        lines = [line.split(maxsplit=5) for line in file]
    spans = [(line[0].split("-"), line[1], line[5].strip() if len(line) > 5 else "") for line in lines]
    return [(int(start, 16), int(end, 16), mode, name) for (start, end), mode, name in spans]


def _use_huge_pages() -> None:
    """Ask the kernel (6.1 and later; others refuse) to back private memory with 2 MiB pages.

    A fork then copies one entry in place of 512; a page that a child writes to is still copied alone.
    """
    madvise = _madvise()
    for start, end, mode, name in _regions():
        if mode == "rw-p" and name in ("", "[heap]"):
            start = -(-start // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
            for page in range(start, end - HUGE_PAGE_BYTES + 1, HUGE_PAGE_BYTES):
                madvise(page, HUGE_PAGE_BYTES, MADV_COLLAPSE)
