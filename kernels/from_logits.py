"""The public functions on logits that a trainer already has: one sweep, no log-softmax copy.

With inplace_backward=True the backward may overwrite the logits with their gradient, which saves memory. They
must then serve nothing else whose backward reads them; PyTorch raises a RuntimeError where they do. A leaf is
left as it is.
"""

import torch
from torch import Tensor

from etpo.kernels.backends import Backend, backend_of
from etpo.kernels.streams import Problem, Source, check_index, check_positive, check_targets, check_tensor

# The functions without targets ignore no row.
NO_INDEX = -100


def logprob_from_logits(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(log π(w), entropy of π) at each token, π = softmax(logits / temperature), in nats.

    logits [N, V] or [B, T, V], targets [N] or [B, T]: both results [N] or [B, T], float32 (float64 for
    float64 logits); rows with targets == ignore_index are 0. Raises ValueError for input that does not fit.
    """
    temperature = check_positive("temperature", temperature)
    ignore_index = check_index("ignore_index", ignore_index)
    (policy,), shape = _sources(temperature, logits=logits)
    targets = check_targets(targets, shape, policy.n_vocab, logits.device, ignore_index)
    problem = Problem(policy, None, None, targets, (1.0, 1.0), ignore_index)
    run, in_place = _backend(backend, problem, inplace_backward)
    stats = run.sweep(problem, ("lse_p", "e_pp", "at_p"), in_place=in_place)
    logprob = stats["at_p"] - stats["lse_p"]
    return logprob.to(problem.dtype).reshape(shape), (-stats["e_pp"]).to(problem.dtype).reshape(shape)


def kl_from_logits(
    logits: Tensor,
    ref_logits: Tensor,
    *,
    temperature: float = 1.0,
    inplace_backward: bool = False,
    backend: str = "auto",
) -> Tensor:
    """KL(π ‖ π̄) of π = softmax(logits / temperature), π̄ = softmax(ref_logits / temperature), in nats.

    Both [N, V] or [B, T, V]; the result is [N] or [B, T]. Raises ValueError for input that does not fit.
    """
    temperature = check_positive("temperature", temperature)
    (policy, reference), shape = _sources(temperature, logits=logits, ref_logits=ref_logits)
    problem = Problem(policy, None, reference, None, (1.0, 0.0), NO_INDEX)
    run, in_place = _backend(backend, problem, inplace_backward)
    return run.kl(problem, in_place=in_place).to(problem.dtype).reshape(shape)


def soft_value_from_logits(
    q_logits: Tensor,
    ref_logits: Tensor,
    beta: float,
    *,
    inplace_backward: bool = False,
    backend: str = "auto",
) -> Tensor:
    """V* = β·(lse(ref_logits + q_logits/β) − lse ref_logits), [N] or [B, T], in reward units.

    Raises ValueError for β ≤ 0 or input that does not fit.
    """
    beta = check_positive("beta", beta)
    (critic, reference), shape = _sources(1.0, q_logits=q_logits, ref_logits=ref_logits)
    problem = Problem(None, critic, reference, None, (1.0, 1.0 / beta), NO_INDEX)
    run, in_place = _backend(backend, problem, inplace_backward)
    return (beta * run.log_ratio(problem, in_place=in_place)).to(problem.dtype).reshape(shape)


def soft_policy_kl_from_logits(
    logits: Tensor,
    q_logits: Tensor,
    ref_logits: Tensor,
    beta: float,
    *,
    inplace_backward: bool = False,
    backend: str = "auto",
) -> Tensor:
    """KL(π ‖ π̄·exp(Q/β)/Z) of π = softmax(logits), π̄ = softmax(ref_logits), Q = q_logits, in nats.

    All [N, V] or [B, T, V]; the result is [N] or [B, T]. Raises ValueError for β ≤ 0 or input that does not
    fit.
    """
    beta = check_positive("beta", beta)
    (policy, critic, reference), shape = _sources(
        1.0, logits=logits, q_logits=q_logits, ref_logits=ref_logits
    )
    problem = Problem(policy, critic, reference, None, (1.0, 1.0 / beta), NO_INDEX)
    run, in_place = _backend(backend, problem, inplace_backward)
    return run.kl(problem, in_place=in_place).to(problem.dtype).reshape(shape)


def _sources(temperature: float, **named: Tensor) -> tuple[list[Source], torch.Size]:
    """The named logits as sources [N, V], and the shape of the result."""
    first_name, first = next(iter(named.items()))
    if not isinstance(first, Tensor) or first.dim() not in (2, 3) or first.shape[-1] < 1:
        got = tuple(first.shape) if isinstance(first, Tensor) else type(first).__name__
        raise ValueError(f"{first_name}: expected shape [N, V] or [B, T, V] with V ≥ 1, got {got}")
    for name, tensor in named.items():
        check_tensor(name, tensor, tuple(first.shape), first.device)
        if (tensor.dtype == torch.float64) != (first.dtype == torch.float64):
            raise ValueError(f"{name}: float64 does not mix with {first.dtype}, got {tensor.dtype}")
    flat = [tensor if tensor.dim() == 2 else tensor.reshape(-1, first.shape[-1]) for tensor in named.values()]
    return [Source(tensor, None, temperature=temperature) for tensor in flat], first.shape[:-1]


def _backend(name: str, problem: Problem, inplace_backward: bool) -> tuple[Backend, bool]:
    """The backend, and whether its backward may overwrite the logits.

    It may not where rows or streams share memory, where a leaf stands behind the logits, whose owner would
    find a gradient in its place, nor in a compiled graph, which plans memory itself.
    """
    logits = [source.hidden for source in problem.sources if source is not None]
    in_place = inplace_backward and not torch.compiler.is_compiling()
    if in_place:
        in_place = len({z.untyped_storage().data_ptr() for z in logits}) == len(logits)
        in_place = in_place and all(z.stride(0) >= z.shape[1] and z.stride(1) == 1 for z in logits)
        roots = [z if z._base is None else z._base for z in logits]
        in_place = in_place and not any(root.is_leaf and root.requires_grad for root in roots)
    return backend_of(name, problem.first.hidden.device, problem.dtype), in_place
