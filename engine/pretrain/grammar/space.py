"""The space of scikit-learn estimators: the arguments of each, from wide, fine ranges."""

from collections.abc import Callable

from etpo.engine.pretrain.grammar.program import Call, Draw

Maker = Callable[[Draw], str]


def real(low: float, high: float) -> Maker:
    """Log-uniform, two significant digits, sometimes one, as a short literal."""

    def make(d: Draw) -> str:
        value = d.log_uniform(low, high, 2 if d.coin(0.75) else 1)
        if value >= 1:
            return f"{value:.1f}" if value < 9.99 else f"{value:.0f}"
        if value >= 0.00099:
            return f"{value:.5f}".rstrip("0")
        return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-")

    return make


def whole(low: int, high: int) -> Maker:
    """Log-uniform integer, at most two significant digits."""
    return lambda d: str(round(d.log_uniform(low, high + 0.49, 2 if d.coin(0.75) else 1, least_step=1.0)))


def share(low: int, high: int) -> Maker:
    """Uniform hundredths, `low` and `high` in percent: 0.05 to 0.95."""
    return lambda d: f"{d.integer(low, high) / 100:.2f}".rstrip("0")


def word(*options: str) -> Maker:
    """One of some quoted strings."""
    return lambda d: f'"{d.pick(options)}"'


def literal(*options: str) -> Maker:
    """One of some literals as they stand."""
    return lambda d: d.pick(options)


SEED = ("random_state", 0.3, whole(1, 99))
DEPTH = whole(2, 16)
LEAF = whole(1, 20)

# name: keyword arguments as (key, probability that it is written, maker of its value)
SPACES: dict[str, tuple[tuple[str, float, Maker], ...]] = {
    "LogisticRegression": (
        ("C", 0.9, real(1e-3, 200)),
        ("class_weight", 0.12, word("balanced")),
        ("max_iter", 0.35, whole(50, 500)),
    ),
    "SGDClassifier": (
        ("loss", 1.0, word("log_loss", "modified_huber")),
        ("alpha", 0.8, real(1e-6, 0.3)),
        ("penalty", 0.35, word("l1", "elasticnet", "l2")),
        ("max_iter", 0.3, whole(50, 500)),
        SEED,
    ),
    "LinearDiscriminantAnalysis": (("solver", 0.0, word("lsqr")),),
    "QuadraticDiscriminantAnalysis": (("reg_param", 1.0, share(1, 99)),),
    "GaussianNB": (("var_smoothing", 0.7, real(1e-9, 1.0)),),
    "BernoulliNB": (
        ("alpha", 0.75, real(1e-3, 20)),
        ("binarize", 0.4, share(0, 99)),
        ("fit_prior", 0.15, literal("False")),
    ),
    "MultinomialNB": (("alpha", 0.8, real(1e-3, 20)), ("fit_prior", 0.2, literal("False"))),
    "ComplementNB": (("alpha", 0.8, real(1e-3, 20)), ("norm", 0.2, literal("True"))),
    "KNeighborsClassifier": (
        ("n_neighbors", 0.9, whole(1, 30)),
        ("weights", 0.45, word("distance")),
        ("p", 0.3, literal("1", "3")),
        ("metric", 0.2, word("manhattan", "chebyshev", "cosine", "hamming")),
    ),
    "DecisionTreeClassifier": (
        ("max_depth", 0.75, DEPTH),
        ("criterion", 0.3, word("entropy", "log_loss")),
        ("min_samples_leaf", 0.45, whole(1, 40)),
        ("ccp_alpha", 0.2, real(1e-4, 0.03)),
        ("max_features", 0.15, share(10, 99)),
        SEED,
    ),
    "ExtraTreeClassifier": (("max_depth", 0.7, DEPTH), ("min_samples_leaf", 0.6, LEAF), SEED),
    "RandomForestClassifier": (
        ("n_estimators", 1.0, whole(10, 90)),
        ("max_depth", 0.5, DEPTH),
        ("min_samples_leaf", 0.4, LEAF),
        ("max_features", 0.35, share(10, 99)),
        ("criterion", 0.15, word("entropy")),
        ("class_weight", 0.1, word("balanced")),
        SEED,
    ),
    "ExtraTreesClassifier": (
        ("n_estimators", 1.0, whole(10, 90)),
        ("max_depth", 0.45, DEPTH),
        ("min_samples_leaf", 0.4, LEAF),
        ("max_features", 0.4, share(10, 99)),
        ("bootstrap", 0.12, literal("True")),
        SEED,
    ),
    "GradientBoostingClassifier": (
        ("n_estimators", 0.9, whole(10, 100)),
        ("learning_rate", 0.8, real(0.01, 1.0)),
        ("max_depth", 0.55, whole(1, 6)),
        ("subsample", 0.4, share(40, 99)),
        ("min_samples_leaf", 0.2, LEAF),
        ("max_features", 0.25, share(10, 99)),
        SEED,
    ),
    "HistGradientBoostingClassifier": (
        ("max_iter", 1.0, whole(10, 80)),
        ("learning_rate", 0.8, real(0.01, 1.0)),
        ("max_leaf_nodes", 0.6, whole(3, 31)),
        ("min_samples_leaf", 0.4, whole(2, 60)),
        ("l2_regularization", 0.35, real(1e-3, 30)),
        SEED,
    ),
    "AdaBoostClassifier": (
        ("n_estimators", 0.95, whole(10, 80)),
        ("learning_rate", 0.7, real(0.03, 2.0)),
        SEED,
    ),
    "SVC": (
        ("C", 0.85, real(0.01, 300)),
        ("kernel", 0.3, word("poly", "sigmoid", "linear", "rbf")),
        ("gamma", 0.65, real(1e-3, 3.0)),
        ("class_weight", 0.08, word("balanced")),
    ),
    "NuSVC": (("nu", 1.0, share(3, 25)), ("gamma", 0.7, real(1e-3, 3.0))),
    "LinearSVC": (("C", 0.9, real(1e-3, 50)), ("class_weight", 0.1, word("balanced"))),
    "RidgeClassifier": (("alpha", 0.9, real(0.01, 300)),),
    "Perceptron": (("alpha", 0.7, real(1e-6, 0.01)), ("penalty", 0.4, word("l1", "l2"))),
    "LabelSpreading": (("gamma", 0.9, real(0.02, 30)), ("alpha", 0.5, share(1, 90))),
    "StandardScaler": (("with_mean", 0.04, literal("False")), ("with_std", 0.04, literal("False"))),
    "MinMaxScaler": (),
    "RobustScaler": (),
    "MaxAbsScaler": (),
    "QuantileTransformer": (
        ("n_quantiles", 1.0, whole(5, 90)),
        ("output_distribution", 0.5, word("normal")),
    ),
    "PowerTransformer": (),
    "Normalizer": (("norm", 0.3, word("l1", "max")),),
    "OneHotEncoder": (
        ("handle_unknown", 1.0, word("ignore")),
        ("min_frequency", 0.3, whole(2, 30)),
        ("max_categories", 0.15, whole(2, 12)),
    ),
    "KBinsDiscretizer": (("n_bins", 1.0, whole(2, 12)), ("strategy", 0.45, word("uniform", "kmeans"))),
    "SplineTransformer": (
        ("n_knots", 0.8, whole(2, 9)),
        ("degree", 0.5, literal("1", "2", "3")),
        ("knots", 0.25, word("quantile")),
    ),
    "SelectKBest": (("k", 1.0, whole(2, 30)),),
    "SelectPercentile": (("percentile", 1.0, whole(10, 95)),),
    "Nystroem": (
        ("kernel", 0.2, word("poly", "sigmoid", "cosine")),
        ("gamma", 0.7, real(1e-3, 3.0)),
        ("n_components", 0.85, whole(10, 120)),
        SEED,
    ),
    "RBFSampler": (("gamma", 0.8, real(1e-3, 3.0)), ("n_components", 0.85, whole(10, 120)), SEED),
}


def from_space(d: Draw, name: str) -> Call:
    """A call of `name` with arguments drawn from its table."""
    return Call(name, (), tuple((key, make(d)) for key, p, make in SPACES[name] if d.coin(p)))
