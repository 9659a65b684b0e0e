"""The plain backend: every logit materialised, derivatives by autograd. The oracle of the other backends."""

import torch
from torch import Tensor

from etpo.kernels.streams import KL_FIELDS, LOG_RATIO_FIELDS, Problem, Source, kl_of, log_ratio_of


def source_logits(source: Source) -> Tensor:
    """Logits z [N, V] of a source in float32 (float64 for float64 inputs)."""
    dtype = torch.float64 if source.hidden.dtype == torch.float64 else torch.float32
    # Autocast would take the products back to its own dtype.
    with torch.autocast(source.hidden.device.type, enabled=False):
        hidden = source.hidden.to(dtype)
        z = hidden if source.weight is None else hidden @ source.weight.to(dtype).T
        if source.lora is not None:
            a, b, scale = source.lora
            z = z + scale * ((hidden @ a.to(dtype).T) @ b.to(dtype).T)
        if source.bias is not None:
            z = z + source.bias.to(dtype)
    if source.softcap is not None:
        z = source.softcap * torch.tanh(z / source.softcap)
    return z / source.temperature


def sweep(problem: Problem, fields: tuple[str, ...], *, in_place: bool = False) -> dict[str, Tensor]:
    """The named statistics of `problem`, each [N]. in_place allows what this backend does not use."""
    ignored = None if problem.targets is None else problem.targets == problem.ignore_index
    logits: list[Tensor | None] = []
    for source in problem.sources:
        if source is None:
            logits.append(None)
        elif ignored is None:
            logits.append(source_logits(source))
        else:
            # Not even a NaN of an ignored row may reach the gradient of the head: 0 · NaN is NaN.
            source = source._replace(hidden=source.hidden.masked_fill(ignored[:, None], 0.0))
            logits.append(source_logits(source).masked_fill(ignored[:, None], 0.0))
    tokens = None if problem.targets is None or ignored is None else problem.targets.masked_fill(ignored, 0)
    stats = {field: _statistic(field, logits, tokens, problem.mix) for field in fields}
    if ignored is None:
        return stats
    return {field: value.masked_fill(ignored, 0.0) for field, value in stats.items()}


def kl(problem: Problem, *, in_place: bool = False) -> Tensor:
    """KL(softmax z_p ‖ softmax u), [N]."""
    return kl_of(sweep(problem, KL_FIELDS))


def log_ratio(problem: Problem, *, in_place: bool = False) -> Tensor:
    """lse u − lse z_r, [N]."""
    return log_ratio_of(sweep(problem, LOG_RATIO_FIELDS))


def gather(problem: Problem) -> Tensor:
    """z_q at the targets, [N]."""
    return sweep(problem, ("at_q",))["at_q"]


def _statistic(
    field: str, logits: list[Tensor | None], tokens: Tensor | None, mix: tuple[float, float]
) -> Tensor:
    z_p, z_q, z_r = logits
    name, stream = field.split("_")
    if field == "e_pp":
        assert z_p is not None
        return _expectation(z_p, z_p - torch.logsumexp(z_p, dim=-1, keepdim=True))
    z = _mixed(z_q, z_r, mix) if stream[-1] == "u" else {"p": z_p, "q": z_q, "r": z_r}[stream[-1]]
    assert z is not None
    if name == "lse":
        return torch.logsumexp(z, dim=-1)
    if name == "at":
        assert tokens is not None
        return z.gather(1, tokens[:, None])[:, 0]
    assert z_p is not None
    return _expectation(z_p, z if field == "e_q" else z_p - z)


def _expectation(z_p: Tensor, contrast: Tensor) -> Tensor:
    """E_p[contrast], [N], with 0 · ∞ = 0; an infinite result has the gradient of its finite terms."""
    p = torch.softmax(z_p, dim=-1)
    contrast = contrast.masked_fill(p == 0, 0.0)
    infinite = torch.isinf(contrast)
    jump = contrast.detach().masked_fill(~infinite, 0.0).sum(-1)
    return (p * contrast.masked_fill(infinite, 0.0)).sum(-1) + jump


def _mixed(z_q: Tensor | None, z_r: Tensor | None, mix: tuple[float, float]) -> Tensor:
    """u = a·z_r + b·z_q; a coefficient of 0 drops its stream, infinities included."""
    terms = [c * z for c, z in zip(mix, (z_r, z_q), strict=True) if c != 0 and z is not None]
    return terms[0] if len(terms) == 1 else terms[0] + terms[1]
