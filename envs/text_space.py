"""The space of observations and actions of environments whose text is free."""

import string
from typing import Any

from gymnasium.spaces import Text

MAX_TEXT_CHARS = 1_000_000


class AnyText(Text):
    """Text of up to `MAX_TEXT_CHARS` characters, any of Unicode; samples are printable ASCII."""

    def __init__(self) -> None:
        super().__init__(MAX_TEXT_CHARS, min_length=0, charset=string.printable)

    def contains(self, x: Any) -> bool:
        return isinstance(x, str) and len(x) <= MAX_TEXT_CHARS

    def sample(self, mask: Any = None, probability: Any = None) -> str:
        """A short random text (the space's own longest would be a megabyte)."""
        if mask is None and probability is None:
            mask = (int(self.np_random.integers(1, 80)), None)
        return super().sample(mask, probability)
