"""`multiprocessing.Pool` without processes: each call runs at once, in the program's own.

Standard library only.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any


class Result:
    """What `apply_async` and its like return: a result, or what was raised."""

    def __init__(self, work: Callable[[], Any], callback: Any, error_callback: Any) -> None:
        self._value: Any = None
        self._error: Exception | None = None
        try:
            self._value = work()
        except Exception as error:
            self._error = error
        told = callback if self._error is None else error_callback
        if told is not None:
            told(self._value if self._error is None else self._error)

    def get(self, timeout: float | None = None) -> Any:
        if self._error is not None:
            raise self._error
        return self._value

    def wait(self, timeout: float | None = None) -> None:
        """It has ended."""

    def ready(self) -> bool:
        return True

    def successful(self) -> bool:
        return self._error is None


class Pool:
    """The methods of `multiprocessing.pool.Pool`; see there."""

    def __init__(
        self,
        processes: int | None = None,
        initializer: Callable[..., object] | None = None,
        initargs: Iterable[Any] = (),
        maxtasksperchild: int | None = None,
        context: object = None,
    ) -> None:
        if processes is not None and processes < 1:
            raise ValueError("Number of processes must be at least 1")
        self._is_open = True
        if initializer is not None:
            initializer(*initargs)

    def apply(self, func: Callable[..., Any], args: Any = (), kwds: Any = None) -> Any:
        self._check()
        return func(*args, **(kwds or {}))

    def map(
        self, func: Callable[[Any], Any], iterable: Iterable[Any], chunksize: int | None = None
    ) -> list[Any]:
        return list(self.imap(func, iterable))

    def starmap(
        self, func: Callable[..., Any], iterable: Iterable[Any], chunksize: int | None = None
    ) -> list[Any]:
        return self.map(lambda arguments: func(*arguments), iterable)

    def imap(self, func: Callable[[Any], Any], iterable: Iterable[Any], chunksize: int = 1) -> Iterator[Any]:
        self._check()
        return iter([func(item) for item in iterable])

    imap_unordered = imap

    def apply_async(
        self, func: Any, args: Any = (), kwds: Any = None, callback: Any = None, error_callback: Any = None
    ) -> Result:
        return Result(lambda: self.apply(func, args, kwds), callback, error_callback)

    def map_async(
        self,
        func: Any,
        iterable: Any,
        chunksize: Any = None,
        callback: Any = None,
        error_callback: Any = None,
    ) -> Result:
        return Result(lambda: self.map(func, iterable), callback, error_callback)

    def starmap_async(
        self,
        func: Any,
        iterable: Any,
        chunksize: Any = None,
        callback: Any = None,
        error_callback: Any = None,
    ) -> Result:
        return Result(lambda: self.starmap(func, iterable), callback, error_callback)

    def close(self) -> None:
        self._is_open = False

    terminate = close

    def join(self) -> None:
        if self._is_open:
            raise ValueError("Pool is still running")

    def __enter__(self) -> "Pool":
        self._check()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _check(self) -> None:
        if not self._is_open:
            raise ValueError("Pool not running")
