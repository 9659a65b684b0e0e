"""V of token states by a regression in closed form: no network of its own, no step size, quick to learn.

On the bundled model unlikely tokens tell a program that fails before its end: after 64 programs, a regression
on seven statistics of what the reference thinks of the prefix explains a quarter of the return's variance in
the last half of a program (docs/results/learner-attempts.md).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from etpo.engine.checkpoint import CheckpointError
from etpo.engine.replay import ActionBatch

SKETCH = 256  # hidden states wider than this are projected to as many numbers
FOLDS = 4
KEPT = 0.95  # share of the evidence that outlives an iteration: the policy changes, and with it its returns
N_STATISTICS = 7


@dataclass(frozen=True)
class Evidence:
    """What a regression sees of some token states.

    Attributes:
        features: [N, F] float64.
        target: [N] float64, the return from the state on.
        weight: [N] float64, 1/L for a token of an action of L tokens, so that an action counts once.
        fold: [N] int64, which part of the batch a state belongs to.
    """

    features: Tensor
    target: Tensor
    weight: Tensor
    fold: Tensor

    def sums(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Σ w·f·fᵀ [F, F] and Σ w·f·target [F] over the chosen states."""
        f, w = self.features[chosen], self.weight[chosen]
        return f.T @ (f * w[:, None]), f.T @ (w * self.target[chosen])


class PrefixValue:
    """V(x) = f(x)·θ, with θ = (Σ w·f·fᵀ + penalty)⁻¹ Σ w·f·target, over all actions so far, old ones fading.

    Attributes:
        gram: [F, F] float64, Σ w·f·fᵀ; empty before the first batch.
        moment: [F] float64, Σ w·f·target.
    """

    def __init__(self) -> None:
        self.gram = torch.zeros(0, 0, dtype=torch.float64)
        self.moment = torch.zeros(0, dtype=torch.float64)

    def regress(
        self, features: Tensor, weight: Tensor, fold: Tensor, returns_of: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """V [N + M] of a batch's N states and its M bootstrap states; afterwards their returns are learned.

        Args:
            features: [N + M, F] float64, bootstrap states last.
            weight, fold: [N], see `Evidence`.
            returns_of: V [N + M] -> the returns [N] from the N states on; V counts at the bootstrap states.
        """
        if not len(self.moment):
            self.gram = torch.zeros(features.shape[1], features.shape[1], dtype=torch.float64)
            self.moment = torch.zeros(features.shape[1], dtype=torch.float64)
        n = len(weight)
        v = features @ solve(self.gram, self.moment)
        evidence = Evidence(features[:n], returns_of(v), weight, fold)
        v[:n] = self.crossed(evidence)
        self.learn(evidence)
        return v

    def crossed(self, evidence: Evidence) -> Tensor:
        """V [N] of states by what was learned so far and by the other folds of their own batch.

        A baseline that has seen an action's own return would take away part of its advantage.
        """
        v = torch.zeros_like(evidence.target)
        folds = evidence.fold.unique().tolist()
        sums = {fold: evidence.sums(evidence.fold == fold) for fold in folds}
        for fold in folds:
            others = [sums[other] for other in folds if other != fold]
            gram, moment = self.gram.clone(), self.moment.clone()
            for other_gram, other_moment in others:
                gram += other_gram
                moment += other_moment
            own = evidence.fold == fold
            v[own] = evidence.features[own] @ solve(gram, moment)
        return v

    def learn(self, evidence: Evidence) -> None:
        """Take in a batch's returns; what was known before fades."""
        gram, moment = evidence.sums(torch.ones_like(evidence.fold, dtype=torch.bool))
        self.gram = KEPT * self.gram + gram
        self.moment = KEPT * self.moment + moment

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {"value/gram": self.gram, "value/moment": self.moment}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take up what `tensors` gave. Raises CheckpointError where another learner gave them."""
        if "value/gram" not in tensors:
            raise CheckpointError(
                "the checkpoint: expected one of a learner with a value of token states, got one without; "
                'a run of the critic network goes on with algo = "etpo-q" in its config.toml'
            )
        self.gram, self.moment = tensors["value/gram"].cpu(), tensors["value/moment"].cpu()


def solve(gram: Tensor, moment: Tensor) -> Tensor:
    """θ of a ridge regression whose penalty is as strong as one action, and stronger for hidden states.

    Where nothing is known yet, θ = 0.
    """
    penalty = torch.full((len(moment),), 10.0, dtype=torch.float64)
    penalty[:N_STATISTICS] = 1.0
    theta: Tensor = torch.linalg.solve(gram + torch.diag(penalty), moment)
    return theta


def state_features(
    batch: ActionBatch, hidden_ref: Tensor, logprob_ref_K: Tensor, entropy_ref_K: Tensor
) -> Tensor:
    """f(x) [K + M, 7 + min(D, 256)] float64 of token states: what the reference thinks of the prefix.

    With −log π̄(w_j) the surprise of a token drawn: a constant; the sum over the prefix of surprise less
    entropy, the surprise that was not to be expected; the sum of surprise; the largest; k; whether it is a
    retry; the mean surprise; then the hidden state at norm 1 (a random projection of it where it is wide).

    Args:
        hidden_ref: [K + M, D], the reference's.
        logprob_ref_K, entropy_ref_K: [K], log π̄(w_k) and the entropy of π̄(·|x_k), nat.
    """
    lengths = [len(action.tokens) for action in batch.actions]
    rows = []
    for action, logprob, entropy in zip(
        batch.actions,
        logprob_ref_K.double().cpu().split(lengths),
        entropy_ref_K.double().cpu().split(lengths),
        strict=True,
    ):
        surprise = -logprob
        k = torch.arange(len(surprise), dtype=torch.float64)
        sum_surprise = before(surprise.cumsum(0))
        rows.append(torch.stack((
            torch.ones_like(k),
            before((surprise - entropy).cumsum(0)) / 10,
            sum_surprise / 10,
            before(surprise.cummax(0).values) / 5,
            k / 50,
            torch.full_like(k, float(action.t > 0)),
            sum_surprise / 10 / (k / 50 + 1),
        ), dim=1))  # fmt: skip
    n_bootstraps = len(hidden_ref) - batch.n_tokens
    start = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    statistics = torch.cat((*rows, start.expand(n_bootstraps, N_STATISTICS)))
    return torch.cat((statistics, sketch(hidden_ref.double().cpu())), dim=1)


def before(x: Tensor) -> Tensor:
    """x of the tokens before this one: shifted by one, 0 in front."""
    return torch.cat((x.new_zeros(1), x[:-1]))


def sketch(hidden: Tensor) -> Tensor:
    """Hidden states at norm 1 [N, min(D, 256)]; where D is larger, a fixed random projection of them."""
    width = hidden.shape[-1]
    hidden = hidden / hidden.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    if width <= SKETCH:
        return hidden
    generator = torch.Generator().manual_seed(width)
    projection = torch.randn(width, SKETCH, generator=generator, dtype=hidden.dtype) / SKETCH**0.5
    projected: Tensor = hidden @ projection
    return projected


def weights_and_folds(batch: ActionBatch) -> tuple[Tensor, Tensor]:
    """Weight and fold [K] of a batch's token states, see `Evidence`; an episode stays in one fold."""
    lengths = torch.tensor([len(action.tokens) for action in batch.actions])
    env = torch.tensor([action.env for action in batch.actions])
    return (1.0 / lengths.double()).repeat_interleave(lengths), (env % FOLDS).repeat_interleave(lengths)
