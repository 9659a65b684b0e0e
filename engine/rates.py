"""The step sizes that suit each optimiser; without torch, since the help of the command line names them."""

from typing import NamedTuple


class LearningRates(NamedTuple):
    """Step sizes of policy, critic and the critic's scalar head.

    gain: step of a final norm's gain g, as a share of ‖g‖² times the role's own; None: the role's own.
    """

    policy: float
    critic: float
    value: float
    gain: float | None


# Of a program's hundred tokens, a few decide its reward. Adam gives every weight a step of one size, so that
# those which saw only chance move as far as those which saw the cause; plain momentum moves by evidence: on
# stored programs of the bundled model its critic ranked held-out ones better at the same KL. So did a larger
# step of the gain (see `optim.role_optimizer`): programs that fail hold unlikely tokens.
LEARNING_RATES = {
    "sgd": LearningRates(policy=0.5, critic=1.2, value=0.1, gain=0.6),
    "adamw": LearningRates(policy=3e-4, critic=3e-4, value=3e-3, gain=None),
    "lion": LearningRates(policy=3e-5, critic=3e-5, value=3e-4, gain=None),
}
