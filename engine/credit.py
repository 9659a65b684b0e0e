"""Which token earned what: what an update knew of the tokens of some programs, kept with the run.

Nothing is computed for it but sums over numbers that the update had anyway. credit.jsonl holds two kinds of
records: `program`, the tokens of a program with their numbers, for the best, the worst and some drawn at
random of every stretch of the run; and `blame`, one an iteration, which counts how often the token that an
update blames most stands on the line that the interpreter names. docs/metrics.md explains each key.
"""

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from etpo.engine.behaviour import Behaviour
from etpo.engine.learners import Credit
from etpo.engine.replay import Action
from etpo.engine.run_folder import RunFolder, read_records

Record = dict[str, Any]
Numbers = dict[str, list[float]]

SAMPLES = 4  # programs drawn at random of each stretch
SHORTEST = 16  # programs of the first stretches
MOST_TOKENS = 1024  # of a program, that are kept
DIGITS = 5


@dataclass
class Stretch:
    """What is kept of the programs from `first` on; a program is named by its step."""

    first: int
    best: tuple[float, int] | None = None
    worst: tuple[float, int] | None = None
    sample: dict[int, float] = field(default_factory=dict)

    def reasons(self, step: int, reward: float, key: float) -> list[str]:
        """Why a program is kept, if it is: `best`, `worst`, `sample`. It then takes another's place."""
        found = []
        if self.best is None or reward > self.best[0]:
            self.best = reward, step
            found.append("best")
        if self.worst is None or reward < self.worst[0]:
            self.worst = reward, step
            found.append("worst")
        if len(self.sample) < SAMPLES or key < max(self.sample.values()):
            self.sample[step] = key
            if len(self.sample) > SAMPLES:
                del self.sample[max(self.sample, key=self.sample.__getitem__)]
            if step in self.sample:
                found.append("sample")
        return found


class CreditKeeper:
    """Chooses which programs of a run are kept with the numbers of their tokens.

    Args:
        folder: the run's; where it goes on, what credit.jsonl holds is what was chosen so far.
        seed: of the random sample.
        texts: tokens of an action -> what each adds to its text.
    """

    def __init__(self, folder: RunFolder, seed: int, texts: Callable[[Tensor], list[str]]) -> None:
        self.folder, self.seed, self.texts = folder, seed, texts
        self._stretches: dict[int, Stretch] | None = None

    def records(
        self, fresh: Sequence[Action], programs: Sequence[Record], acted: Behaviour, credit: Credit | None
    ) -> list[Record]:
        """What credit.jsonl gets of one iteration.

        Args:
            fresh: its actions, and `programs` their records, in the same order.
            acted: what is known of the policy that drew them.
            credit: what the update knew; None where there is none, or it says nothing.
        """
        numbers = by_action(acted.actions, {"logprob": acted.logprob, "kl": acted.kl})
        if credit is not None:
            known = by_action(credit.actions, columns_of(credit))
            numbers = {key: numbers[key] | known[key] for key in numbers if key in known}
        told = [
            (program, action, numbers[id(action)])
            for program, action in zip(programs, fresh, strict=True) if id(action) in numbers
        ]  # fmt: skip
        if self._stretches is None:
            self._stretches = chosen_so_far(read_records(self.folder.credit_file))
        found = []
        for program, action, columns in told:
            first = stretch_of(program["step"])
            stretch = self._stretches.setdefault(first, Stretch(first))
            key = draw(self.seed, program["step"])
            why = stretch.reasons(program["step"], program["reward"], key)
            if why:
                slot = {"stretch": first, "why": why, "draw": key}
                found.append(program_record(program, self.texts(action.tokens), columns) | slot)
        return [*found, *self._blame(told)]

    def _blame(self, told: Sequence[tuple[Record, Action, Numbers]]) -> list[Record]:
        counts = Blame()
        for program, action, columns in told:
            if {"q", "v"} <= columns.keys() and named_line(program["error"]) is not None:
                lines = lines_of_tokens(self.texts(action.tokens), program["text"])
                counts.add(named_line(program["error"]), lines, columns)
        if not counts.n or not told:
            return []
        return [{"kind": "blame", "step": told[-1][0]["step"], **counts.rounded()}]


@dataclass
class Blame:
    """Failed programs whose error names a line, and where the token that is blamed most stands.

    Tokens of the program alone count: to the token that ends it falls what V did not foresee of the reward.

    Attributes:
        n: such programs.
        on_line: those whose token with the lowest Q − V stands on that line.
        on_line_update: those whose token that the update weighs lowest stands there.
        by_chance: how many a token drawn at random would find.
    """

    n: int = 0
    on_line: int = 0
    on_line_update: int = 0
    by_chance: float = 0.0

    def add(self, line: int | None, lines: Sequence[int | None], columns: Numbers) -> None:
        """Count one program: the line of its error, and the line of each of its tokens."""
        inside = [k for k, one in enumerate(lines) if one is not None]
        if not inside:
            return
        local = [q - v for q, v in zip(columns["q"], columns["v"], strict=True)]
        update = columns.get("advantage", local)
        self.n += 1
        self.on_line += lines[min(inside, key=local.__getitem__)] == line
        self.on_line_update += lines[min(inside, key=update.__getitem__)] == line
        self.by_chance += sum(lines[k] == line for k in inside) / len(inside)

    def rounded(self) -> Record:
        return {
            "n": self.n, "on_line": self.on_line, "on_line_update": self.on_line_update,
            "by_chance": round(self.by_chance, DIGITS),
        }  # fmt: skip


def program_record(program: Record, texts: list[str], columns: Numbers) -> Record:
    """A program with the numbers of its tokens, for credit.jsonl."""
    kept = ("step", "env", "episode", "t", "reward", "outcome", "error")
    rounded = {name: [_rounded(x) for x in column[:MOST_TOKENS]] for name, column in columns.items()}
    return {
        "kind": "program", **{name: program[name] for name in kept},
        "line": named_line(program["error"]),
        "lines": lines_of_tokens(texts, program["text"])[:MOST_TOKENS], "texts": texts[:MOST_TOKENS],
        **rounded,
    }  # fmt: skip


def columns_of(credit: Credit) -> dict[str, Tensor]:
    """What an update knew of each token, by name."""
    names = ("advantage", "logprob_ref", "q", "v")
    return {name: x for name in names if (x := getattr(credit, name)) is not None}


def by_action(actions: Sequence[Action], columns: dict[str, Tensor]) -> dict[int, Numbers]:
    """Columns [K] as lists, an action at a time; keys are ids of the actions."""
    lengths = [len(action.tokens) for action in actions]
    parts = {name: x.detach().float().cpu().split(lengths) for name, x in columns.items()}
    return {
        id(action): {name: parts[name][index].tolist() for name in parts}
        for index, action in enumerate(actions)
    }


def stretch_of(step: int) -> int:
    """The first step of the stretch that a step is in: 16 programs, later a tenth of those before it.

    So a run of n programs has some ten stretches for each time that n grows by e, whatever `--steps` says:
    a run that is made longer keeps what it would have kept from the start.
    """
    first = 1
    while True:
        length = max(SHORTEST, first // 10)
        if step < first + length:
            return first
        first += length


def draw(seed: int, step: int) -> float:
    """A number in [0, 1) that is random, and the same for the same arguments."""
    digest = hashlib.sha256(f"{seed} {step}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def chosen_so_far(records: Iterable[Record]) -> dict[int, Stretch]:
    """The stretches as they were after the last of the records."""
    stretches: dict[int, Stretch] = {}
    for one in records:
        if one["kind"] != "program":
            continue
        stretch = stretches.setdefault(one["stretch"], Stretch(one["stretch"]))
        if "best" in one["why"]:
            stretch.best = one["reward"], one["step"]
        if "worst" in one["why"]:
            stretch.worst = one["reward"], one["step"]
        if "sample" in one["why"]:
            stretch.sample[one["step"]] = one["draw"]
            if len(stretch.sample) > SAMPLES:
                del stretch.sample[max(stretch.sample, key=stretch.sample.__getitem__)]
    return stretches


def named_line(error: str | None) -> int | None:
    """The line of the action that an error names, from 1 on; None where it names none."""
    match = re.match(r"line (\d+): ", error or "")
    return int(match[1]) if match else None


def lines_of_tokens(texts: Sequence[str], action: str) -> list[int | None]:
    """The line of the action that each token stands on, from 1 on; None for what is no part of it.

    A token stands where its first character stands that is no white space.
    """
    whole = "".join(texts)
    start = whole.find(action)
    lines: list[int | None] = []
    at = 0
    for text in texts:
        inside = len(text) - len(text.lstrip()) if text.strip() else 0
        position = at + inside
        is_part = 0 <= start <= position < start + len(action)
        lines.append(1 + whole.count("\n", start, position) if is_part else None)
        at += len(text)
    return lines


def _rounded(x: float) -> float | None:
    return round(x, DIGITS) if math.isfinite(x) else None
