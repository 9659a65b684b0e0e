"""Random choices with their probability, and programs as expression trees.

Every choice goes through `Draw`, which adds up −log p, so that a corpus comes with an upper bound on its own
entropy.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


class Draw:
    """A seeded source of choices that adds up their surprise.

    `nats` is −Σ log p of the choices made so far. Two derivations may give one text, so its mean is an upper
    bound on the entropy of the texts.
    """

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.nats = 0.0

    def pick(self, options: Sequence[T], weights: Sequence[float] | None = None) -> T:
        """One of `options`, with probability proportional to `weights` (equal where None)."""
        if weights is None:
            self.nats += math.log(len(options))
            return options[self.rng.randrange(len(options))]
        index = self.rng.choices(range(len(options)), weights)[0]
        self.nats -= math.log(weights[index] / math.fsum(weights))
        return options[index]

    def coin(self, p: float) -> bool:
        """True with probability `p`."""
        return self.pick((True, False), (p, 1.0 - p)) if 0.0 < p < 1.0 else p >= 1.0

    def integer(self, low: int, high: int) -> int:
        """Uniform from `low` to `high`, both included."""
        self.nats += math.log(high - low + 1)
        return self.rng.randint(low, high)

    def log_uniform(self, low: float, high: float, digits: int, least_step: float = 0.0) -> float:
        """Log-uniform in [low, high], rounded to `digits` significant digits and to whole `least_step`."""

        def step(value: float) -> float:
            return max(10.0 ** (math.floor(math.log10(value)) - digits + 1), least_step)

        span = math.log(high / low)
        raw = low * math.exp(self.rng.random() * span)
        value = round(raw / step(raw)) * step(raw)
        below = max(low, value - step(value * (1 - 1e-9)) / 2)
        above = min(high, value + step(value * (1 + 1e-9)) / 2)
        self.nats -= math.log(math.log(above / below) / span)
        return value


@dataclass(frozen=True)
class Call:
    """A constructor call. Arguments are literals (`str`), calls, or named lists of calls."""

    name: str
    args: tuple["Value", ...] = ()
    kwargs: tuple[tuple[str, "Value"], ...] = ()

    def with_kwargs(self, **changes: str | None) -> "Call":
        """The same call with keyword arguments replaced or added; None takes one away."""
        kept = tuple((key, changes.get(key, value)) for key, value in self.kwargs)
        new = tuple((key, value) for key, value in changes.items() if key not in dict(self.kwargs))
        return Call(self.name, self.args, tuple((k, v) for k, v in kept + new if v is not None))


@dataclass(frozen=True)
class Named:
    """A list of (name, estimator) pairs, as pipelines and ensembles want it."""

    pairs: tuple[tuple[str, Call], ...]


Value = str | Call | Named


@dataclass(frozen=True)
class Size:
    """The size of a data set as the prompt names it."""

    n_rows: int
    n_features: int
    n_classes: int


def render(value: Value) -> str:
    """Source text of an expression, on one line."""
    if isinstance(value, str):
        return value
    if isinstance(value, Named):
        return "[" + ", ".join(f'("{name}", {render(call)})' for name, call in value.pairs) + "]"
    parts = [render(arg) for arg in value.args] + [f"{key}={render(arg)}" for key, arg in value.kwargs]
    return f"{value.name}({', '.join(parts)})"


def calls(value: Value) -> list[Call]:
    """Every call in an expression, outermost first, in reading order."""
    if isinstance(value, str):
        return []
    if isinstance(value, Named):
        return [inner for _, call in value.pairs for inner in calls(call)]
    return [
        value,
        *(c for arg in value.args for c in calls(arg)),
        *(c for _, a in value.kwargs for c in calls(a)),
    ]


def replace_call(value: Value, old: Call, new: Value) -> Value:
    """`value` with the first occurrence of `old` (the same object) replaced by `new`."""
    if value is old:
        return new
    if isinstance(value, Named):
        return Named(tuple((name, replace_call(call, old, new)) for name, call in value.pairs))  # type: ignore[misc]
    if isinstance(value, Call):
        args = tuple(replace_call(arg, old, new) for arg in value.args)
        return Call(value.name, args, tuple((key, replace_call(arg, old, new)) for key, arg in value.kwargs))
    return value


_NAMES = {
    "sklearn.linear_model": (
        "LogisticRegression SGDClassifier RidgeClassifier Perceptron LinearRegression Ridge Lasso"
    ),
    "sklearn.discriminant_analysis": "LinearDiscriminantAnalysis QuadraticDiscriminantAnalysis",
    "sklearn.naive_bayes": "GaussianNB BernoulliNB MultinomialNB ComplementNB",
    "sklearn.neighbors": "KNeighborsClassifier KNeighborsRegressor",
    "sklearn.tree": "DecisionTreeClassifier ExtraTreeClassifier DecisionTreeRegressor",
    "sklearn.ensemble": (
        "RandomForestClassifier ExtraTreesClassifier GradientBoostingClassifier "
        "HistGradientBoostingClassifier AdaBoostClassifier "
        "BaggingClassifier VotingClassifier StackingClassifier RandomForestRegressor "
        "ExtraTreesRegressor GradientBoostingRegressor HistGradientBoostingRegressor"
    ),
    "sklearn.svm": "SVC NuSVC LinearSVC SVR",
    "sklearn.neural_network": "MLPClassifier MLPRegressor",
    "sklearn.gaussian_process": "GaussianProcessClassifier GaussianProcessRegressor",
    "sklearn.gaussian_process.kernels": "RBF Matern RationalQuadratic",
    "sklearn.calibration": "CalibratedClassifierCV",
    "sklearn.semi_supervised": "LabelSpreading",
    "sklearn.multiclass": "OneVsRestClassifier",
    "sklearn.pipeline": "make_pipeline Pipeline make_union",
    "sklearn.preprocessing": (
        "StandardScaler MinMaxScaler RobustScaler MaxAbsScaler QuantileTransformer PowerTransformer "
        "Normalizer OneHotEncoder KBinsDiscretizer SplineTransformer PolynomialFeatures"
    ),
    "sklearn.feature_selection": "SelectKBest SelectPercentile chi2 mutual_info_classif",
    "sklearn.decomposition": "PCA TruncatedSVD",
    "sklearn.kernel_approximation": "Nystroem RBFSampler",
}
MODULE_OF = {name: module for module, names in _NAMES.items() for name in names.split()}


@dataclass(frozen=True)
class Program:
    """A body of build_model: imports, preparation, `var = model`, and what is done with it.

    In `tail`, `@` stands for the model: its variable, or where `var` is None the expression itself.
    """

    imports: tuple[tuple[str, str], ...]
    model: Call
    var: str | None
    tail: tuple[str, ...]
    before: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """The body's lines, indented; names of one module that follow each other share a line."""
        grouped: list[tuple[str, list[str]]] = []
        for module, name in self.imports:
            known = next((names for m, names in grouped if m == module), None)
            if known is None:
                grouped.append((module, [name]))
            else:
                known.append(name)
        lines = [f"from {module} import {', '.join(names)}" for module, names in grouped]
        lines += self.before
        if self.var is not None:
            lines.append(f"{self.var} = {render(self.model)}")
        lines += [line.replace("@", self.var or render(self.model), 1) for line in self.tail]
        return ["    " + line for line in lines]

    def text(self) -> str:
        """The body, without a newline at its end."""
        return "\n".join(self.lines())


def imports_of(value: Value) -> tuple[tuple[str, str], ...]:
    """(module, name) for every known name in an expression, in order of appearance."""
    names: list[str] = []
    for call in calls(value):
        names += [call.name, *(arg for arg in call.args if isinstance(arg, str))]
    return tuple((MODULE_OF[name], name) for name in dict.fromkeys(names) if name in MODULE_OF)


def make_program(model: Call, var: str | None, tail: tuple[str, ...]) -> Program:
    """A program that imports what its model needs."""
    return Program(imports_of(model), model, var, tail)
