"""What the machine can do at most, measured beside the kernels: bare matrix products, a copy of memory."""

import time

import torch
from torch import Tensor

from etpo.bench.kernels.cases import Case, Inputs

# Logits of the bare products go to a buffer of this many rows, over and over.
CHUNK_ROWS = 1024
COPY_BYTES = 1 << 28
# More than the cache of any GPU holds.
FLUSH_BYTES = 1 << 28


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def flush_cache(device: torch.device) -> None:
    """Empties the cache of a GPU, so that no call finds its inputs in it; a CPU's is smaller than a head."""
    if device.type == "cuda":
        torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device).zero_()


class Products:
    """The fewest matrix products of a case, and nothing else; forward and backward apart."""

    def __init__(self, case: Case, inputs: Inputs) -> None:
        # A CPU has no product of bf16 operands summed in float32: there the products are float32.
        dtype = torch.float32 if case.device.type == "cpu" and case.dtype.itemsize < 4 else case.dtype
        self.streams = case.function.streams
        self.hidden = [t.to(dtype) for t in inputs.hidden]
        self.weight = {s: inputs.weight[s].to(dtype) for s in self.streams}
        learner = case.function.learner
        rows = min(CHUNK_ROWS, case.n_tokens)
        self.logits = self.hidden[0].new_zeros(rows, case.shape.n_vocab)
        self.d_hidden = torch.zeros_like(self.hidden[learner])
        self.d_weight = torch.zeros_like(self.weight[learner]) if case.trained else None
        self.learner = learner

    def forward(self) -> None:
        for stream in self.streams:
            for rows, z in self._chunks():
                torch.mm(self.hidden[stream][rows], self.weight[stream].T, out=z)

    def backward(self) -> None:
        for rows, z in self._chunks():
            torch.mm(z, self.weight[self.learner], out=self.d_hidden[rows])
            if self.d_weight is not None:
                self.d_weight.addmm_(z.T, self.hidden[self.learner][rows])

    def _chunks(self) -> list[tuple[slice, Tensor]]:
        n, step = self.hidden[0].shape[0], self.logits.shape[0]
        return [(slice(k, k + step), self.logits[: min(step, n - k)]) for k in range(0, n, step)]


def copy_bytes_per_s(device: torch.device, repeats: int = 5) -> float:
    """Bytes read and written in a second by a copy between two large tensors."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(repeats + 1):
        synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * COPY_BYTES / min(times[1:])


def needed_flops(case: Case) -> int:
    """Floating-point operations of the fewest products of the case."""
    return 2 * sum(case.function.products(case.trained)) * case.n_logits * case.shape.d_model


def needed_bytes(case: Case) -> int:
    """Bytes that must move at least: each input read once, each gradient written once."""
    size, n_streams = case.dtype.itemsize, len(case.function.streams)
    if case.function.from_logits:
        return size * (n_streams + 1) * case.n_logits
    heads = (n_streams + case.trained) * case.shape.n_vocab * case.shape.d_model
    return size * (heads + (n_streams + 1) * case.n_tokens * case.shape.d_model)
