"""The Triton backend, a kernel beside its launcher. Only `sizes` and `operators` load without triton."""
