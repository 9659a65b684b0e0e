"""The public functions of etpo.kernels: their names, and the names, order and defaults of their arguments.

Other people's trainers call them so. A change here is a change for them: say so in CHANGELOG.md.
"""

import inspect

import pytest

from etpo import kernels

SIGNATURES = {
    "Stream": "(hidden, weight, bias=None, lora=None, temperature=1.0, softcap=None, shard=None)",
    "VocabStats": "(lse_p, lse_q, lse_r, lse_u, e_pr, e_pu, e_pp, e_q, at_p, at_q, at_r)",
    "vocab_stats": "(policy, critic=None, reference=None, *, targets=None, mix=(1.0, 1.0), "
    "ignore_index=-100, backend='auto')",
    "linear_logprob": "(hidden, weight, targets, *, bias=None, lora=None, temperature=1.0, softcap=None, "
    "ignore_index=-100, entropy_gradient=True, backend='auto')",
    "linear_kl": "(hidden, weight, ref_hidden, ref_weight, *, bias=None, ref_bias=None, temperature=1.0, "
    "lora=None, ref_lora=None, softcap=None, mask=None, weights=None, backend='auto')",
    "soft_value": "(q_hidden, q_weight, ref_hidden, ref_weight, beta, *, q_bias=None, ref_bias=None, "
    "temperature=1.0, q_lora=None, ref_lora=None, softcap=None, mask=None, weights=None, backend='auto')",
    "soft_policy_kl": "(hidden, weight, q_hidden, q_weight, ref_hidden, ref_weight, beta, *, bias=None, "
    "q_bias=None, ref_bias=None, temperature=1.0, lora=None, q_lora=None, ref_lora=None, softcap=None, "
    "mask=None, weights=None, backend='auto')",
    "gather_q": "(hidden, weight, targets, *, bias=None, lora=None, temperature=1.0, softcap=None, "
    "ignore_index=-100, backend='auto')",
    "logprob_from_logits": "(logits, targets, *, temperature=1.0, ignore_index=-100, inplace_backward=False, "
    "backend='auto')",
    "kl_from_logits": "(logits, ref_logits, *, temperature=1.0, inplace_backward=False, "
    "mask=None, weights=None, backend='auto')",
    "soft_value_from_logits": "(q_logits, ref_logits, beta, *, inplace_backward=False, mask=None, "
    "weights=None, backend='auto')",
    "soft_policy_kl_from_logits": "(logits, q_logits, ref_logits, beta, *, inplace_backward=False, "
    "mask=None, weights=None, backend='auto')",
}


def test_the_package_offers_these_names_and_no_others() -> None:
    assert sorted(kernels.__all__) == sorted(SIGNATURES)


@pytest.mark.parametrize("name", sorted(SIGNATURES))
def test_arguments_keep_their_names_order_and_defaults(name: str) -> None:
    signature = inspect.signature(getattr(kernels, name))
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    assert str(inspect.Signature(bare)) == SIGNATURES[name]
