"""Classifiers and pipelines: which steps go together, so that a program without a fault runs anywhere.

Anywhere means: any table of finite numbers with at least 100 rows, 2 features and 2 classes.
"""

from etpo.engine.pretrain.grammar.program import Call, Draw, Named, Size
from etpo.engine.pretrain.grammar.space import from_space, real, share, whole, word

LINEAR = ("LogisticRegression", "SGDClassifier", "SVC", "MLPClassifier", "CalibratedClassifierCV")
TREES = (
    "DecisionTreeClassifier", "ExtraTreeClassifier", "RandomForestClassifier", "ExtraTreesClassifier",
    "GradientBoostingClassifier", "HistGradientBoostingClassifier", "AdaBoostClassifier",
)  # fmt: skip
DENSE = (
    "GaussianNB", "LinearDiscriminantAnalysis", "QuadraticDiscriminantAnalysis",
    "HistGradientBoostingClassifier", "GaussianProcessClassifier", "LabelSpreading",
)  # fmt: skip
POSITIVE = ("MultinomialNB", "ComplementNB")
SCALERS = (
    "StandardScaler", "MinMaxScaler", "RobustScaler", "MaxAbsScaler", "QuantileTransformer",
    "PowerTransformer", "Normalizer",
)  # fmt: skip
SCALER_WEIGHTS = (12, 5, 3, 2, 2.5, 0.7, 1)

FAMILIES = {
    "LogisticRegression": 11, "SGDClassifier": 5, "LinearDiscriminantAnalysis": 4,
    "QuadraticDiscriminantAnalysis": 3, "GaussianNB": 4, "BernoulliNB": 4, "MultinomialNB": 2.5,
    "ComplementNB": 1.5, "KNeighborsClassifier": 8, "DecisionTreeClassifier": 6, "ExtraTreeClassifier": 2,
    "RandomForestClassifier": 7, "ExtraTreesClassifier": 6, "GradientBoostingClassifier": 6,
    "HistGradientBoostingClassifier": 5, "AdaBoostClassifier": 4, "SVC": 8, "NuSVC": 1, "MLPClassifier": 6,
    "GaussianProcessClassifier": 1.5, "LabelSpreading": 1.5, "CalibratedClassifierCV": 5,
    "BaggingClassifier": 3.5, "OneVsRestClassifier": 1, "VotingClassifier": 5, "StackingClassifier": 3.5,
}  # fmt: skip
ENSEMBLES = ("CalibratedClassifierCV", "BaggingClassifier", "VotingClassifier", "StackingClassifier")
MEMBERS = {
    "LogisticRegression": 6, "GaussianNB": 4, "KNeighborsClassifier": 5, "DecisionTreeClassifier": 4,
    "RandomForestClassifier": 4, "ExtraTreesClassifier": 3, "GradientBoostingClassifier": 3, "SVC": 3,
    "LinearDiscriminantAnalysis": 2, "BernoulliNB": 2, "MLPClassifier": 1,
}  # fmt: skip
CALIBRATED = {
    "LinearSVC": 6, "SVC": 4, "RidgeClassifier": 4, "LogisticRegression": 3, "GaussianNB": 2,
    "BernoulliNB": 1, "Perceptron": 1, "GradientBoostingClassifier": 1.5, "ExtraTreesClassifier": 1,
    "DecisionTreeClassifier": 1,
}  # fmt: skip
MEMBER_NAMES = {
    "LogisticRegression": "lr", "GaussianNB": "nb", "KNeighborsClassifier": "knn",
    "DecisionTreeClassifier": "tree", "RandomForestClassifier": "rf", "ExtraTreesClassifier": "et",
    "GradientBoostingClassifier": "gb", "SVC": "svc", "LinearDiscriminantAnalysis": "lda",
    "BernoulliNB": "bnb", "MLPClassifier": "mlp", "SGDClassifier": "sgd",
}  # fmt: skip


def draw_model(d: Draw, size: Size) -> Call:
    """An unfitted classifier, alone or behind preparation steps."""
    family = d.pick(tuple(FAMILIES), tuple(FAMILIES.values()))
    if family == "QuadraticDiscriminantAnalysis" and size.n_rows < 4 * size.n_classes * size.n_features:
        family = "GaussianNB"  # too few rows of a class for its covariance
    final = _classifier(d, size, family)
    return _pipeline(d, [*_steps(d, size, family, final), final])


def _pipeline(d: Draw, steps: list[Call]) -> Call:
    if len(steps) == 1:
        return steps[0]
    if d.coin(0.12):
        names = ("prep", "features")[: len(steps) - 1]
        return Call("Pipeline", (Named(tuple(zip((*names, "model"), steps, strict=True))),))
    return Call("make_pipeline", tuple(steps))


def _classifier(d: Draw, size: Size, family: str) -> Call:
    """One classifier of a family, with predict_proba."""
    if family == "LogisticRegression":
        return _logistic(d, size)
    if family == "MLPClassifier":
        return _mlp(d)
    if family == "SVC":
        return _svc(d).with_kwargs(probability="True")
    if family == "NuSVC":
        return from_space(d, "NuSVC").with_kwargs(probability="True")
    if family == "LinearDiscriminantAnalysis":
        if d.coin(0.6):
            shrinkage = share(1, 99)(d) if d.coin(0.85) else '"auto"'
            return Call(family, (), (("solver", word("lsqr", "eigen")(d)), ("shrinkage", shrinkage)))
        return Call(family)
    if family == "GaussianProcessClassifier":
        return _gaussian_process(d)
    if family == "AdaBoostClassifier" and d.coin(0.5):
        base = Call("DecisionTreeClassifier", (), (("max_depth", str(d.integer(1, 4))),))
        return Call(family, (base,), from_space(d, family).kwargs)
    if family in ENSEMBLES or family == "OneVsRestClassifier":
        return _ensemble(d, size, family)
    return from_space(d, family)


def _logistic(d: Draw, size: Size) -> Call:
    call = from_space(d, "LogisticRegression")
    if not d.coin(0.25):
        return call
    if size.n_classes == 2 and d.coin(0.5):
        return call.with_kwargs(solver='"liblinear"')
    return call.with_kwargs(solver='"saga"', l1_ratio=share(1, 99)(d), max_iter=whole(30, 200)(d))


def _svc(d: Draw) -> Call:
    """A support vector machine; where the kernel does not bound distances, C is kept small for speed."""
    call = from_space(d, "SVC")
    kernel = dict(call.kwargs).get("kernel", '"rbf"')
    if kernel != '"rbf"' and "C" in dict(call.kwargs):
        call = call.with_kwargs(C=real(0.003, 5)(d))
    if kernel == '"poly"':
        call = call.with_kwargs(degree=d.pick(("2", "3", "4")))
        if d.coin(0.6):
            call = call.with_kwargs(coef0=real(0.1, 5.0)(d))
    return call


def _mlp(d: Draw) -> Call:
    layers = [whole(4, 40)(d) for _ in range(2 if d.coin(0.25) else 1)]
    kwargs: list[tuple[str, str]] = [
        ("hidden_layer_sizes", "(" + ", ".join(layers) + ("," if len(layers) == 1 else "") + ")")
    ]
    if d.coin(0.35):
        kwargs.append(("activation", word("tanh", "logistic")(d)))
    if d.coin(0.5):
        kwargs.append(("solver", '"lbfgs"'))
    elif d.coin(0.85):
        kwargs.append(("learning_rate_init", real(0.002, 0.1)(d)))
    if d.coin(0.65):
        kwargs.append(("alpha", real(1e-5, 10)(d)))
    kwargs.append(("max_iter", whole(20, 90)(d)))
    if d.coin(0.2):
        kwargs.append(("random_state", whole(1, 99)(d)))
    return Call("MLPClassifier", (), tuple(kwargs))


def _gaussian_process(d: Draw) -> Call:
    length = real(0.2, 20)(d)
    kernel = d.pick((
        Call("RBF", (length,)),
        Call("Matern", (length,), (("nu", d.pick(("0.5", "1.5", "2.5"))),)),
        Call("RationalQuadratic", (length,), (("alpha", real(0.05, 5)(d)),)),
    ), (5, 3, 2))  # fmt: skip
    return Call("GaussianProcessClassifier", (kernel,), (("optimizer", "None"),))


def _ensemble(d: Draw, size: Size, family: str) -> Call:
    if family == "CalibratedClassifierCV":
        base = d.pick(tuple(CALIBRATED), tuple(CALIBRATED.values()))
        call = _svc(d) if base == "SVC" else from_space(d, base)
        if "n_estimators" in dict(call.kwargs):
            call = call.with_kwargs(n_estimators=whole(8, 30)(d))
        kwargs = [("method", '"isotonic"')] if d.coin(0.35) else []
        return Call(family, (call,), (*kwargs, ("cv", str(d.integer(2, 5)))))
    if family == "OneVsRestClassifier":
        base = d.pick(("LogisticRegression", "GaussianNB", "DecisionTreeClassifier"), (3, 1, 1))
        return Call(family, (from_space(d, base),))
    if family == "BaggingClassifier":
        base = d.pick(("DecisionTreeClassifier", "KNeighborsClassifier", "LogisticRegression", "GaussianNB",
                       "ExtraTreeClassifier"), (4, 2, 3, 2, 2))  # fmt: skip
        kwargs = [("n_estimators", whole(5, 30)(d))]
        kwargs += [("max_samples", share(50, 99)(d))] if d.coin(0.5) else []
        kwargs += [("max_features", share(50, 99)(d))] if d.coin(0.5) else []
        return Call(family, (from_space(d, base),), tuple(kwargs))
    pairs = Named(tuple(_members(d, size, 3 if d.coin(0.25) else 2)))
    if family == "VotingClassifier":
        voting: tuple[tuple[str, str], ...] = (("voting", '"soft"'),)
        if d.coin(0.3):
            weights = ", ".join(str(d.integer(1, 9)) for _ in pairs.pairs)
            voting = (*voting, ("weights", f"[{weights}]"))
        return Call(family, (pairs,), voting)
    final = (Call("LogisticRegression", (), (("C", real(1e-3, 50)(d)),)),) if d.coin(0.5) else ()
    through = (("passthrough", "True"),) if d.coin(0.2) else ()
    return Call(family, (pairs, *final), (("cv", str(d.integer(2, 3))), *through))


def _members(d: Draw, size: Size, count: int) -> list[tuple[str, Call]]:
    """Distinct cheap members of a voting or stacking ensemble."""
    pairs: list[tuple[str, Call]] = []
    left = dict(MEMBERS)
    for _ in range(count):
        family = d.pick(tuple(left), tuple(left.values()))
        del left[family]
        call = _classifier(d, size, family)
        if "n_estimators" in dict(call.kwargs):
            call = call.with_kwargs(n_estimators=whole(10, 40)(d))
        if family not in TREES and d.coin(0.3):
            call = Call("make_pipeline", (_scaler(d), call))
        pairs.append((MEMBER_NAMES[family], call))
    return pairs


def _scaler(d: Draw) -> Call:
    return from_space(d, d.pick(SCALERS, SCALER_WEIGHTS))


def _steps(d: Draw, size: Size, family: str, final: Call) -> list[Call]:
    """Preparation steps that suit a family: none, scaling, encoding, selection, projection, crossing."""
    dense = family in DENSE or family in ENSEMBLES or family == "OneVsRestClassifier"
    dense = dense and not (family == "CalibratedClassifierCV" and final.args[0].name in ("LinearSVC", "SVC"))  # type: ignore[union-attr]
    if family in POSITIVE:
        first = d.pick((Call("MinMaxScaler"), _encoder(d, dense=False)))
        select = _selector(d, positive=True)
        return [first, select] if d.coin(0.3) else [first]
    if family in TREES:
        plan = d.pick(("", "encode", "scale", "select", "project", "encode select"), (76, 9, 4, 6, 3, 2))
    elif family in LINEAR:
        plan = d.pick(
            ("", "scale", "encode", "encode select", "encode cross", "select", "scale select",
             "scale project", "cross", "scale cross", "spline", "spline select", "kernel", "scale kernel"),
            (15, 20, 13, 6, 9, 2, 3, 5, 5, 4, 6, 2, 4, 6),
        )  # fmt: skip
    elif family == "QuadraticDiscriminantAnalysis":
        plan = d.pick(("", "scale", "select", "scale select", "scale project"), (5, 4, 1, 1, 2))
    else:
        plan = d.pick(
            ("", "scale", "encode", "encode select", "select", "scale select", "scale project", "spline"),
            (42, 24, 12, 4, 5, 4, 6, 3),
        )
    steps: list[Call] = []
    for kind in plan.split():
        if kind == "scale":
            steps.append(_scaler(d))
        elif plan == "encode cross" and kind == "encode":
            few = ("max_categories", whole(2, 5)(d))
            steps.append(Call("OneHotEncoder", (), (("handle_unknown", '"ignore"'), few)))
        elif kind == "encode":
            steps.append(_encoder(d, dense))
        elif kind == "select":
            steps.append(_selector(d, positive=plan.startswith("encode")))
        elif kind == "project":
            steps.append(_projection(d, size))
        elif kind == "spline":
            steps.append(from_space(d, "SplineTransformer"))
        elif kind == "kernel":
            steps.append(from_space(d, d.pick(("Nystroem", "RBFSampler"), (3, 1))))
        else:
            steps.append(_crossing(d, size, encoded=plan.startswith("encode")))
    return steps


def _encoder(d: Draw, dense: bool) -> Call:
    if d.coin(0.68):
        call = from_space(d, "OneHotEncoder")
        return call.with_kwargs(sparse_output="False") if dense else call
    call = from_space(d, "KBinsDiscretizer")
    if dense:
        return call.with_kwargs(encode=d.pick(('"onehot-dense"', '"ordinal"'), (3, 1)))
    return call.with_kwargs(encode='"ordinal"') if d.coin(0.15) else call


def _selector(d: Draw, positive: bool) -> Call:
    call = from_space(d, d.pick(("SelectKBest", "SelectPercentile")))
    scores = (Call("chi2"),) if positive and d.coin(0.4) else ()
    return Call(call.name, tuple(score.name for score in scores), call.kwargs)


def _projection(d: Draw, size: Size) -> Call:
    if d.coin(0.5):
        return Call("PCA", (), (("n_components", share(50, 99)(d)),))
    whiten = (("whiten", "True"),) if d.coin(0.3) else ()
    return Call("PCA", (), (("n_components", str(d.integer(2, min(size.n_features, 30)))), *whiten))


def _crossing(d: Draw, size: Size, encoded: bool) -> Call:
    """Products of features; of three only where there are few."""
    degree = "3" if size.n_features <= 12 and d.coin(0.12 if encoded else 0.35) else "2"
    kwargs = (("interaction_only", "True"),) if encoded or d.coin(0.6) else ()
    return Call("PolynomialFeatures", (), (("degree", degree), *kwargs))
