"""What a sweep must make: planes of logits for statistics, gradients from cotangents."""

from typing import NamedTuple

from etpo.kernels.streams import Problem, VocabStats

LSE_P, LSE_Q, LSE_R, LSE_U, E_PR, E_PU, E_PP, E_Q, AT_P, AT_Q, AT_R = range(len(VocabStats._fields))
EXPECTATIONS = frozenset((E_PR, E_PU, E_PP, E_Q))

# Streams, in the order of `Problem.sources`; U is the plane mixed of R and Q.
P, Q, R, U = range(4)
LSE = (LSE_P, LSE_Q, LSE_R, LSE_U)
AT = (AT_P, AT_Q, AT_R)


def forward_planes(fields: set[int], mix: tuple[float, float]) -> set[int]:
    """The planes of logits that the statistics `fields` read; u stands on those of its streams."""
    own = {
        P: EXPECTATIONS | {LSE_P, AT_P},
        Q: {LSE_Q, AT_Q, E_Q},
        R: {LSE_R, AT_R, E_PR},
    }
    planes = {k for k, statistics in own.items() if fields & statistics}
    return planes | u_planes(mix) if fields & {LSE_U, E_PU} else planes


def u_planes(mix: tuple[float, float]) -> set[int]:
    """u and the streams that it mixes."""
    return {U} | {k for k, share in zip((R, Q), mix, strict=True) if share != 0}


class Plan(NamedTuple):
    """A backward: the streams that get a gradient, the planes it takes, and whether softmax p, softmax u."""

    grads: set[int]
    planes: set[int]
    prob: bool
    prob_u: bool


def plan_backward(problem: Problem, active: set[int], wanted: set[int]) -> Plan:
    """The work for cotangents on the statistics `active` where the streams `wanted` ask for a gradient."""
    # By stream: the statistics whose derivative holds softmax p, and softmax u.
    through_p = {P: EXPECTATIONS | {LSE_P}, Q: {E_Q}, R: {E_PR}}
    through_u: dict[int, set[int]] = {P: set(), Q: set(), R: set()}
    for k in u_planes(problem.mix) - {U}:
        through_p[k] = through_p[k] | {E_PU}
        through_u[k] = {LSE_U}
    grads = {k for k in wanted if active & (through_p[k] | through_u[k] | {LSE[k], AT[k]})}
    prob = any(active & through_p[k] for k in grads)
    prob_u = any(active & through_u[k] for k in grads)
    planes = {P} if prob else set()
    if P in grads:
        planes |= {k for k, field in ((Q, E_Q), (R, E_PR)) if field in active}
    if prob_u or (P in grads and E_PU in active):
        planes |= u_planes(problem.mix)
    for k in grads:
        source = problem.sources[k]
        assert source is not None
        if source.softcap is not None or (k != P and LSE[k] in active):
            planes.add(k)
    return Plan(grads, planes, prob, prob_u)
