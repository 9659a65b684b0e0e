"""What a program may not do whatever its score: search over hyperparameters, as in the paper.

Found in the syntax tree, not in the text: a search estimator by name, attribute, import under any alias, or
`getattr` with a constant; scoring by cross-validation inside a loop or a comprehension, which is the same
search written out. Comments and strings may name them.
"""

import ast
import re
from collections.abc import Iterator

_SEARCH = re.compile(r"(\w*SearchCV|validation_curve)")
_CROSS_VALIDATION = ("cross_val_score", "cross_val_predict", "cross_validate")
_LOOPS = (ast.For, ast.While, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.Lambda)
_LOOKUPS = ("getattr", "__getattribute__", "attrgetter", "__getitem__", "get")


def forbidden_search(tree: ast.AST) -> tuple[str, int | None] | None:
    """(what is not allowed, its line) of the first search in a program, or None where there is none.

    Args:
        tree: the program's syntax tree.
    """
    aliases = _aliases(tree)
    for node, in_loop in _walk(tree, in_loop=False):
        for name in _names(node):
            real = aliases.get(name, name)
            if _SEARCH.fullmatch(real):
                return real, getattr(node, "lineno", None)
            if in_loop and real in _CROSS_VALIDATION and not isinstance(node, ast.Import | ast.ImportFrom):
                return f"{real} in a loop", getattr(node, "lineno", None)
    return None


def refusal_message(what: str) -> str:
    """The line for the reflection prompt."""
    return f"{what} is not allowed; choose the hyperparameters and fit one model"


def _aliases(tree: ast.AST) -> dict[str, str]:
    """Names that stand for a search or for cross-validation: `import … as`, and plain assignments."""
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            aliases |= {a.asname: a.name for a in node.names if a.asname}
        elif isinstance(node, ast.Assign):
            value = node.value
            source = (
                value.attr if isinstance(value, ast.Attribute)
                else value.id if isinstance(value, ast.Name) else None
            )  # fmt: skip
            if source in _CROSS_VALIDATION or aliases.get(source or "") in _CROSS_VALIDATION:
                real = aliases.get(source or "", source or "")
                aliases |= {t.id: real for t in node.targets if isinstance(t, ast.Name)}
    return {a: name for a, name in aliases.items() if _SEARCH.fullmatch(name) or name in _CROSS_VALIDATION}


def _walk(node: ast.AST, *, in_loop: bool) -> Iterator[tuple[ast.AST, bool]]:
    """Every node, and whether it runs more than once: in a loop's body, a comprehension or a lambda."""
    stack = [(node, in_loop)]
    while stack:
        current, looped = stack.pop()
        yield current, looped
        inside = looped or isinstance(current, _LOOPS)
        for child in reversed(list(ast.iter_child_nodes(current))):
            once = isinstance(current, ast.For) and child is current.iter
            stack.append((child, looped if once else inside))


def _names(node: ast.AST) -> Iterator[str]:
    """The names that a node brings in or uses."""
    if isinstance(node, ast.Name):
        yield node.id
    elif isinstance(node, ast.Attribute):
        yield node.attr
    elif isinstance(node, ast.Import | ast.ImportFrom):
        yield from (alias.name.rpartition(".")[2] for alias in node.names)
    elif isinstance(node, ast.Call):
        called = node.func
        name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
        if name in _LOOKUPS:
            yield from (constant for argument in node.args if (constant := _constant(argument)))
    elif isinstance(node, ast.Subscript) and (constant := _constant(node.slice)):
        yield constant  # vars(module)["GridSearchCV"]


def _constant(node: ast.AST) -> str | None:
    """A string that is written out, joined or not: `"Grid" + "SearchCV"`."""
    parts, stack = [], [node]
    while stack:
        part = stack.pop()
        if isinstance(part, ast.Constant) and isinstance(part.value, str):
            parts.append(part.value)
        elif isinstance(part, ast.BinOp) and isinstance(part.op, ast.Add):
            stack += [part.right, part.left]
        else:
            return None
    return "".join(parts)
