"""The error of KL and of its gradient against float64 of the same inputs, at KL from 1e-4 to 1 nat."""

from dataclasses import dataclass

import torch
from torch import Tensor

from etpo.bench.kernels.cases import (
    FUNCTIONS,
    POLICY,
    REFERENCE,
    Case,
    Inputs,
    Shape,
    first_tokens,
    make_inputs,
)
from etpo.bench.kernels.measure import Tell, relative_error, run_once
from etpo.bench.kernels.peers import Contestant

KLS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
# Standard deviation of the logits: a model that is sure of some tokens and not of others.
LOGIT_SIZE = 3.0


@dataclass(frozen=True)
class PrecisionRow:
    """Relative errors in the 2-norm over all tokens, of one contestant at one mean KL (nats)."""

    kl_aimed: float
    kl_mean: float
    contestant: str
    note: str = ""
    why_not: str | None = None
    error_value: float | None = None
    error_hidden: float | None = None
    error_head: float | None = None

    @property
    def error_gradient(self) -> float | None:
        """The larger of the gradients' errors."""
        if self.error_hidden is None or self.error_head is None:
            return None
        return max(self.error_hidden, self.error_head)


def precision_table(
    contestants: list[Contestant],
    shape: Shape,
    n_tokens: int,
    device: torch.device,
    dtype: torch.dtype,
    tell: Tell = print,
) -> list[PrecisionRow]:
    """Rows of every contestant that has `linear_kl`, for each KL of `KLS`."""
    case = Case(FUNCTIONS["linear_kl"], shape, n_tokens, True, device, dtype)
    contestants = [c for c in contestants if case.function.name in c.functions]
    rows: list[PrecisionRow] = []
    for kl in KLS:
        tell(f"KL {kl:g}")
        rows += _rows_at(kl, case, contestants)
    return rows


def _rows_at(kl: float, case: Case, contestants: list[Contestant]) -> list[PrecisionRow]:
    inputs, kl_mean = inputs_at(kl, case)
    exact: dict[bool, list[Tensor]] = {}
    rows = []
    for contestant in contestants:
        why_not = contestant.why_not(case)
        errors: list[float] = []
        if why_not is None:
            try:
                outputs, gradients = run_once(case, contestant.make(case.function), inputs)
                if contestant.is_mean not in exact:
                    exact[contestant.is_mean] = _exact(case, inputs, contestant.is_mean)
                want = exact[contestant.is_mean]
                errors = [relative_error(a, b) for a, b in zip([*outputs, *gradients], want, strict=True)]
            except Exception as error:
                why_not = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        rows.append(PrecisionRow(kl, kl_mean, contestant.name, contestant.note, why_not, *errors))
    return rows


def _exact(case: Case, inputs: Inputs, is_mean: bool) -> list[Tensor]:
    """[results, gradient of hidden, gradient of the head] in float64."""

    def eager(x: Inputs) -> list[Tensor]:
        outputs = case.function.eager(x)
        return [out.mean() for out in outputs] if is_mean else outputs

    outputs, gradients = run_once(case, eager, first_tokens(inputs, case.n_tokens, torch.float64))
    return [*outputs, *gradients]


def inputs_at(kl: float, case: Case) -> tuple[Inputs, float]:
    """Inputs in the dtype of `case` whose mean KL is about `kl`, and that mean in float64.

    Policy and reference share the head, and their hidden states differ, as after a few steps of training.
    """
    made = make_inputs(case._replace(dtype=torch.float32))
    head = (made.weight[POLICY] * LOGIT_SIZE).to(case.dtype)
    policy = made.hidden[POLICY]
    direction = made.hidden[REFERENCE] - policy
    # For small distances KL grows with the distance squared; a few steps find the distance for any.
    scale, mean = 1.0, 0.0
    for _ in range(6):
        reference = (policy + scale * direction).to(case.dtype)
        rows = [policy.to(case.dtype), made.hidden[1].to(case.dtype), reference]
        inputs = Inputs(rows, [head, head, head.clone()], [], made.targets)
        with torch.no_grad():
            exact = first_tokens(inputs, case.n_tokens, torch.float64)
            mean = float(case.function.eager(exact)[0].mean())
        if abs(mean / kl - 1) < 0.02:
            break
        scale *= (kl / mean) ** 0.5
    return inputs, mean
