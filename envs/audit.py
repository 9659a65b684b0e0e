"""Audits of programs that scored: do they know labels that they were not given? No channel need be known.

Two runs tell. With the splits in reverse order, an honest program predicts exactly what it predicted before;
one that passes labels from split to split does not. And on a table whose labels were permuted, an honest
program predicts no better than chance, neither the permuted labels of the other half (which only an earlier
split could have told it) nor the true ones (which nobody gave it).
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from etpo.envs.sandbox.result import SplitResult
from etpo.envs.splits import Split, chance_spread, permuted_splits, roc_auc, spread_columns

# Standard deviations over chance that no honest program reaches: one in thirty thousand does.
SUSPICIOUS = 4.0
# Of the mean over splits in terms of one split's: their validation halves share half of their rows.
SPREAD_OF_MEAN = 0.78

REVERSED = "the same program gave other probabilities when its splits ran in reverse order"
PERMUTED = "the program predicted permuted labels of rows that it was not given"
BY_HEART = "the program predicted the true labels after it was given permuted ones"

Rounds = Callable[[Mapping[str, str], Sequence[Split]], dict[str, list[SplitResult]]]
Table = Mapping[str, list[SplitResult]]


class Auditor:
    """Audits programs of one scorer.

    Args:
        rounds: runs (name → source) on splits, one split after another; name → results, until one fails.
        splits: those that the programs were scored on.
        x, y: the table, and the number of its classes.
    """

    def __init__(self, rounds: Rounds, splits: Sequence[Split], x: np.ndarray, y: np.ndarray) -> None:
        self._rounds = rounds
        self._splits = list(splits)
        self._x, self._y = x, y
        self._classes = int(y.max()) + 1
        self._permuted: dict[int, list[Split]] = {}

    def permuted(self, turns: int = 0) -> list[Split]:
        """The splits on the table whose labels were permuted once for all, class c renamed to c + turns."""
        if turns not in self._permuted:
            self._permuted[turns] = permuted_splits(self._splits, self._x, self._y, turns)
        return self._permuted[turns]

    def audit(self, sources: Mapping[str, str], scored: Table) -> dict[str, str]:
        """Name → what is wrong, of those programs that fail an audit.

        A run that ends in a time-out, without memory or with a crash proves nothing.

        Args:
            sources: name → complete source.
            scored: name → the results that the scores came from.
        """
        found = dict.fromkeys(self._order_matters(sources, scored), REVERSED)
        left = {name: source for name, source in sources.items() if name not in found}
        return found | self._beat_chance(left)

    def _order_matters(self, sources: Mapping[str, str], scored: Table) -> list[str]:
        backwards = {
            name: results[::-1] for name, results in self._rounds(sources, self._splits[::-1]).items()
        }
        differ = {name for name, results in backwards.items() if _differ(results, scored[name])}
        # One that differs from itself in the same order, too, has random numbers of its own: no proof.
        again = self._rounds({name: sources[name] for name in differ}, self._splits) if differ else {}
        return [name for name in sources if name in again and not _differ(again[name], scored[name])]

    def _beat_chance(self, sources: Mapping[str, str]) -> dict[str, str]:
        found: dict[str, str] = {}
        by_heart = []
        for name, results in self._rounds(sources, self.permuted()).items() if sources else ():
            if self._beats(results, self.permuted()):
                found[name] = PERMUTED
            elif self._beats(results, self._splits):
                by_heart.append(name)
        # What was learnt from permuted labels may happen to agree with the truth; then it disagrees as much
        # when the classes are renamed. What is known by heart stays.
        for turns in range(1, self._classes):
            if by_heart:
                runs = self._rounds({name: sources[name] for name in by_heart}, self.permuted(turns))
                by_heart = [name for name in by_heart if self._beats(runs[name], self._splits)]
        return found | dict.fromkeys(by_heart, BY_HEART)

    def _beats(self, results: list[SplitResult], labelled: Sequence[Split]) -> bool:
        """True where predictions fit the labels of the splits better than chance could."""
        if len(results) < len(labelled) or results[-1].proba is None:
            return False
        aucs, spreads = [], []
        for result, ran_on, split in zip(results, self.permuted(), labelled, strict=True):
            assert result.proba is not None
            proba = spread_columns(result.proba, ran_on.train_classes, self._classes)
            aucs.append(roc_auc(split.y_val, proba))
            spreads.append(chance_spread(split.y_val))
        spread = float(np.mean(spreads)) * (SPREAD_OF_MEAN if len(labelled) > 1 else 1.0)
        return math.isfinite(spread) and float(np.mean(aucs)) > 0.5 + SUSPICIOUS * spread


def _differ(these: list[SplitResult], those: list[SplitResult]) -> bool:
    """True where two runs of the same splits, each in the order of `those`, prove that they are not one."""
    if these and these[0].outcome in ("timeout", "memory", "crashed"):
        return False
    if len(these) != len(those):
        return True
    return any(
        a.proba is None or b.proba is None or a.proba.tobytes() != b.proba.tobytes()
        for a, b in zip(these, those, strict=True)
    )
