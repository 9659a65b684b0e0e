"""The plain backend: every logit materialised, derivatives by autograd. The oracle of the other backends."""

import torch
from torch import Tensor

from etpo.kernels.checks import no_autocast
from etpo.kernels.plan import P, Q, R
from etpo.kernels.streams import Problem, Source

STREAMS = {"p": P, "q": Q, "r": R}


def source_logits(source: Source) -> Tensor:
    """Logits z [N, V] of a source in float32 (float64 for float64 inputs)."""
    dtype = torch.float64 if source.hidden.dtype == torch.float64 else torch.float32
    with no_autocast(source.hidden.device):
        hidden = source.hidden.to(dtype)
        z = hidden if source.weight is None else hidden @ source.weight.to(dtype).T
        if source.lora is not None:
            a, b, scale = source.lora
            z = z + scale * ((hidden @ a.to(dtype).T) @ b.to(dtype).T)
        if source.bias is not None:
            z = z + source.bias.to(dtype)
    if source.softcap is not None:
        # What is masked stays so.
        z = torch.where(torch.isneginf(z), z, source.softcap * torch.tanh(z / source.softcap))
    return z / source.temperature


def sweep(problem: Problem, fields: tuple[str, ...], *, in_place: bool = False) -> list[Tensor]:
    """The named statistics of `problem`, each [N]. in_place allows what this backend does not use."""
    ignored = None if problem.targets is None else problem.targets == problem.ignore_index
    planes: dict[int, Tensor] = {}
    for k, source in problem.streams.items():
        if ignored is not None:
            # Not even a NaN of an ignored row may reach the gradient of the head: 0 · NaN is NaN.
            source = source._replace(hidden=source.hidden.masked_fill(ignored[:, None], 0.0))
        z = source_logits(source)
        planes[k] = z if ignored is None else z.masked_fill(ignored[:, None], 0.0)
    empty: dict[int, Tensor] = {}
    if problem.shard is not None:
        # Where this shard masks all its tokens, other shards say what a row is; plain autograd would have
        # 0 · NaN of it.
        empty = {k: torch.isneginf(z).all(-1) for k, z in planes.items()}
        planes = {k: z.masked_fill(empty[k][:, None], 0.0) for k, z in planes.items()}
    tokens = None if problem.targets is None or ignored is None else problem.targets.masked_fill(ignored, 0)
    stats = [
        _without_empty(field, _statistic(field, planes, tokens, problem.mix), empty, problem.mixed)
        for field in fields
    ]
    return stats if ignored is None else [value.masked_fill(ignored, 0.0) for value in stats]


def _without_empty(field: str, value: Tensor, empty: dict[int, Tensor], mixed: frozenset[int]) -> Tensor:
    """A statistic where rows of a plane hold nothing but −inf; `empty` says where, by stream."""
    name, stream = field.split("_")
    if not empty or name == "at" or stream == "pp":
        return value.masked_fill(empty[P], float("nan")) if empty and stream == "pp" else value
    others = mixed if stream[-1] == "u" else {STREAMS[stream[-1]]}
    for k in others:
        infinity = float("-inf") if name == "lse" or field == "e_q" else float("inf")
        value = value.masked_fill(empty[k], infinity)
    return value if name == "lse" else value.masked_fill(empty[P], float("nan"))


def gather(problem: Problem) -> Tensor:
    """z_q at the targets [N·K], K to a row."""
    assert problem.targets is not None
    ignored = problem.targets == problem.ignore_index
    n_targets = max(1, problem.targets.shape[0] // max(1, problem.n_rows))
    tokens = problem.targets.masked_fill(ignored, 0).reshape(problem.n_rows, n_targets)
    dead = ignored.reshape(tokens.shape).all(1, keepdim=True)
    source = problem.streams[Q]
    z = source_logits(source._replace(hidden=source.hidden.masked_fill(dead, 0.0)))
    return z.gather(1, tokens).reshape(-1).masked_fill(ignored, 0.0)


def _statistic(
    field: str, planes: dict[int, Tensor], tokens: Tensor | None, mix: tuple[float, float]
) -> Tensor:
    name, stream = field.split("_")
    if field == "e_pp":
        z_p = planes[P]
        return _expectation(z_p, z_p - torch.logsumexp(z_p, dim=-1, keepdim=True))
    z = _mixed(planes, mix) if stream[-1] == "u" else planes[STREAMS[stream[-1]]]
    if name == "lse":
        return torch.logsumexp(z, dim=-1)
    if name == "at" and tokens is not None:
        return z.gather(1, tokens[:, None])[:, 0]
    return _expectation(planes[P], z if field == "e_q" else planes[P] - z)


def _expectation(z_p: Tensor, contrast: Tensor) -> Tensor:
    """E_p[contrast], [N], with 0 · ∞ = 0; an infinite result has the gradient of its finite terms."""
    p = torch.softmax(z_p, dim=-1)
    contrast = contrast.masked_fill(p == 0, 0.0)
    infinite = torch.isinf(contrast)
    jump = contrast.detach().masked_fill(~infinite, 0.0).sum(-1)
    return (p * contrast.masked_fill(infinite, 0.0)).sum(-1) + jump


def _mixed(planes: dict[int, Tensor], mix: tuple[float, float]) -> Tensor:
    """u = a·z_r + b·z_q; a coefficient of 0 drops its stream, infinities included."""
    terms = [c * planes[k] for c, k in zip(mix, (R, Q), strict=True) if c != 0]
    return terms[0] if len(terms) == 1 else terms[0] + terms[1]
