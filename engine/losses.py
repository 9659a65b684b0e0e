"""The two losses of ETPO, as pure functions of streams. Source: arXiv:2402.06700.

Means over real action tokens: the streams hold nothing else.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from etpo.engine.targets import QForm, mix_of, there
from etpo.kernels import Stream, gather_q, linear_logprob, vocab_stats
from etpo.kernels.checks import Rows
from etpo.kernels.losses import divergence


def critic_at_tokens(critic: Stream, tokens_K: Tensor, q_form: QForm) -> Tensor:
    """What Q reads of the critic's head at the tokens drawn, [K] with its gradient.

    log π_Q(w_k) for `normalised`, else the logit z_Q(w_k): one number of the head a token.

    Args:
        critic: hidden [K, D] and head, with gradients.
        tokens_K: int64 [K], the tokens w_k.
    """
    if q_form == "normalised":
        return logprob_and_entropy(critic, tokens_K)[0]
    return gather_q(
        critic.hidden, critic.weight, tokens_K, bias=critic.bias, lora=critic.lora,
        temperature=critic.temperature, softcap=critic.softcap,
    )  # fmt: skip


def q_of_tokens(
    at_critic_K: Tensor, at_ref_K: Tensor, v_head_K: Tensor | None, q_form: QForm, beta: float
) -> Tensor:
    """Q_θ(x_k, w_k) [K], with the gradients of its parts.

    Args:
        at_critic_K: `critic_at_tokens`.
        at_ref_K: the same of the reference, without gradient: log π̄(w_k) or z_ref(w_k).
        v_head_K: the scalar head, or None for `logits`.
    """
    if q_form == "logits":
        return at_critic_K
    assert v_head_K is not None
    return v_head_K + beta * (at_critic_K - at_ref_K)


def critic_loss(q_K: Tensor, target_K: Tensor, huber_delta: float, weight_K: Tensor | None = None) -> Tensor:
    """L_Q = mean c_k·Huber_δ(Q_θ(x_k, w_k) − y_k), scalar.

    Args:
        q_K, target_K: [K], in reward units.
        huber_delta: δ, in reward units.
        weight_K: c [K], without gradient; None: 1. The mean divides by K, not by Σc: replay that the policy
            has left behind shortens the step.

    Raises:
        ValueError: shapes differ.
    """
    shapes = [tuple(x.shape) for x in (q_K, target_K, weight_K) if x is not None]
    if len(set(shapes)) != 1:
        raise ValueError(f"critic_loss: expected one shape, got {' and '.join(map(str, shapes))}")
    loss_K = F.huber_loss(q_K, target_K, delta=huber_delta, reduction="none")
    return (loss_K if weight_K is None else weight_K * loss_K).mean()


def policy_loss(policy: Stream, critic: Stream, reference: Stream, q_form: QForm, beta: float) -> Tensor:
    """L_π = mean KL(π(·|x_k) ‖ π_Q(·|x_k)) over the whole vocabulary, scalar; critic and reference detached.

    π_Q = π̄·exp(z_Q/β)/Z for `logits`, softmax(z_Q) for `residual` and `normalised`.
    """
    n_tokens = policy.hidden.shape[0]
    # As a weighted sum, whose gradient is finished in the sweep of the forward pass.
    share = torch.full((n_tokens,), 1.0 / n_tokens, dtype=torch.float64, device=policy.hidden.device)
    rows = Rows(weights=share)
    if q_form != "logits":
        return divergence(policy, None, detached(critic), (1.0, 0.0), rows=rows)
    return divergence(policy, detached(critic), detached(reference), mix_of(q_form, beta), rows=rows)


def stream_kl(policy: Stream, reference: Stream) -> Tensor:
    """KL(softmax(z_p) ‖ softmax(z_r)) [K], exact."""
    return divergence(policy, None, reference, (1.0, 0.0))


def beside(policy: Stream, reference: Stream, tokens_K: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """KL(softmax(z_p) ‖ softmax(z_r)), log softmax(z_p)(w_k) and the entropy of softmax(z_p), each [K], from
    one sweep."""
    # No mixture of the two is asked for.
    stats = vocab_stats(policy, None, reference, targets=tokens_K, mix=(0.0, 0.0))
    kl = there(stats.e_pr) - there(stats.lse_p) + there(stats.lse_r)
    return kl, there(stats.at_p) - there(stats.lse_p), -there(stats.e_pp)


def logprob_and_entropy(stream: Stream, tokens_K: Tensor) -> tuple[Tensor, Tensor]:
    """log softmax(z)(w_k), with its gradient, and the entropy of softmax(z), without one; each [K]."""
    return linear_logprob(
        stream.hidden, stream.weight, tokens_K, bias=stream.bias, lora=stream.lora,
        temperature=stream.temperature, softcap=stream.softcap, entropy_gradient=False,
    )  # fmt: skip


def detached(stream: Stream) -> Stream:
    """The stream with no gradient in any of its parts; what has none stays the tensor that it is."""

    def cut(x: Tensor) -> Tensor:
        return x.detach() if x.requires_grad else x

    lora = None if stream.lora is None else (cut(stream.lora[0]), cut(stream.lora[1]), stream.lora[2])
    bias = None if stream.bias is None else cut(stream.bias)
    return stream._replace(hidden=cut(stream.hidden), weight=cut(stream.weight), bias=bias, lora=lora)
