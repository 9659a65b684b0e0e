"""Bad input raises one ValueError line that names the argument and what it got."""

import re

import pytest
import torch

from etpo.kernels import (
    Stream,
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

H, W, TOKENS = torch.zeros(4, 3), torch.zeros(7, 3), torch.zeros(4, dtype=torch.int64)
Z = torch.zeros(4, 7)
P = Stream(H, W)

BAD = {
    "hidden of one dimension": (lambda: vocab_stats(Stream(H[0], W)), "policy.hidden", "(3,)"),
    "hidden of integers": (lambda: vocab_stats(Stream(H.long(), W.long())), "policy.hidden", "torch.int64"),
    "no tensor": (lambda: vocab_stats(Stream([1.0], W)), "policy.hidden", "list"),
    "no stream": (lambda: vocab_stats((H, W)), "policy", "tuple"),
    "no stream at all": (lambda: vocab_stats(None), "policy", "None"),
    "weight of another width": (lambda: vocab_stats(Stream(H, W[:, :2])), "policy.weight", "(7, 2)"),
    "empty vocabulary": (lambda: vocab_stats(Stream(H, W[:0])), "policy.weight", "(0, 3)"),
    "weight of another dtype": (lambda: vocab_stats(Stream(H, W.bfloat16())), "policy.weight", "bfloat16"),
    "weight on another device": (lambda: vocab_stats(Stream(H, W.to("meta"))), "policy.weight", "meta"),
    "bias of another length": (lambda: vocab_stats(Stream(H, W, torch.zeros(6))), "policy.bias", "(6,)"),
    "bias in float64": (lambda: vocab_stats(Stream(H, W, torch.zeros(7).double())), "policy.bias", "float64"),
    "lora without scale": (lambda: vocab_stats(Stream(H, W, None, (H, W))), "policy.lora", "tuple"),
    "lora of another rank": (
        lambda: vocab_stats(Stream(H, W, None, (torch.zeros(2, 3), torch.zeros(7, 1), 1.0))),
        "policy.lora B",
        "(7, 1)",
    ),
    "lora scale NaN": (
        lambda: vocab_stats(Stream(H, W, None, (H, torch.zeros(7, 4), float("nan")))),
        "policy.lora scale",
        "nan",
    ),
    "temperature 0": (lambda: vocab_stats(P._replace(temperature=0.0)), "policy.temperature", "0.0"),
    "softcap below 0": (lambda: vocab_stats(P._replace(softcap=-1.0)), "policy.softcap", "-1.0"),
    "another vocabulary": (lambda: vocab_stats(P, Stream(H, W[:5])), "critic.weight", "(5, 3)"),
    "other tokens": (lambda: vocab_stats(P, None, Stream(H[:2], W)), "reference.hidden", "(2, 3)"),
    "float64 beside float32": (
        lambda: vocab_stats(P, Stream(H.double(), W.double())),
        "critic.hidden",
        "float64",
    ),
    "mix of one number": (lambda: vocab_stats(P, mix=(1.0,)), "mix", "(1.0,)"),
    "mix of infinity": (lambda: vocab_stats(P, mix=(1.0, float("inf"))), "mix", "inf"),
    "mix beyond float32": (lambda: vocab_stats(P, mix=(1.0, 1e39)), "mix", "1e+39"),
    "unknown backend": (lambda: vocab_stats(P, backend="fast"), "backend", "'fast'"),
    "triton on a CPU": (lambda: vocab_stats(P, backend="triton"), "backend", "triton"),
    "target too large": (lambda: linear_logprob(H, W, TOKENS + 7), "targets", "7"),
    "target below 0": (lambda: gather_q(H, W, TOKENS - 1), "targets", "-1"),
    "no ignore_index": (lambda: vocab_stats(P, ignore_index=None), "ignore_index", "None"),
    "ignore_index of a float": (
        lambda: logprob_from_logits(Z, TOKENS, ignore_index=-100.0),
        "ignore_index",
        "-100.0",
    ),
    "targets of another shape": (lambda: linear_logprob(H, W, TOKENS[:3]), "targets", "(3,)"),
    "targets of floats": (lambda: linear_logprob(H, W, TOKENS.float()), "targets", "float32"),
    "targets on another device": (lambda: gather_q(H, W, TOKENS.to("meta")), "targets", "meta"),
    "beta 0": (lambda: soft_value(H, W, H, W, 0.0), "beta", "0.0"),
    "beta below 0": (lambda: soft_policy_kl(H, W, H, W, H, W, -0.1), "beta", "-0.1"),
    "beta NaN": (lambda: soft_value_from_logits(Z, Z, float("nan")), "beta", "nan"),
    "beta without an inverse": (lambda: soft_value_from_logits(Z, Z, 1e-310), "beta", "1e-310"),
    "beta beyond float32": (lambda: soft_value(H, W, H, W, 1e39), "beta", "1e+39"),
    "beta as a tensor": (lambda: soft_policy_kl_from_logits(Z, Z, Z, torch.ones(())), "beta", "tensor"),
    "critic of another width": (lambda: soft_value(H, W[:, :2], H, W, 0.5), "q_weight", "(7, 2)"),
    "reference of other tokens": (lambda: linear_kl(H, W, H[:2], W), "ref_hidden", "(2, 3)"),
    "critic's vocabulary": (lambda: soft_policy_kl(H, W, H, W[:5], H, W, 1.0), "q_weight", "(5, 3)"),
    "bias of the reference": (lambda: linear_kl(H, W, H, W, ref_bias=W), "ref_bias", "(7, 3)"),
    "head of gather_q": (lambda: gather_q(H, W.double(), TOKENS), "weight", "float64"),
    "temperature below 0": (lambda: linear_kl(H, W, H, W, temperature=-1.0), "temperature", "-1.0"),
    "logits of one dimension": (lambda: kl_from_logits(Z[0], Z[0]), "logits", "(7,)"),
    "other reference logits": (lambda: kl_from_logits(Z, Z[:, :5]), "ref_logits", "(4, 5)"),
    "logits of two dtypes": (lambda: kl_from_logits(Z, Z.double()), "ref_logits", "float64"),
    "logits without a vocabulary": (lambda: logprob_from_logits(Z[:, :0], TOKENS), "logits", "(4, 0)"),
    "target outside the logits": (lambda: logprob_from_logits(Z, TOKENS + 9), "targets", "9"),
    "unknown backend for logits": (lambda: kl_from_logits(Z, Z, backend="x"), "backend", "'x'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, name, got = BAD[case]
    with pytest.raises(ValueError, match=re.escape(name)) as error:
        call()
    text = str(error.value)
    assert text.startswith(name)
    assert got in text
    assert "\n" not in text


def test_good_edges_pass():
    vocab_stats(P, targets=TOKENS - 100)
    vocab_stats(P, targets=TOKENS - 1, ignore_index=-1)
    vocab_stats(P._replace(temperature=2, softcap=30), mix=(1, 2))
    soft_value(H, W, H, W, 1)
    vocab_stats(None, P, P)
    linear_logprob(H.bfloat16(), W.bfloat16(), TOKENS, lora=(torch.zeros(2, 3), torch.zeros(7, 2), 2))
