"""Logits at given tokens, K of them to a row: products at those tokens alone, then the rest of a head."""

import torch
from torch import Tensor

from etpo.kernels.backends import Backend
from etpo.kernels.checks import no_autocast, problem_of
from etpo.kernels.plan import Q
from etpo.kernels.shards import local_tokens, sum_over_ranks
from etpo.kernels.streams import Problem, Source


def one_target_a_row(problem: Problem) -> tuple[Problem, Tensor | None]:
    """A problem with targets [N·K] as the sweeps take it, and those targets; None where it takes them."""
    tokens = problem.targets
    if tokens is None or (tokens.shape[0] == problem.n_rows and problem.shard is None):
        return problem, None
    n_targets = max(1, tokens.shape[0] // max(1, problem.n_rows))
    real = (tokens != problem.ignore_index).reshape(problem.n_rows, n_targets).any(1)
    return problem._replace(targets=torch.where(real, 0, problem.ignore_index)), tokens


def at_tokens(run: Backend, source: Source, tokens: Tensor, problem: Problem) -> Tensor:
    """The logits of one source at `tokens` [N·K], [N·K]; 0 where they are ignored."""

    def gather(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        one = {Q: Source(hidden, weight, bias)}
        return run.gather(problem_of(one, tokens, (1.0, 1.0), problem.ignore_index))

    if problem.shard is not None:
        tokens = local_tokens(tokens, problem.shard, problem.n_vocab, problem.ignore_index)
    ignored = tokens == problem.ignore_index
    if source.weight is None:
        columns = tokens.masked_fill(ignored, 0).reshape(problem.n_rows, -1)
        z = source.hidden.gather(1, columns).reshape(-1).to(problem.dtype)
    else:
        z = gather(source.hidden, source.weight, source.bias)
    if source.lora is not None:
        a, b, scale = source.lora
        with no_autocast(problem.device):
            low = source.hidden.to(problem.dtype) @ a.to(problem.dtype).T
        z = z + scale * gather(low, b, None)
    if source.softcap is not None:
        z = torch.where(torch.isneginf(z), z, source.softcap * torch.tanh(z / source.softcap))
    z = (z / source.temperature).masked_fill(ignored, 0.0).to(problem.dtype)
    return z if problem.shard is None else sum_over_ranks(z, problem.shard).to(problem.dtype)
