"""What the kernel benchmark measures: shapes, functions with their plain PyTorch twins, and their inputs."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from etpo import kernels
from etpo.kernels import Stream

BETA = 0.5
POLICY, CRITIC, REFERENCE = range(3)
# How far a stream's hidden states lie from the policy's, as a share of their own size.
DISTANCE = (0.0, 1.0, 0.1)


class Shape(NamedTuple):
    """An LM head: V vocabulary entries, D numbers in a hidden state."""

    name: str
    n_vocab: int
    d_model: int


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("nano", 1536, 192),
        Shape("qwen2.5-0.5b", 151936, 896),
        Shape("codellama-7b", 32016, 4096),
        Shape("llama-3-8b", 128256, 4096),
    )
}


def shape_of(name: str) -> Shape:
    """The shape of that name, or `V×D` written as 32016x896. Raises ValueError for anything else."""
    if name in SHAPES:
        return SHAPES[name]
    sizes = name.lower().split("x")
    if len(sizes) == 2 and all(size.isdigit() and int(size) > 0 for size in sizes):
        return Shape(name.lower(), int(sizes[0]), int(sizes[1]))
    raise ValueError(f"shapes: expected one of {', '.join(SHAPES)} or VxD such as 32016x896, got {name!r}")


class Inputs(NamedTuple):
    """Of policy, critic, reference: hidden [N, D] and weight [V, D], or logits [N, V]; None where unused."""

    hidden: list[Tensor]
    weight: list[Tensor]
    logits: list[Tensor]
    targets: Tensor

    def z(self, stream: int) -> Tensor:
        """Logits [N, V] as plain PyTorch makes them: a product in the inputs' dtype, then float32."""
        logits = self.logits[stream] if self.logits else self.hidden[stream] @ self.weight[stream].T
        return logits if logits.dtype == torch.float64 else logits.float()

    def head(self, stream: int) -> tuple[Tensor, Tensor]:
        """hidden and weight of a stream."""
        return self.hidden[stream], self.weight[stream]


Call = Callable[[Inputs], list[Tensor]]


class Function(NamedTuple):
    """A public function of etpo.kernels as the benchmark calls it.

    streams: those it reads; learner: the one whose tensors ask for a gradient; run(inputs, backend) calls it.
    """

    name: str
    streams: tuple[int, ...]
    learner: int
    from_logits: bool
    eager: Call
    run: Callable[[Inputs, str], list[Tensor]]

    def products(self, trained: bool) -> tuple[int, int]:
        """The fewest matrix products of forward and backward: each stream's logits, each gradient, once.

        Logits that are made again for want of memory are not counted as needed.
        """
        return (0, 0) if self.from_logits else (len(self.streams), 1 + trained)


def _logprob(x: Inputs) -> list[Tensor]:
    log_p = x.z(POLICY).log_softmax(-1)
    return [log_p.gather(1, x.targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)]


def _kl(x: Inputs) -> list[Tensor]:
    log_p, log_r = x.z(POLICY).log_softmax(-1), x.z(REFERENCE).log_softmax(-1)
    return [(log_p.exp() * (log_p - log_r)).sum(-1)]


def _value(x: Inputs) -> list[Tensor]:
    z_r = x.z(REFERENCE)
    return [BETA * ((z_r + x.z(CRITIC) / BETA).logsumexp(-1) - z_r.logsumexp(-1))]


def _policy_kl(x: Inputs) -> list[Tensor]:
    log_p = x.z(POLICY).log_softmax(-1)
    log_u = (x.z(REFERENCE) + x.z(CRITIC) / BETA).log_softmax(-1)
    return [(log_p.exp() * (log_p - log_u)).sum(-1)]


def _stats(x: Inputs) -> list[Tensor]:
    z_p, z_q, z_r = x.z(POLICY), x.z(CRITIC), x.z(REFERENCE)
    u = z_r + z_q / BETA
    lse_p, prob = z_p.logsumexp(-1), z_p.softmax(-1)
    lse = [lse_p, *(z.logsumexp(-1) for z in (z_q, z_r, u))]
    contrasts = (z_p - z_r, z_p - u, z_p - lse_p[:, None], z_q)
    at = [z.gather(1, x.targets[:, None])[:, 0] for z in (z_p, z_q, z_r)]
    return [*lse, *((prob * contrast).sum(-1) for contrast in contrasts), *at]


def _run_stats(x: Inputs, backend: str) -> list[Tensor]:
    streams = [Stream(x.hidden[s], x.weight[s]) for s in range(3)]
    stats = kernels.vocab_stats(*streams, targets=x.targets, mix=(1.0, 1.0 / BETA), backend=backend)
    return [value for value in stats if value is not None]


P, Q, R = POLICY, CRITIC, REFERENCE
FUNCTIONS = {
    function.name: function
    for function in (
        Function(
            "linear_logprob", (P,), P, False, _logprob,
            lambda x, b: list(kernels.linear_logprob(*x.head(P), x.targets, backend=b)),
        ),
        Function(
            "linear_logprob_alone", (P,), P, False, lambda x: _logprob(x)[:1],
            lambda x, b: [
                kernels.linear_logprob(*x.head(P), x.targets, entropy_gradient=False, backend=b)[0]
            ],
        ),
        Function(
            "linear_kl", (P, R), P, False, _kl,
            lambda x, b: [kernels.linear_kl(*x.head(P), *x.head(R), backend=b)],
        ),
        Function(
            "soft_value", (Q, R), Q, False, _value,
            lambda x, b: [kernels.soft_value(*x.head(Q), *x.head(R), BETA, backend=b)],
        ),
        Function(
            "soft_policy_kl", (P, Q, R), P, False, _policy_kl,
            lambda x, b: [kernels.soft_policy_kl(*x.head(P), *x.head(Q), *x.head(R), BETA, backend=b)],
        ),
        Function("vocab_stats", (P, Q, R), P, False, _stats, _run_stats),
        Function(
            "logprob_from_logits", (P,), P, True, _logprob,
            lambda x, b: list(kernels.logprob_from_logits(x.logits[P], x.targets, backend=b)),
        ),
        Function(
            "kl_from_logits", (P, R), P, True, _kl,
            lambda x, b: [kernels.kl_from_logits(x.logits[P], x.logits[R], backend=b)],
        ),
        Function(
            "soft_value_from_logits", (Q, R), Q, True, _value,
            lambda x, b: [kernels.soft_value_from_logits(x.logits[Q], x.logits[R], BETA, backend=b)],
        ),
        Function(
            "soft_policy_kl_from_logits", (P, Q, R), P, True, _policy_kl,
            lambda x, b: [
                kernels.soft_policy_kl_from_logits(x.logits[P], x.logits[Q], x.logits[R], BETA, backend=b)
            ],
        ),
    )
}  # fmt: skip


class Case(NamedTuple):
    """One table of the benchmark. trained: the learner's head asks for a gradient too."""

    function: Function
    shape: Shape
    n_tokens: int
    trained: bool
    device: torch.device
    dtype: torch.dtype

    @property
    def name(self) -> str:
        head = "" if self.function.from_logits else ", trained head" if self.trained else ", frozen heads"
        return f"{self.function.name}{head}"

    @property
    def n_logits(self) -> int:
        return self.n_tokens * self.shape.n_vocab


def cases_of(
    functions: list[str],
    shapes: list[Shape],
    tokens: list[int],
    heads: list[str],
    device: torch.device,
    dtype: torch.dtype,
) -> list[Case]:
    """Every combination; functions of given logits have no head, and stand once."""
    unknown = [name for name in functions if name not in FUNCTIONS]
    if unknown:
        raise ValueError(f"functions: expected some of {', '.join(FUNCTIONS)}, got {', '.join(unknown)}")
    return [
        Case(FUNCTIONS[name], shape, n, head == "trained", device, dtype)
        for shape in shapes
        for n in tokens
        for name in functions
        for head in (["frozen"] if FUNCTIONS[name].from_logits else heads)
    ]


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """Random inputs: logits of size 1, a reference near the policy, a critic of its own; no gradients yet."""
    generator = torch.Generator(case.device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=case.device)

    n, (_, v, d) = case.n_tokens, case.shape
    width = v if case.function.from_logits else d
    policy = normal(n, width)
    rows = [(policy + far * normal(n, width)).to(case.dtype) for far in DISTANCE]
    targets = torch.randint(v, (n,), generator=generator, device=case.device)
    if case.function.from_logits:
        return Inputs([], [], rows, targets)
    weights = [
        normal(v, d).mul_(d**-0.5).to(case.dtype) if k in case.function.streams else rows[k] for k in range(3)
    ]
    return Inputs(rows, weights, [], targets)


def with_gradients(case: Case, inputs: Inputs) -> tuple[Inputs, list[Tensor]]:
    """Fresh leaves on the same memory, and those of them that ask for a gradient."""
    learner = case.function.learner
    hidden, weight, logits = ([t.detach() for t in part] for part in inputs[:3])
    fresh = Inputs(hidden, weight, logits, inputs.targets)
    wanted = [fresh.logits[learner]] if case.function.from_logits else [fresh.hidden[learner]]
    if case.trained and not case.function.from_logits:
        wanted.append(fresh.weight[learner])
    for tensor in wanted:
        tensor.requires_grad_()
    return fresh, wanted


def first_tokens(inputs: Inputs, n: int, dtype: torch.dtype) -> Inputs:
    """The first `n` tokens of the inputs, in `dtype`."""
    hidden, weight, logits, targets = inputs
    return Inputs(
        [t[:n].to(dtype) for t in hidden],
        [t.to(dtype) for t in weight],
        [t[:n].to(dtype) for t in logits],
        targets[:n],
    )
