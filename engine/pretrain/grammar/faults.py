"""The mistakes that people and models make, each as a change to a program that was right.

The kinds are many and none is frequent, so that no single token decides whether programs run.
"""

from collections.abc import Callable
from dataclasses import replace

from etpo.engine.pretrain.grammar.program import (
    MODULE_OF,
    Call,
    Draw,
    Named,
    Program,
    Size,
    Value,
    calls,
    imports_of,
    make_program,
    render,
    replace_call,
)
from etpo.engine.pretrain.grammar.slips import (
    Broken,
    Fault,
    bad_indent,
    extra_bracket,
    fit_without_labels,
    missing_bracket,
    missing_comma,
    missing_quote,
    not_a_frame,
    nothing_returned,
    other_returned,
    unfitted,
    wrong_method,
    wrong_shape,
    wrong_variable,
)
from etpo.engine.pretrain.grammar.wrong import (
    CLASS_TYPOS,
    FOREIGN_ARGUMENTS,
    MODULE_TYPOS,
    REGRESSOR_OF,
    RENAMED_ARGUMENTS,
    WRONG_WORDS,
)

CHANGES_COLUMNS = (
    "PolynomialFeatures", "OneHotEncoder", "SplineTransformer", "KBinsDiscretizer", "Nystroem", "RBFSampler",
    "PCA", "SelectKBest", "SelectPercentile",
)  # fmt: skip


def missing_import(d: Draw, program: Program, size: Size) -> Broken:
    if not program.imports:
        return None
    lost = d.integer(0, len(program.imports) - 1)
    return replace(program, imports=program.imports[:lost] + program.imports[lost + 1 :])


def wrong_module(d: Draw, program: Program, size: Size) -> Broken:
    options = [i for i, (module, _) in enumerate(program.imports) if module in MODULE_TYPOS]
    if not options:
        return None
    at = d.pick(options)
    module, name = program.imports[at]
    others = sorted({m for m in MODULE_OF.values() if m != module and m.count(".") == 1})
    return _import_changed(program, at, d.pick(others), name)


def misspelt_module(d: Draw, program: Program, size: Size) -> Broken:
    options = [i for i, (module, _) in enumerate(program.imports) if module in MODULE_TYPOS]
    if not options:
        return None
    at = d.pick(options)
    module, name = program.imports[at]
    return _import_changed(program, at, d.pick(MODULE_TYPOS[module]), name)


def wrong_class(d: Draw, program: Program, size: Size) -> Broken:
    """A name that scikit-learn does not have, imported and used."""
    call, typo = _misnamed(d, program)
    if call is None:
        return None
    model = replace_call(program.model, call, Call(typo, call.args, call.kwargs))
    imports = tuple((m, typo if n == call.name else n) for m, n in program.imports)
    return replace(program, imports=imports, model=_as_call(model))


def class_not_imported(d: Draw, program: Program, size: Size) -> Broken:
    """The right name imported, another one used."""
    call, typo = _misnamed(d, program)
    if call is None:
        return None
    return replace(
        program, model=_as_call(replace_call(program.model, call, Call(typo, call.args, call.kwargs)))
    )


def renamed_argument(d: Draw, program: Program, size: Size) -> Broken:
    options = [(c, k) for c, k in _arguments(program) if k in RENAMED_ARGUMENTS]
    if not options:
        return None
    call, key = d.pick(options)
    wrong = d.pick(RENAMED_ARGUMENTS[key])
    kwargs = tuple((wrong if k == key else k, v) for k, v in call.kwargs)
    return _model_changed(program, call, Call(call.name, call.args, kwargs))


def foreign_argument(d: Draw, program: Program, size: Size) -> Broken:
    """An argument of another class, of an older version, or of another library."""
    options = [c for c in calls(program.model) if c.name in FOREIGN_ARGUMENTS]
    if not options:
        return None
    call = d.pick(options)
    key, value = d.pick(FOREIGN_ARGUMENTS[call.name])
    if key in dict(call.kwargs):
        return None
    return _model_changed(program, call, Call(call.name, call.args, (*call.kwargs, (key, value))))


def quoted_number(d: Draw, program: Program, size: Size) -> Broken:
    options = [(c, k, v) for c, k, v in _literals(program) if _number(v) is not None and k != "random_state"]
    return _value_changed(d, program, options, lambda v: f'"{v}"')


def float_for_int(d: Draw, program: Program, size: Size) -> Broken:
    wanted = ("n_estimators", "n_neighbors", "max_iter", "max_depth", "n_knots", "n_bins", "max_leaf_nodes")
    options = [(c, k, v) for c, k, v in _literals(program) if k in wanted and v.isdigit()]
    ending = d.pick((".0", ".5"))
    return _value_changed(d, program, options, lambda v: v + ending)


def wrong_word(d: Draw, program: Program, size: Size) -> Broken:
    """A value that the argument does not know."""
    options = [c for c in calls(program.model) if c.name in WRONG_WORDS]
    if not options:
        return None
    call = d.pick(options)
    key, value = d.pick(WRONG_WORDS[call.name])
    return _model_changed(program, call, call.with_kwargs(**{key: value}))


def out_of_range(d: Draw, program: Program, size: Size) -> Broken:
    wanted = ("C", "alpha", "n_estimators", "n_neighbors", "max_depth", "learning_rate", "gamma", "max_iter",
              "min_samples_leaf", "subsample", "reg_param", "n_bins", "max_samples", "cv", "nu")  # fmt: skip
    options = [(c, k, v) for c, k, v in _literals(program) if k in wanted and _number(v) is not None]
    low, high = d.coin(0.5), d.pick(("2.0", "1.5", "5.0"))
    if not low:
        options = [o for o in options if o[1] in ("subsample", "reg_param", "max_samples", "nu")]
    else:
        options = [o for o in options if o[1] not in ("reg_param", "subsample")]
    return _value_changed(d, program, options, lambda v: f"-{v}" if low else high)


def no_probability(d: Draw, program: Program, size: Size) -> Broken:
    """A classifier that would have probabilities if it had been asked for them."""
    last = _last(program)
    if last.name in ("SVC", "NuSVC"):
        return _model_changed(program, last, last.with_kwargs(probability=None))
    if last.name == "SGDClassifier":
        loss = d.pick((None, '"hinge"', '"perceptron"', '"squared_hinge"'))
        return _model_changed(program, last, last.with_kwargs(loss=loss))
    if last.name == "VotingClassifier":
        voting = d.pick((None, '"hard"'))
        return _model_changed(program, last, last.with_kwargs(voting=voting))
    return None


def no_predict_proba(d: Draw, program: Program, size: Size) -> Broken:
    """A classifier that has none: margins only."""
    last = _last(program)
    if last.name == "CalibratedClassifierCV" and isinstance(last.args[0], Call):
        if last.args[0].name in ("GaussianNB", "ExtraTreeClassifier"):
            return None
        return _model_changed(program, last, last.args[0])
    if last.name not in ("LogisticRegression", "SGDClassifier", "LinearDiscriminantAnalysis"):
        return None
    name = d.pick(("RidgeClassifier", "LinearSVC", "Perceptron"))
    keys = {"RidgeClassifier": ("alpha",), "LinearSVC": ("C",), "Perceptron": ("alpha",)}[name]
    kept = tuple((k, v) for k, v in last.kwargs if k in keys)
    return _model_changed(program, last, Call(name, (), kept))


def regressor(d: Draw, program: Program, size: Size) -> Broken:
    last = _last(program)
    if last.name not in REGRESSOR_OF:
        return None
    name, keys = REGRESSOR_OF[last.name]
    args = last.args if name == "GaussianProcessRegressor" else ()
    return _model_changed(program, last, Call(name, args, tuple((k, v) for k, v in last.kwargs if k in keys)))


def class_for_instance(d: Draw, program: Program, size: Size) -> Broken:
    """The class itself where an instance is wanted."""
    bare = [c for c in calls(program.model) if not c.args and c.name in MODULE_OF]
    if not bare:
        return None
    return _text_changed(program, d.pick(bare))


def train_only(d: Draw, program: Program, size: Size) -> Broken:
    """A transformation of the training rows that the returned model does not know of."""
    model = program.model
    if model.name != "make_pipeline":
        return None
    *steps, last = [arg for arg in model.args if isinstance(arg, Call)]
    if not any(c.name in CHANGES_COLUMNS for c in steps):
        return None
    first: Call = steps[0] if len(steps) == 1 else Call("make_pipeline", tuple(steps))
    x = d.pick(("x", "features", "x_new"))
    fitted = f"fit_transform(x_train{', y_train' if d.coin(0.3) or 'Select' in render(first) else ''})"
    broken = make_program(last, program.var or "model", (f"@.fit({x}, y_train)", "return @"))
    imports = imports_of(first) + tuple(p for p in broken.imports if p not in imports_of(first))
    return replace(broken, imports=imports, before=(f"{x} = {render(first)}.{fitted}",))


def sparse_for_dense(d: Draw, program: Program, size: Size) -> Broken:
    for call in calls(program.model):
        if "sparse_output" in dict(call.kwargs):
            return _model_changed(program, call, call.with_kwargs(sparse_output=None))
        if dict(call.kwargs).get("encode") == '"onehot-dense"':
            return _model_changed(program, call, call.with_kwargs(encode=None))
    return None


def negative_values(d: Draw, program: Program, size: Size) -> Broken:
    """Counts wanted, standardised values given."""
    model = program.model
    if model.name != "make_pipeline" or not any(
        w in render(model) for w in ("chi2", "MultinomialNB", "ComplementNB")
    ):
        return None
    name = d.pick(("StandardScaler", "RobustScaler", "PowerTransformer"), (6, 2, 1))
    return _model_changed(program, model.args[0], Call(name))  # type: ignore[arg-type]


def absent_package(d: Draw, program: Program, size: Size) -> Broken:
    """A boosting or deep-learning library that is not there."""
    boosters = ("GradientBoostingClassifier", "HistGradientBoostingClassifier", "AdaBoostClassifier")
    found = [c for c in calls(program.model) if c.name in (*boosters, "RandomForestClassifier")]
    if not found:
        return None
    package, name = d.pick(
        (("xgboost", "XGBClassifier"), ("lightgbm", "LGBMClassifier"), ("catboost", "CatBoostClassifier"))
    )
    kept = tuple((k, v) for k, v in found[0].kwargs if k in ("n_estimators", "learning_rate", "max_depth"))
    changed = replace_call(program.model, found[0], Call(name, (), kept))
    imports = tuple((package, name) if n == found[0].name else (m, n) for m, n in program.imports)
    return replace(program, imports=imports, model=_as_call(changed))


def list_for_steps(d: Draw, program: Program, size: Size) -> Broken:
    """Pipelines and ensembles given their members in the wrong form."""
    for call in calls(program.model):
        if call.name == "make_pipeline":
            listed = "[" + ", ".join(render(arg) for arg in call.args) + "]"
            name = d.pick(("make_pipeline", "Pipeline"))
            return _renamed(program, call, Call(name, (listed,)))
        if call.args and isinstance(call.args[0], Named):
            members = [render(inner) for _, inner in call.args[0].pairs]
            bare = call.name != "Pipeline" or d.coin(0.5)
            listed = "[" + ", ".join(members) + "]" if bare else ", ".join(members)
            return _renamed(program, call, Call(call.name, (listed, *call.args[1:]), call.kwargs))
    return None


def too_many_components(d: Draw, program: Program, size: Size) -> Broken:
    """More components than features."""
    for call in calls(program.model):
        if call.name == "PCA":
            wrong = str(size.n_features + d.integer(1, 40))
            return _model_changed(program, call, call.with_kwargs(n_components=wrong))
    return None


def undefined_value(d: Draw, program: Program, size: Size) -> Broken:
    """A variable or a numpy call where a number stood, never defined or imported."""
    names = {"random_state": ("seed", "SEED", "rng"), "C": ("c", "best_c", "np.inf"), "cv": ("folds", "skf")}
    options = [(c, k, v) for c, k, v in _literals(program) if _number(v) is not None]
    if not options:
        return None
    call, key, _ = d.pick(options)
    value = d.pick(names.get(key, (key, f"best_{key}", f"params['{key}']")))
    return _model_changed(program, call, call.with_kwargs(**{key: value}))


def positional_argument(d: Draw, program: Program, size: Size) -> Broken:
    """A value without its name, where the first argument is another one or must be named."""
    options = [
        (c, k, v)
        for c, k, v in _literals(program)
        if c.name in MODULE_OF and not c.args and c.kwargs[0][0] == k
    ]
    if not options:
        return None
    call, _, value = d.pick(options)
    return _model_changed(program, call, Call(call.name, (value, *call.args), call.kwargs[1:]))


def search(d: Draw, program: Program, size: Size) -> Broken:
    """Search over hyperparameters, which the environment refuses."""
    final = [c for c in calls(program.model) if c.kwargs and c.name in MODULE_OF][-1:]
    if not final or program.model.name in ("make_pipeline", "Pipeline"):
        return None
    name, key = d.pick(
        (("GridSearchCV", "param_grid"), ("RandomizedSearchCV", "param_distributions")), (3, 1)
    )
    argument, value = final[0].kwargs[0]
    if not isinstance(value, str):
        return None
    grid = f'{{"{argument}": [{value}]}}'
    wrapped = Call(name, (program.model,), ((key, grid),) if d.coin(0.5) else (("cv", "3"), (key, grid)))
    return replace(program, model=wrapped, imports=(*program.imports, ("sklearn.model_selection", name)))


# kind: (weight, fault)
FAULTS: dict[str, tuple[float, Fault]] = {
    fault.__name__: (weight, fault)
    for weight, fault in (
        (6, missing_import), (4, wrong_module), (3.5, misspelt_module), (5, wrong_class),
        (3, class_not_imported), (5, renamed_argument), (4.5, foreign_argument), (4, quoted_number),
        (3, float_for_int), (4.5, wrong_word), (4, out_of_range), (5, unfitted), (3.5, fit_without_labels),
        (3.5, nothing_returned), (3, other_returned), (5.5, wrong_variable), (5, wrong_shape),
        (3, not_a_frame), (11, no_probability), (9, no_predict_proba), (4, regressor), (3, wrong_method),
        (3, class_for_instance),
        (5, missing_bracket), (2, extra_bracket), (3, missing_quote), (3, missing_comma), (2.5, bad_indent),
        (8, train_only), (20, sparse_for_dense), (25, negative_values), (5, absent_package),
        (5, list_for_steps), (20, too_many_components), (3, undefined_value), (3, positional_argument),
        (3, search),
    )
}  # fmt: skip


def _as_call(value: Value) -> Call:
    assert isinstance(value, Call)
    return value


def _last(program: Program) -> Call:
    """The final classifier, inside a pipeline where there is one."""
    model = program.model
    if model.name == "make_pipeline":
        model = _as_call(model.args[-1])
    elif model.name == "Pipeline" and isinstance(model.args[0], Named):
        model = model.args[0].pairs[-1][1]
    return model


def _arguments(program: Program) -> list[tuple[Call, str]]:
    return [(call, key) for call in calls(program.model) for key, _ in call.kwargs]


def _literals(program: Program) -> list[tuple[Call, str, str]]:
    return [(c, k, v) for c in calls(program.model) for k, v in c.kwargs if isinstance(v, str)]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _value_changed(
    d: Draw, program: Program, options: list[tuple[Call, str, str]], change: Callable[[str], str]
) -> Broken:
    if not options:
        return None
    call, key, value = d.pick(options)
    return _model_changed(program, call, call.with_kwargs(**{key: change(value)}))


def _model_changed(program: Program, old: Call, new: Call) -> Program:
    """The program with one call replaced; imports follow."""
    return make_program(_as_call(replace_call(program.model, old, new)), program.var, program.tail)


def _renamed(program: Program, old: Call, new: Call) -> Program:
    """As `_model_changed`, where members have become plain text: imports kept, the new name added."""
    model = _as_call(replace_call(program.model, old, new))
    pair = (MODULE_OF[new.name], new.name)
    imports = tuple(pair if n == old.name else (m, n) for m, n in program.imports)
    return replace(program, model=model, imports=imports)


def _import_changed(program: Program, at: int, module: str, name: str) -> Program:
    return replace(program, imports=(*program.imports[:at], (module, name), *program.imports[at + 1 :]))


def _text_changed(program: Program, bare: Call) -> Broken:
    text = "\n".join(program.lines())
    written = f"{render(bare)}"
    return text.replace(written, bare.name, 1) if written in text else None


def _misnamed(d: Draw, program: Program) -> tuple[Call | None, str]:
    options = [c for c in calls(program.model) if c.name in CLASS_TYPOS]
    if not options:
        return None, ""
    call = d.pick(options)
    return call, d.pick(CLASS_TYPOS[call.name])
