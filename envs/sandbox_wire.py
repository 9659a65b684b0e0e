"""The bytes between the trainer, the sandbox server and a child. Standard library only.

All three sides read this file, the server and the child by path, so it imports nothing of etpo. Nothing that
crosses a boundary is pickled: fixed headers, raw arrays, UTF-8 text.
"""

import struct

# trainer -> server, one datagram a job: job number, seed, wall-clock limit (s); then the source, UTF-8.
# Two descriptors ride along: the split's arrays (sealed memory) and the write end of the result pipe.
REQUEST = struct.Struct("<QId")

# server -> trainer, one datagram a finished job: job number, how it ended (below), exit code or signal,
# seconds of wall-clock. A report with job number `READY` says that the server has finished its imports.
REPORT = struct.Struct("<QBid")
READY = 2**64 - 1
EXITED, SIGNALLED, TIMED_OUT = range(3)

# The sealed memory: rows of the training half, rows of the validation half, features; then x_train (float64),
# y_train (int64), x_val (float64), all row-major.
ARRAYS = struct.Struct("<QQQ")

# child -> trainer through the result pipe: magic, outcome (index into OUTCOMES), line (0: none), rows and
# columns of the probabilities, bytes of the exception's kind, of its message, of the standard output; then
# the probabilities (float64, row-major) and the three texts (UTF-8).
FRAME = struct.Struct("<4sBIIIIII")
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
