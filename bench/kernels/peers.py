"""Who is measured: plain PyTorch, etpo's backends, and the kernels of other libraries that are installed."""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from etpo.bench.kernels.cases import FUNCTIONS, POLICY, REFERENCE, Call, Case, Function, Inputs

HEADS_OF_POLICY = ("linear_logprob", "linear_logprob_alone", "linear_kl")


class Contestant(NamedTuple):
    """One row of each table whose function is in `functions`.

    why_not(case): why it cannot run there, or None; make(function): what is called. is_mean: it gives only
    the mean over the tokens. note: what it leaves out.
    """

    name: str
    functions: frozenset[str]
    why_not: Callable[[Case], str | None]
    make: Callable[[Function], Call]
    is_mean: bool = False
    note: str = ""


def missing(module: str) -> str | None:
    return None if find_spec(module) else f"{module} is not installed"


def needs_gpu(case: Case) -> str | None:
    return None if case.device.type == "cuda" else f"needs a GPU, got device {case.device}"


def always(case: Case) -> None:
    return None


def _compiled(function: Function) -> Call:
    torch.compiler.reset()
    return torch.compile(function.eager)


def _etpo(backend: str) -> Callable[[Function], Call]:
    return lambda function: lambda x: function.run(x, backend)


def _torch_linear_ce(function: Function) -> Call:
    options = torch.nn.LinearCrossEntropyOptions()

    def call(x: Inputs) -> list[Tensor]:
        hidden, weight = x.head(POLICY)
        return [-F.linear_cross_entropy(hidden, weight, x.targets, reduction="none", options=options)]

    return call


def _why_no_torch_linear_ce(case: Case) -> str | None:
    if hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return None
    return f"needs torch 2.13, this is {torch.__version__}"


def _trl(function: Function) -> Call:
    if function.name == "linear_kl":
        divergence = import_module("trl.kernels.chunked_divergence").ChunkedDivergenceFunction

        def kl(x: Inputs) -> list[Tensor]:
            (hidden, weight), (ref_hidden, ref_weight) = x.head(POLICY), x.head(REFERENCE)
            return [divergence.apply(hidden, weight, None, ref_hidden, ref_weight, None, 1.0)[0]]

        return kl
    if function.name == "logprob_from_logits":
        fused = import_module("trl.kernels").selective_log_softmax_and_entropy
        return lambda x: [out[0] for out in fused(x.logits[POLICY][None], x.targets[None])]
    logprob = import_module("trl.kernels.chunked_logprob").ChunkedLogProbFunction
    chunk_size, n_outputs = 32768, 1 if function.name == "linear_logprob_alone" else 2

    def call(x: Inputs) -> list[Tensor]:
        hidden, weight = x.head(POLICY)
        more = ("entropy",)[: n_outputs - 1]
        return list(
            logprob.apply(hidden, weight, None, x.targets, 1.0, chunk_size, None, 1.0, more)[:n_outputs]
        )

    return call


def _why_no_trl(case: Case) -> str | None:
    return missing("trl") or (needs_gpu(case) if case.function.from_logits else None)


def _liger(function: Function) -> Call:
    if function.name == "linear_kl":
        fused = import_module("liger_kernel.transformers").LigerFusedLinearJSD(jsd_beta=1.0)
        return lambda x: [fused(*x.head(POLICY), *x.head(REFERENCE), None)]
    loss = import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss()

    def logprob(x: Inputs) -> list[Tensor]:
        hidden, weight = x.head(POLICY)
        return [-loss(weight, hidden, x.targets)]

    return logprob


def _cce(function: Function) -> Call:
    linear_cross_entropy = import_module("cut_cross_entropy").linear_cross_entropy

    def call(x: Inputs) -> list[Tensor]:
        hidden, weight = x.head(POLICY)
        impl = "cce" if hidden.is_cuda else "torch_compile"
        # No filter: an exact gradient, as the others give.
        loss = linear_cross_entropy(hidden, weight, x.targets, reduction="none", filter_eps=None, impl=impl)
        return [-loss]

    return call


ALL, LOGPROB = frozenset(FUNCTIONS), frozenset(("linear_logprob", "linear_logprob_alone"))
ALONE = "log-probability alone, no entropy"
EAGER = Contestant("eager", ALL, always, lambda function: function.eager)
CONTESTANTS = {
    contestant.name: contestant
    for contestant in (
        EAGER,
        Contestant("torch.compile", ALL, always, _compiled),
        Contestant("etpo reference", ALL, always, _etpo("reference")),
        Contestant("etpo chunked", ALL, always, _etpo("chunked")),
        Contestant("etpo triton", ALL, needs_gpu, _etpo("triton")),
        Contestant(
            "F.linear_cross_entropy", LOGPROB, _why_no_torch_linear_ce, _torch_linear_ce, note=ALONE
        ),
        Contestant(
            "trl.kernels", frozenset((*HEADS_OF_POLICY, "logprob_from_logits")), _why_no_trl, _trl
        ),
        Contestant(
            "liger-kernel", frozenset(HEADS_OF_POLICY),
            lambda case: missing("liger_kernel") or needs_gpu(case), _liger, is_mean=True,
            note="the mean over tokens alone",
        ),
        Contestant(
            "cut-cross-entropy", LOGPROB, lambda case: missing("cut_cross_entropy"), _cce, note=ALONE
        ),
    )
}  # fmt: skip


def contestants_of(names: list[str]) -> list[Contestant]:
    """The named ones, eager first: the others are measured against it. Raises ValueError for a wrong name."""
    unknown = [name for name in names if name not in CONTESTANTS]
    if unknown:
        raise ValueError(f"peers: expected some of {', '.join(CONTESTANTS)}, got {', '.join(unknown)}")
    return [EAGER, *(CONTESTANTS[name] for name in names if name != EAGER.name)]
