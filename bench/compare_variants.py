"""What is compared: algorithms by name, and variants of them with other options, written in one word.

A word is `ALGORITHM` or `ALGORITHM:OPTION=VALUE[:OPTION=VALUE…]`, such as `etpo:beta=0.3` or
`etpo:reflection=false`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from etpo.engine.config import OPTIONS
from etpo.engine.learners import ALGORITHMS
from etpo.engine.options import Declared, nearest

FROZEN = "reflection"  # the algorithm that moves nothing
_TRUE, _FALSE = ("true", "yes", "on"), ("false", "no", "off")

Settings = tuple[tuple[str, Any], ...]

# One factor at a time around an algorithm; the first of each is what the others are compared with.
ABLATIONS: dict[str, tuple[str, ...]] = {
    "reflection": ("etpo", "etpo:reflection=false"),
    "backup": ("etpo", "ppo-kl"),
    "beta": ("etpo", "etpo:beta=0.01", "etpo:beta=0.03", "etpo:beta=0.3", "etpo:beta=1"),
    "gamma": ("etpo", "etpo:gamma=0", "etpo:gamma=0.9", "etpo:gamma=1"),
    "lam": ("etpo", "etpo:lam=0", "etpo:lam=0.5", "etpo:lam=0.9", "etpo:lam=1"),
    "temperature": ("etpo", "etpo:temperature=0.7", "etpo:temperature=1.3"),
    "q-form": ("etpo-q", "etpo-q:q_form=logits", "etpo-q:q_form=residual"),
    "replay": ("etpo-q", "etpo-q:replay_capacity=32", "etpo-q:replay_capacity=128"),
}


@dataclass(frozen=True)
class Variant:
    """An algorithm with the options that are not its default.

    Attributes:
        name: the word that it was asked for by.
        algo: of `ALGORITHMS`.
        settings: (option, value) pairs.
    """

    name: str
    algo: str
    settings: Settings = ()

    def with_settings(self, more: Settings) -> "Variant":
        """The same name with further settings; they go before its own."""
        return Variant(self.name, self.algo, tuple((dict(self.settings) | dict(more)).items()))

    @property
    def slug(self) -> str:
        """A folder's name that says the algorithm and every setting."""
        return "-".join([self.algo, *(f"{name}={value}" for name, value in sorted(self.settings))])


def variant(word: str) -> Variant:
    """Read one word.

    Raises:
        ValueError: an unknown algorithm or option, or a value that the option does not take.
    """
    algo, *pairs = word.split(":")
    if algo not in ALGORITHMS:
        known = list(ALGORITHMS)
        raise ValueError(f"expected an algorithm ({', '.join(known)}), got '{algo}'{nearest(algo, known)}")
    return Variant(word, algo, tuple(setting_of(pair) for pair in pairs))


def variants(words: Sequence[str]) -> tuple[Variant, ...]:
    """Read several words, each once, in their order. Raises ValueError where there is none."""
    if not words:
        raise ValueError(f"expected algorithms with commas, some of {', '.join(ALGORITHMS)}; got none")
    return tuple(variant(word) for word in dict.fromkeys(words))


def ablation(name: str) -> tuple[str, ...]:
    """The words of an ablation. Raises ValueError for a name that is not there."""
    if name not in ABLATIONS:
        known = list(ABLATIONS)
        raise ValueError(f"expected an ablation ({', '.join(known)}), got '{name}'{nearest(name, known)}")
    return ABLATIONS[name]


def setting_of(pair: str) -> tuple[str, Any]:
    """`OPTION=VALUE` as the option's key and its checked value.

    Raises:
        ValueError: no such option, no value, or one that it does not take.
    """
    name, equals, text = pair.partition("=")
    key = name.strip().removeprefix("--").replace("-", "_")
    if not equals:
        raise ValueError(f"expected OPTION=VALUE, got '{pair}'")
    if key not in OPTIONS or key in ("algo", "dataset", "steps", "seed", "out"):
        raise ValueError(f"expected an option of `etpo train`, got '{name}'{nearest(key, list(OPTIONS))}")
    return key, OPTIONS[key].checked(_value(OPTIONS[key], text.strip()))


def _value(one: Declared, text: str) -> Any:
    """The text as a value of the option's kind; a text that is none is left for the check to refuse."""
    if one.kind is bool and text.lower() in _TRUE + _FALSE:
        return text.lower() in _TRUE
    try:
        return one.kind(text) if one.kind in (int, float) else text
    except ValueError:
        return text


def words_of(settings: Settings) -> list[str]:
    """The settings as flags of `etpo train`."""
    words: list[str] = []
    for name, value in settings:
        flag = OPTIONS[name].flag
        if isinstance(value, bool):
            words.append(flag if value else "--no-" + flag.removeprefix("--"))
        else:
            words += [flag, str(value)]
    return words
