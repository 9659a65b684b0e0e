"""The `etpo` command, one file a subcommand."""

import os

# Threads that wait by spinning slow down a machine that others use too; read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
