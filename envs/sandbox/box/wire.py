"""The bytes between the trainer, the sandbox server and a child. Standard library only.

All three sides read this file, the server and the child by path, so it imports nothing of etpo. Nothing that
crosses a boundary is pickled: fixed headers, raw arrays, UTF-8 text.
"""

import struct

# trainer -> server, one datagram a job: job number, seed, limit of processor time (s); then the source, in
# UTF-8. Two descriptors ride along: the split's arrays (sealed memory) and the write end of the result pipe.
REQUEST = struct.Struct("<QId")

# server -> trainer, one datagram a finished job: job number, how it ended (below), exit code or signal,
# seconds of wall-clock. A report with job number `READY` says that the server has finished its imports;
# behind it stand the layers as JSON: {"in_force": {layer: what holds}, "missing": {layer: why not}}.
REPORT = struct.Struct("<QBid")
READY = 2**64 - 1
EXITED, SIGNALLED, TIMED_OUT, OUT_OF_MEMORY, TOO_MANY_PROCESSES = range(5)
WALL_CEILING = 2  # the limit is of processor time; of wall-clock time a split has so many times as much
MAX_REPORT_BYTES = 16_384

LIMITS, NO_NEW_PRIVILEGES, OWN_USER = "resource limits", "no new privileges", "own user id"
PROCESS_NAMESPACE, MOUNT_NAMESPACE = "process namespace", "mount namespace"
NETWORK_NAMESPACE, LANDLOCK, SECCOMP = "network namespace", "Landlock", "seccomp filter"
LAYERS = (
    LIMITS, NO_NEW_PRIVILEGES, OWN_USER, PROCESS_NAMESPACE, MOUNT_NAMESPACE, NETWORK_NAMESPACE, LANDLOCK,
    SECCOMP,
)  # fmt: skip

# The sealed memory: rows of the training half, rows of the validation half, features; then x_train (float64),
# y_train (int64), x_val (float64), all row-major.
ARRAYS = struct.Struct("<QQQ")

# child -> trainer through the result pipe: magic, outcome (index into OUTCOMES), line (0: none), spacing at 1
# of the numbers that the program returned, rows and columns of the probabilities, bytes of the exception's
# kind, of its message, of the standard output; then the probabilities (float64, row-major) and the three
# texts (UTF-8).
FRAME = struct.Struct("<4sBIdIIIII")
MAGIC = b"etpo"
OUTCOMES = ("ok", "error", "timeout", "memory", "refused", "invalid_output", "crashed")
OK, ERROR, TIMEOUT, MEMORY, REFUSED, INVALID_OUTPUT, CRASHED = range(7)

MAX_SOURCE_BYTES = 65_536
MAX_KIND_BYTES = 256
MAX_MESSAGE_BYTES = 4_096
MAX_STDOUT_BYTES = 4_096
MAX_TEXT_BYTES = MAX_KIND_BYTES + MAX_MESSAGE_BYTES + MAX_STDOUT_BYTES

# A child that has too little memory left to say so ends with this code.
EXIT_NO_MEMORY = 77
