"""Mistakes in the last lines of a program and in its spelling: fit and return, names, shapes, brackets."""

from collections.abc import Callable
from dataclasses import replace

from etpo.engine.pretrain.grammar.program import Draw, Program, Size
from etpo.engine.pretrain.grammar.wrong import METHOD_TYPOS

# A changed program, or its text where it is no program any more; None where the fault does not apply.
Broken = Program | str | None
Fault = Callable[[Draw, Program, Size], Broken]


def unfitted(d: Draw, program: Program, size: Size) -> Broken:
    return replace(program, tail=("return @",))


def fit_without_labels(d: Draw, program: Program, size: Size) -> Broken:
    return _tail_changed(program, "(x_train, y_train)", "(x_train)")


def nothing_returned(d: Draw, program: Program, size: Size) -> Broken:
    return replace(program, tail=("@.fit(x_train, y_train)",))


def other_returned(d: Draw, program: Program, size: Size) -> Broken:
    what = d.pick(
        ("@.predict(x_train)", "@.predict_proba(x_train)", "@.score(x_train, y_train)", "@.predict_proba",
         "@, x_train", "[@]"),
        (3, 3, 1, 1, 1, 1),
    )  # fmt: skip
    var = program.var or "model"
    return replace(program, var=var, tail=("@.fit(x_train, y_train)", f"return {what}"))


def wrong_variable(d: Draw, program: Program, size: Size) -> Broken:
    """A name that is not defined here: other spellings of the arguments, another name of the model."""
    tail = "\n".join(program.tail)
    kind = d.pick(("x", "y", "model"), (3, 3, 3))
    if kind == "model":
        wrong = d.pick([n for n in ("model", "clf", "pipe", "classifier", "estimator") if n != program.var])
        if program.var is None or tail.count("@") < 1:
            return None
        at = tail.rindex("@")
        tail = tail[:at] + wrong + tail[at + 1 :]
    elif kind == "x":
        tail = tail.replace("x_train", d.pick(("X_train", "X", "x", "x_tr", "X_train_scaled", "train_x")))
    else:
        tail = tail.replace("y_train", d.pick(("Y_train", "y", "labels", "y_tr", "target", "train_y")))
    return replace(program, tail=tuple(tail.split("\n")))


def wrong_shape(d: Draw, program: Program, size: Size) -> Broken:
    old, new = d.pick((
        ("x_train", "x_train[0]"), ("x_train", "x_train[:, 0]"), ("x_train", "x_train.T"),
        ("x_train", "x_train[:-1]"), ("x_train", "x_train.ravel()"), ("x_train", "[x_train]"),
        ("y_train", "y_train[:-1]"), ("y_train", "y_train[0]"), ("y_train", "[y_train]"),
        ("y_train", "y_train[:, 0]"), ("y_train", "y_train.reshape(1, -1)"), ("x_train", "x_train[:, 1:]"),
    ))  # fmt: skip
    return _tail_changed(program, old, new)


def not_a_frame(d: Draw, program: Program, size: Size) -> Broken:
    """Attributes of pandas, on numpy arrays."""
    old, new = d.pick((
        ("x_train", "x_train.values"), ("x_train", "x_train.to_numpy()"), ("x_train", "x_train.iloc[:, 1:]"),
        ("x_train", "x_train.fillna(0)"), ("y_train", "y_train.values"), ("y_train", "y_train.to_numpy()"),
        ("x_train", 'x_train.drop("id")'), ("x_train", "pd.get_dummies(x_train)"),
        ("x_train", "np.log1p(x_train)"), ("x_train", "x_train.toarray()"),
    ))  # fmt: skip
    return _tail_changed(program, old, new)


def wrong_method(d: Draw, program: Program, size: Size) -> Broken:
    return _tail_changed(program, "@.fit(", f"@.{d.pick(METHOD_TYPOS)}(")


def missing_bracket(d: Draw, program: Program, size: Size) -> Broken:
    return _without(d, program, ")")


def extra_bracket(d: Draw, program: Program, size: Size) -> Broken:
    lines = program.lines()
    at = d.pick([i for i, line in enumerate(lines) if line.endswith(")")])
    lines[at] += ")"
    return "\n".join(lines)


def missing_quote(d: Draw, program: Program, size: Size) -> Broken:
    return _without(d, program, '"')


def missing_comma(d: Draw, program: Program, size: Size) -> Broken:
    lines = program.lines()
    options = [(i, j) for i, line in enumerate(lines) for j, c in enumerate(line) if line[j : j + 2] == ", "]
    if not options:
        return None
    at, column = d.pick(options)
    lines[at] = lines[at][:column] + lines[at][column + 1 :]
    return "\n".join(lines)


def bad_indent(d: Draw, program: Program, size: Size) -> Broken:
    lines = program.lines()
    at = d.integer(1, len(lines) - 1)
    lines[at] = d.pick(("      ", "  ", "        ")) + lines[at].strip()
    return "\n".join(lines)


def _tail_changed(program: Program, old: str, new: str) -> Broken:
    tail = "\n".join(program.tail)
    return replace(program, tail=tuple(tail.replace(old, new, 1).split("\n"))) if old in tail else None


def _without(d: Draw, program: Program, character: str) -> Broken:
    lines = program.lines()
    options = [(i, j) for i, line in enumerate(lines) for j, c in enumerate(line) if c == character]
    if not options:
        return None
    at, column = d.pick(options)
    lines[at] = lines[at][:column] + lines[at][column + 1 :]
    return "\n".join(lines)
