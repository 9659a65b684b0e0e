"""How an option is declared: what it is for, its unit and its bounds stand beside the field that holds it.

The checks of a configuration, the command line with its help, the TOML file and docs/options.md are made from
these declarations. Nothing here is about training.
"""

import dataclasses
import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Option:
    """What is known of one option besides its name, its type and its default.

    Attributes:
        group: the heading that it stands under.
        help: what it decides, for who has to choose.
        unit: of a number.
        low, above, high: least value, a value that it must exceed, largest value; None: no such bound.
        choices: the words that it may be, where its type does not list them.
        unset: what holds where its value is None.
        resumable: True where it may change when a run goes on: it decides how far and where, not what.
    """

    group: str
    help: str
    unit: str = ""
    low: float | None = None
    above: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    unset: str = ""
    resumable: bool = False

    def bounds(self) -> str:
        """`≥ 1 and ≤ 1024`, or an empty string."""
        signs = (("≥", self.low), (">", self.above), ("≤", self.high))
        return " and ".join(f"{sign} {bound}" for sign, bound in signs if bound is not None)


@dataclass(frozen=True)
class Declared:
    """One option of a configuration: a field, its type, and its `Option`.

    Attributes:
        name: the key in Python and in a TOML file.
        kind: int, float, str or bool.
        choices: the words that it may be; none: any value of its kind.
        is_optional: None is allowed.
    """

    name: str
    kind: type
    default: Any
    choices: tuple[str, ...]
    is_optional: bool
    option: Option

    @property
    def flag(self) -> str:
        return flag(self.name)

    def checked(self, value: Any) -> Any:
        """`value` where it is allowed; an int becomes a float where a float is wanted.

        Raises:
            ValueError: the message names the option, what was expected and what came.
        """
        if value is None and self.is_optional:
            return None
        if self.choices:
            return one_of(self.flag, value, self.choices)
        if self.kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, self.kind) or (isinstance(value, bool) and self.kind is not bool):
            raise ValueError(f"{self.flag}: expected {self.kind.__name__}, got {value!r}")
        if isinstance(value, int | float):
            self._check_bounds(value)
        return value

    def _check_bounds(self, value: float) -> None:
        option = self.option
        is_inside = (
            math.isfinite(value)
            and (option.low is None or value >= option.low)
            and (option.above is None or value > option.above)
            and (option.high is None or value <= option.high)
        )
        if not is_inside:
            number = "a number" if self.kind is int or option.high is not None else "a finite number"
            raise ValueError(f"{self.flag}: expected {number} {option.bounds()}, got {value}")


def setting(default: Any, group: str, help: str, **more: Any) -> Any:
    """A dataclass field that is an option; `more` are the other attributes of `Option`."""
    return dataclasses.field(default=default, metadata={"option": Option(group, help, **more)})


def declared(config_class: type) -> dict[str, Declared]:
    """The options of a dataclass whose fields are made by `setting`, by name, in their order."""
    hints = get_type_hints(config_class)
    found = {}
    for field in dataclasses.fields(config_class):
        option, hint = field.metadata["option"], hints[field.name]
        kinds = get_args(hint) if get_origin(hint) is not Literal else ()
        kind = next((k for k in kinds if k is not type(None)), hint)
        words = option.choices
        if get_origin(hint) is Literal:
            kind, words = str, get_args(hint)
        found[field.name] = Declared(
            field.name, kind, field.default, words, type(None) in kinds, option
        )  # fmt: skip
    return found


def flag(name: str) -> str:
    """The command-line spelling of a key: `max_kl_update` → `--max-kl-update`."""
    return "--" + name.replace("_", "-")


def one_of(what: str, word: Any, known: Sequence[str]) -> str:
    """`word`, which must be one of `known`. Raises ValueError with the nearest of them."""
    if word not in known:
        raise ValueError(
            f"{what}: expected one of {', '.join(known)}, got '{word}'{nearest(str(word), list(known))}"
        )
    return str(word)


def nearest(word: str, known: list[str]) -> str:
    """`; did you mean 'x'?` for the closest known word, or an empty string."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""
