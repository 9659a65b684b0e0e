"""The fused vocabulary sweep: exact per-token statistics of LM heads, and the losses made of them.

Imports torch and nothing else of etpo.
"""

from etpo.kernels.losses import (
    gather_q,
    kl_from_logits,
    linear_kl,
    linear_logprob,
    logprob_from_logits,
    soft_policy_kl,
    soft_policy_kl_from_logits,
    soft_value,
    soft_value_from_logits,
    vocab_stats,
)
from etpo.kernels.streams import Stream, VocabStats

__all__ = [
    "Stream",
    "VocabStats",
    "gather_q",
    "kl_from_logits",
    "linear_kl",
    "linear_logprob",
    "logprob_from_logits",
    "soft_policy_kl",
    "soft_policy_kl_from_logits",
    "soft_value",
    "soft_value_from_logits",
    "vocab_stats",
]
