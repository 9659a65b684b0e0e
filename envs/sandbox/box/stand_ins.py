"""What programs find in place of parts of the libraries: put in once, in the warm server.

Search over hyperparameters raises, wherever a program has it from. Worker processes are threads, or the
program's own process: what the libraries would start could import nothing, and needs pipes, which there are
none of (their numbers would tell one split how many another has made).
"""

import contextlib
from collections.abc import Callable
from typing import Any

from .pool import Pool


class SearchRefused(Exception):
    """Raised by the `fit` of a search estimator, and by cross-validation that compares hyperparameters."""


def put_in() -> None:
    """Replace all that is to be replaced."""
    refuse_search_estimators()
    refuse_compared_hyperparameters()
    use_threads_for_processes()
    run_joblib_here()


def refuse_search_estimators() -> None:
    """Make `fit` of GridSearchCV and its like raise."""
    from sklearn.base import BaseEstimator
    from sklearn.model_selection import _search, _search_successive_halving

    def fit(self: Any, *args: Any, **kwargs: Any) -> None:
        raise SearchRefused(not_allowed(type(self).__name__))

    setattr(_search.BaseSearchCV, "fit", fit)  # noqa: B010 - typed as a method
    setattr(_search_successive_halving.BaseSuccessiveHalving, "fit", fit)  # noqa: B010

    before = BaseEstimator.__init_subclass__

    def init_subclass(cls: type, /, **kwargs: Any) -> None:
        before.__func__(cls, **kwargs)
        if hasattr(cls, "_run_search"):  # made later, as when the module is loaded once more
            setattr(cls, "fit", fit)  # noqa: B010

    setattr(BaseEstimator, "__init_subclass__", classmethod(init_subclass))  # noqa: B010


def refuse_compared_hyperparameters() -> None:
    """Make scikit-learn's cross-validation raise when it is given one kind of model a second time with other
    hyperparameters. A report on one model, or on models of several kinds, is none of this."""
    import sklearn.model_selection as ms
    from sklearn.model_selection import _validation

    seen: dict[str, str] = {}

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(estimator: Any, *args: Any, **kwargs: Any) -> Any:
            kind, settings = _kind_and_settings(estimator)
            if seen.setdefault(kind, settings) != settings:
                raise SearchRefused(not_allowed(f"{function.__name__} of several hyperparameters"))
            return function(estimator, *args, **kwargs)

        call.__name__, call.__doc__ = function.__name__, function.__doc__
        return call

    for name in ("cross_val_score", "cross_val_predict", "cross_validate"):
        wrapped = watched(getattr(_validation, name))
        setattr(ms, name, wrapped)
        if name != "cross_validate":  # which cross_val_score calls itself
            setattr(_validation, name, wrapped)

    def validation_curve(*args: Any, **kwargs: Any) -> None:
        raise SearchRefused(not_allowed("validation_curve"))

    ms.validation_curve = _validation.validation_curve = validation_curve


def not_allowed(what: str) -> str:
    return f"{what} is not allowed; choose the hyperparameters and fit one model"


def _kind_and_settings(estimator: Any) -> tuple[str, str]:
    """The classes that an estimator is made of, and all other parameters, each as text."""
    try:
        parameters = sorted(estimator.get_params().items())
    except Exception:  # no estimator of scikit-learn's kind: its class alone counts
        return str(type(estimator)), ""
    kinds = [type(estimator).__name__]
    settings = []
    for name, value in parameters:
        if hasattr(value, "get_params") and not isinstance(value, type):
            kinds.append(f"{name}={type(value).__name__}")
        elif not _holds_estimators(value):
            settings.append(f"{name}={value!r}")
    return " ".join(kinds), " ".join(settings)


def _holds_estimators(value: Any) -> bool:
    """True for the steps of a pipeline and the like, whose parameters are listed one by one besides."""
    if not isinstance(value, list | tuple):
        return False
    return any(
        hasattr(part, "get_params")
        for item in value
        for part in (item if isinstance(item, tuple) else [item])
    )


def use_threads_for_processes() -> None:
    """Let `multiprocessing` and `ProcessPoolExecutor` work with threads."""
    import concurrent.futures
    import concurrent.futures.process
    import multiprocessing
    import multiprocessing.dummy
    import multiprocessing.pool

    threads = multiprocessing.dummy
    names = (
        "Process", "Queue", "JoinableQueue", "Manager", "Lock", "RLock", "Semaphore", "Event",
        "BoundedSemaphore", "Condition", "Barrier", "Array", "Value", "Pipe", "active_children",
        "current_process", "freeze_support",
    )  # fmt: skip
    for name in names:
        setattr(multiprocessing, name, getattr(threads, name))
    context: Any = threads
    context.SimpleQueue = threads.Queue
    setattr(multiprocessing, "SimpleQueue", threads.Queue)  # noqa: B010 - typed as a class of its own
    context.cpu_count = multiprocessing.cpu_count = lambda: 1
    context.get_context = multiprocessing.get_context = lambda method=None: context
    context.get_start_method = multiprocessing.get_start_method = lambda allow_none=False: "fork"
    context.set_start_method = multiprocessing.set_start_method = lambda *args, **kwargs: None
    context.Pool = Pool
    setattr(multiprocessing, "Pool", Pool)  # noqa: B010 - typed as a function
    multiprocessing.pool.Pool = multiprocessing.pool.ThreadPool = Pool  # type: ignore[misc, assignment]

    class ProcessPoolExecutor(concurrent.futures.ThreadPoolExecutor):
        """Threads, with the arguments of processes."""

        def __init__(
            self, max_workers: int | None = None, mp_context: object = None,
            initializer: Callable[..., object] | None = None, initargs: tuple[Any, ...] = (), **kwargs: Any,
        ) -> None:  # fmt: skip
            super().__init__(max_workers, "", initializer, initargs)

    concurrent.futures.ProcessPoolExecutor = ProcessPoolExecutor  # type: ignore[misc, assignment]
    concurrent.futures.process.ProcessPoolExecutor = ProcessPoolExecutor  # type: ignore[misc, assignment]


def run_joblib_here() -> None:
    """Let every back end of joblib that would start processes run one job after another in the program's."""
    from joblib import parallel

    class Here(parallel.SequentialBackend):  # type: ignore[misc]
        """Sequential, whatever arguments it is made with."""

        def __init__(
            self, nesting_level: int | None = None, inner_max_num_threads: int | None = None, **kwargs: Any
        ) -> None:
            super().__init__(nesting_level=nesting_level)

    for name in ("loky", "multiprocessing"):
        with contextlib.suppress(KeyError):
            parallel.BACKENDS[name] = Here
