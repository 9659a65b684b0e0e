"""What one sandbox process does once it is confined: run the program, write the result.

Imported by the server before the libraries, which are loaded later (see `warm`); imports nothing of etpo.
"""

from __future__ import annotations

import io
import os
import random
import sys
import traceback
import types
import warnings
from typing import TYPE_CHECKING

from . import memory, wire
from . import syscalls as kernel
from .confine import DATA_FD, RESULT_FD
from .stand_ins import SearchRefused

if TYPE_CHECKING:
    import numpy as np

PROGRAM_NAME = "<program>"
MODULE_NAME = "program"


class _Invalid(Exception):
    """The program ran, but what it returned cannot be read as probabilities."""


class _CutText(io.TextIOBase):
    """A text sink that keeps the first characters and drops the rest, so that a flood costs nothing."""

    def __init__(self, limit: int) -> None:
        self._left = limit
        self._parts: list[str] = []

    def writable(self) -> bool:
        return True

    def write(self, text: str, /) -> int:
        if self._left > 0:
            self._parts.append(text[: self._left])
            self._left -= len(self._parts[-1])
        return len(text)

    def text(self) -> str:
        return "".join(self._parts)


def read_arrays() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x_train [n_train, features] float64, y_train [n_train] int64, x_val [n_val, features] float64."""
    import numpy as np

    # pread: the descriptor's offset is shared with the children that read the same split.
    n_train, n_val, features = wire.ARRAYS.unpack(os.pread(DATA_FD, wire.ARRAYS.size, 0))
    start = wire.ARRAYS.size

    def next_array(dtype: type, *shape: int) -> np.ndarray:
        """An array in memory of its own: what is around the training half is not the validation half."""
        nonlocal start
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        buffer = bytearray(os.pread(DATA_FD, size, start))
        start += size
        return np.frombuffer(buffer, dtype).reshape(shape)

    arrays = (
        next_array(np.float64, n_train, features),
        next_array(np.int64, n_train),
        next_array(np.float64, n_val, features),
    )
    os.close(DATA_FD)
    return arrays


def run(source: str, seed: int) -> None:
    """Run the program on the arrays at `DATA_FD`, write one frame to `RESULT_FD`, end the process."""
    memory.allocate_as_usual()
    own_pid = os.getpid()
    kernel.prctl(kernel.PR_SET_NAME, b"etpo-split")
    out = _CutText(wire.MAX_STDOUT_BYTES)
    sys.stdout = sys.stderr = out
    code = 0
    try:
        frame = _outcome(source, seed, out)
    except MemoryError:
        frame, code = b"", wire.EXIT_NO_MEMORY
    if os.getpid() != own_pid:  # a process that the program forked came back from build_model
        os._exit(0)
    view = memoryview(frame)
    try:
        while view:
            view = view[os.write(RESULT_FD, view) :]
    except OSError:
        code = 1
    os._exit(code)


def _outcome(source: str, seed: int, out: _CutText) -> bytes:
    import numpy as np

    empty = np.empty((0, 0))
    try:
        proba, precision = _probabilities(source, seed)
    except MemoryError:
        return _frame(wire.MEMORY, empty, out)
    except SearchRefused as refused:
        return _frame(wire.REFUSED, empty, out, "refused", str(refused), _program_line(refused))
    except _Invalid as invalid:
        return _frame(wire.INVALID_OUTPUT, empty, out, "invalid output", str(invalid))
    except BaseException as exception:  # SystemExit and KeyboardInterrupt are the program's own doing here
        kind, message = type(exception).__name__, _message(exception)
        return _frame(wire.ERROR, empty, out, kind, message, _program_line(exception))
    return _frame(wire.OK, proba, out, precision=precision)


def _probabilities(source: str, seed: int) -> tuple[np.ndarray, float]:
    """The probabilities as float64, and the precision (the spacing at 1) of the numbers that came."""
    import joblib
    import numpy as np

    x_train, y_train, x_val = read_arrays()
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - what random_state=None in scikit-learn reads
    warnings.simplefilter("ignore")
    # As an import would do it: dataclasses, pickle and sys.modules[__name__] look the module up.
    module = types.ModuleType(MODULE_NAME)
    sys.modules[MODULE_NAME] = module
    space = module.__dict__
    # Sequential: a worker process could not import anything after the user change, and costs more than a fit.
    with joblib.parallel_config(backend="sequential"), np.errstate(all="ignore"):
        exec(compile(source, PROGRAM_NAME, "exec", dont_inherit=True), space)
        model = space["build_model"](x_train, y_train)
        if model is None:
            raise TypeError("build_model returned None; it must return the fitted classifier")
        if not hasattr(model, "predict_proba"):
            raise AttributeError(
                f"{type(model).__name__} has no predict_proba; return a classifier that has it"
            )
        returned = model.predict_proba(x_val)
    try:
        proba = np.ascontiguousarray(returned, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise _Invalid("predict_proba did not return an array of numbers") from error
    if proba.ndim != 2:
        raise _Invalid(f"predict_proba returned {proba.ndim} dimensions, expected 2 (rows, classes)")
    return proba, _precision(returned)


def _precision(returned: object) -> float:
    import numpy as np

    dtype = getattr(returned, "dtype", None)
    is_float = isinstance(dtype, np.dtype) and dtype.kind == "f"
    return float(np.finfo(dtype).eps) if is_float else float(np.finfo(np.float64).eps)


def _frame(
    outcome: int,
    proba: np.ndarray,
    out: _CutText,
    kind: str = "",
    message: str = "",
    line: int = 0,
    precision: float = 0.0,
) -> bytes:
    texts = [
        text.encode("utf-8", "replace")[:limit]
        for text, limit in (
            (kind, wire.MAX_KIND_BYTES),
            (message, wire.MAX_MESSAGE_BYTES),
            (out.text(), wire.MAX_STDOUT_BYTES),
        )
    ]
    sizes = (*proba.shape, *(len(text) for text in texts))
    return wire.FRAME.pack(wire.MAGIC, outcome, line, precision, *sizes) + proba.tobytes() + b"".join(texts)


def _message(exception: BaseException) -> str:
    if isinstance(exception, SyntaxError):
        return str(exception.msg)
    try:
        return str(exception)
    except BaseException:
        return ""


def _program_line(exception: BaseException) -> int:
    """The line of the program's source where the exception came from, 0 where there is none."""
    if isinstance(exception, SyntaxError) and exception.filename == PROGRAM_NAME:
        return exception.lineno or 0
    line = 0
    for frame, frame_line in traceback.walk_tb(exception.__traceback__):
        if frame.f_code.co_filename == PROGRAM_NAME:
            line = frame_line
    return line
