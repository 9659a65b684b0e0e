"""Token chunks, each recomputed in backward."""

import torch
from etpo.kernels import reference
from etpo.kernels.streams import Problem
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_LOGITS = 1 << 22


def sweep(problem: Problem, fields: tuple[str, ...]) -> dict[str, Tensor]:
    """The named statistics of `problem`, each [N]."""
    first = next(stream for stream in problem.streams if stream is not None)
    n_rows, n_vocab = first.hidden.shape[0], first.weight.shape[0]
    step = max(1, CHUNK_LOGITS // n_vocab)
    parts: list[dict[str, Tensor]] = []
    for start in range(0, max(n_rows, 1), step):
        rows = slice(start, start + step)
        p, q, r = (None if s is None else s._replace(hidden=s.hidden[rows]) for s in problem.streams)
        targets = None if problem.targets is None else problem.targets[rows]
        part = problem._replace(policy=p, critic=q, reference=r, targets=targets)
        parts.append(checkpoint(reference.sweep, part, fields, use_reentrant=False))
    return {name: torch.cat([part[name] for part in parts]) for name in fields}
