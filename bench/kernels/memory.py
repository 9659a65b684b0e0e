"""Memory: the most that a call holds beside its inputs, and how much is free."""

import os
from collections.abc import Callable

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from etpo.bench.kernels.cases import Case


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Most bytes of new tensors that `run` held at a time, as the allocator of the device saw it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        run()
    held = peak = 0
    assert trace.profiler is not None
    events = trace.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def bytes_of(tensors: list[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def free_bytes(device: torch.device) -> int:
    """Memory that a call may take without pressing others out."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    with open("/proc/meminfo") as file:
        fields = dict(line.split(":", 1) for line in file)
    return int(fields["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in fields else _all_pages()


def _all_pages() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def eager_bytes(case: Case, itemsize: int) -> int:
    """About what plain PyTorch holds for forward and backward of `case` in a dtype of `itemsize` bytes.

    Logits of each stream, as many again for softmaxes and contrasts, their gradients, the head's gradient.
    """
    n_planes = 2 * len(case.function.streams) + 3 + (8 if case.function.name == "vocab_stats" else 0)
    head = case.shape.n_vocab * case.shape.d_model if case.trained else 0
    return itemsize * (n_planes * case.n_logits + head)


def inputs_bytes(case: Case, itemsize: int) -> int:
    """Hidden states and heads, or logits."""
    if case.function.from_logits:
        return 3 * itemsize * case.n_logits
    n_streams, (_, v, d) = len(case.function.streams), case.shape
    return itemsize * (n_streams * v * d + 3 * case.n_tokens * d)
