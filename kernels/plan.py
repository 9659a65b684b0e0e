"""Which planes of logits a statistic reads. Data only.

Statistics go by their index in `VocabStats`, planes by that of their stream; U is the plane mixed of R and Q.
"""

from etpo.kernels.streams import VocabStats

NAMES = VocabStats._fields
INDEX = {name: k for k, name in enumerate(NAMES)}
LSE_P, LSE_Q, LSE_R, LSE_U, E_PR, E_PU, E_PP, E_Q, AT_P, AT_Q, AT_R = range(len(NAMES))
EXPECTATIONS = frozenset((E_PR, E_PU, E_PP, E_Q))

P, Q, R, U = range(4)
LSE = (LSE_P, LSE_Q, LSE_R, LSE_U)
AT = (AT_P, AT_Q, AT_R)

# By statistic; where U is among them, its streams are too.
READS = {
    LSE_P: {P},
    LSE_Q: {Q},
    LSE_R: {R},
    LSE_U: {U},
    E_PR: {P, R},
    E_PU: {P, U},
    E_PP: {P},
    E_Q: {P, Q},
    AT_P: {P},
    AT_Q: {Q},
    AT_R: {R},
}
# By stream: the statistics whose derivative by its logits holds softmax p.
THROUGH_P = {P: EXPECTATIONS | {LSE_P}, Q: {E_Q}, R: {E_PR}}
