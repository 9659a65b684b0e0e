"""The kernels beside their peers: time, memory, error and goals, on a CPU or on a GPU.

`run` is the command `etpo bench kernels`. Imports etpo.kernels and nothing else of etpo but the machine's
description.
"""
