"""The plain backend: every logit materialised, derivatives by autograd. The oracle of the other backends."""

import torch
from etpo.kernels.streams import Problem, Source
from torch import Tensor


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


def sweep(problem: Problem, fields: tuple[str, ...]) -> dict[str, Tensor]:
    """The named statistics of `problem`, each [N]."""
    ignored = None if problem.targets is None else problem.targets == problem.ignore_index
    logits: list[Tensor | None] = []
    for source in problem.sources:
        if source is None:
            logits.append(None)
            continue
        if ignored is not None:
            # Not even a NaN of an ignored row may reach the gradient of the head: 0 · NaN is NaN.
            source = source._replace(hidden=source.hidden.masked_fill(ignored[:, None], 0.0))
        logits.append(source_logits(source))
    return logit_statistics(logits, problem.targets, problem.mix, problem.ignore_index, fields)


def logit_statistics(
    logits: list[Tensor | None],
    targets: Tensor | None,
    mix: tuple[float, float],
    ignore_index: int,
    fields: tuple[str, ...],
) -> dict[str, Tensor]:
    """The named statistics, each [N], of the logits of policy, critic and reference, each [N, V] or None."""
    ignored = None if targets is None else targets == ignore_index
    if ignored is not None:
        logits = [None if z is None else z.masked_fill(ignored[:, None], 0.0) for z in logits]
    z_p, z_q, z_r = logits
    tokens = None if targets is None else torch.where(targets == ignore_index, 0, targets)[:, None]
    u = _mixed(z_q, z_r, mix) if {"lse_u", "e_pu"} & set(fields) else None
    named = {"lse_p": z_p, "lse_q": z_q, "lse_r": z_r, "lse_u": u, "at_p": z_p, "at_q": z_q, "at_r": z_r}

    def expectation(contrast: Tensor) -> Tensor:
        assert z_p is not None
        p = torch.softmax(z_p, dim=-1)
        return (p * contrast.masked_fill(p == 0, 0.0)).sum(-1)

    out: dict[str, Tensor] = {}
    for field in fields:
        z = named.get(field)
        if field.startswith("lse_"):
            assert z is not None
            value = torch.logsumexp(z, dim=-1)
        elif field.startswith("at_"):
            assert z is not None
            assert tokens is not None
            value = z.gather(1, tokens)[:, 0]
        elif field == "e_q":
            assert z_q is not None
            value = expectation(z_q)
        else:
            assert z_p is not None
            other = {"e_pr": z_r, "e_pu": u, "e_pp": torch.logsumexp(z_p, dim=-1, keepdim=True)}[field]
            assert other is not None
            value = expectation(z_p - other)
        out[field] = value if ignored is None else value.masked_fill(ignored, 0.0)
    return out


def _mixed(z_q: Tensor | None, z_r: Tensor | None, mix: tuple[float, float]) -> Tensor:
    """u = a·z_r + b·z_q; a coefficient of 0 drops its source, infinities included."""
    terms = [c * z for c, z in zip(mix, (z_r, z_q), strict=True) if c != 0 and z is not None]
    return terms[0] if len(terms) == 1 else terms[0] + terms[1]
