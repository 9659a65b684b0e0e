"""The arrays of one split, as a child of the sandbox gets them: sealed memory that nobody can change."""

import fcntl
import os

import numpy as np

from etpo.envs.sandbox.box import wire


class SplitArrays:
    """The arrays of one split in sealed anonymous memory, for the children that are given its descriptor.

    Args:
        x_train: [n_train, features] float64.
        y_train: [n_train] int64.
        x_val: [n_val, features] float64. There is deliberately no y_val.
    """

    def __init__(self, x_train: np.ndarray, y_train: np.ndarray, x_val: np.ndarray) -> None:
        self.fd = -1
        if x_train.ndim != 2 or x_val.ndim != 2 or y_train.shape != x_train.shape[:1]:
            raise ValueError(
                "expected x_train [n, f], y_train [n], x_val [m, f]; "
                f"got {x_train.shape}, {y_train.shape}, {x_val.shape}"
            )
        self.n_val = x_val.shape[0]
        self.fd = os.memfd_create("split", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        with open(self.fd, "wb", closefd=False) as file:
            file.write(wire.ARRAYS.pack(x_train.shape[0], x_val.shape[0], x_train.shape[1]))
            file.write(np.ascontiguousarray(x_train, np.float64).tobytes())
            file.write(np.ascontiguousarray(y_train, np.int64).tobytes())
            file.write(np.ascontiguousarray(x_val, np.float64).tobytes())
        seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, seals)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __del__(self) -> None:
        self.close()
