"""Returns of whole actions, as the baselines see them: the reward, and what the retry earns behind it."""

from collections import deque

import torch
from torch import Tensor

from etpo.engine.policy_gradient import Fresh
from etpo.engine.targets import retrace_targets
from etpo.engine.values import FOLDS, PrefixValue, sketch


def action_rewards(seen: Fresh, beta: float) -> Tensor:
    """r − β·Σ_k log(μ/π̄)(w_k) of each action [A] float64: the KL term as it stands in the reward."""
    reward = torch.tensor([action.reward for action in seen.batch.actions], dtype=torch.float64)
    return reward - beta * seen.per_action(seen.logprob_mu - seen.logprob_ref).double().cpu()


def advantages_over_time(
    seen: Fresh, value: PrefixValue, rewards_A: Tensor, lam: float
) -> tuple[Tensor, Tensor]:
    """(A, V) [A] float64 of whole actions: GAE(λ) over the time steps of each episode.

    V sees the prompt, by the reference's hidden state behind it and whether it is a retry; it then learns the
    returns.

    Args:
        value: the regression; it is used and then updated.
        rewards_A: [A], of each action.
        lam: λ over time steps, not over tokens.
    """
    actions = seen.batch.actions
    ends = torch.tensor(seen.lengths).cumsum(0) - 1
    starts = torch.cat((ends.new_zeros(1), ends[:-1] + 1))
    states = torch.cat((starts, torch.arange(seen.batch.n_tokens, len(seen.hidden_ref))))
    retry = [float(action.t > 0) for action in actions]
    retry += [1.0] * (len(states) - len(actions))
    features = prompt_features(seen.hidden_ref[states.to(seen.hidden_ref.device)], retry)
    # The state behind an action is that of its successor, or one of the bootstrap states.
    index_of = torch.zeros(len(seen.hidden_ref), dtype=torch.int64)
    index_of[states] = torch.arange(len(states))
    next_A = index_of[seen.batch.next_K[ends]]
    discount, goes_on, n = (
        seen.batch.discount_K[ends].double(),
        seen.batch.trace_goes_on_K[ends],
        len(actions),
    )

    def targets(v: Tensor, trace: float) -> Tensor:
        return retrace_targets(
            rewards_A, discount, v[next_A], v[:n], torch.full((n,), trace).double(), goes_on
        )

    fold = torch.tensor([action.env for action in actions]) % FOLDS
    v = value.regress(features, torch.ones(n, dtype=torch.float64), fold, lambda v: targets(v, 1.0))
    return targets(v, lam) - v[:n], v[:n]


def prompt_features(hidden: Tensor, retry: list[float]) -> Tensor:
    """[N, F] float64: a constant, whether the prompt is a retry's, and its last hidden state."""
    head = torch.tensor([[1.0, 0.0, 0.0, 0.0, 0.0, r, 0.0] for r in retry], dtype=torch.float64)
    return torch.cat((head, sketch(hidden.double().cpu())), dim=1)


class RetryReturn:
    """Returns for learners without a value: behind the batch's edge lies what retries earn on the whole."""

    def __init__(self) -> None:
        self.recent: deque[float] = deque(maxlen=128)

    def returns(self, seen: Fresh, rewards_A: Tensor) -> Tensor:
        """G_t = r_t + γ·G_{t+1} [A] float64: what an action earned, with the retry behind it."""
        later = sum(self.recent) / len(self.recent) if self.recent else 0.0
        ends = torch.tensor(seen.lengths).cumsum(0) - 1
        v = torch.full((len(rewards_A),), later, dtype=torch.float64)
        goes_on = seen.batch.trace_goes_on_K[ends]
        discount = seen.batch.discount_K[ends].double()
        returns = retrace_targets(rewards_A, discount, v, v, torch.ones_like(v), goes_on)
        retried = [action.t > 0 for action in seen.batch.actions]
        self.recent.extend(g for g, retry in zip(returns.tolist(), retried, strict=True) if retry)
        return returns

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {"retry/recent": torch.tensor(list(self.recent), dtype=torch.float64)}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take up what `tensors` gave."""
        self.recent.extend(tensors["retry/recent"].tolist())
