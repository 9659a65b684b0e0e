"""What the agent reads: the task prompt, and after a failed program the reflection prompt.

A prompt ends in the signature of `build_model`, and the action is the indented body; the engine's
`prompt_form` puts it to models of other kinds. A state is a pure function of the data set's description and
of the last failure, so that equal states are equal strings and share one prefill.
"""

import ast
import io
import re
import tokenize
import unicodedata
import warnings
from collections.abc import Sequence

SIGNATURE = "def build_model(x_train, y_train):\n"
INDENT = "    "
ERROR_CHARACTERS = 160  # of an error, its name counted


def task_prompt(name: str, n_rows: int, n_features: int, n_classes: int) -> str:
    """The first state of an episode.

    Args:
        name: the data set's name, as given on the command line.
        n_rows, n_features, n_classes: its size after preparation.
    """
    return (
        f"# Data set {name}: {n_rows} rows, {n_features} features, {n_classes} classes.\n"
        "# Write build_model: return a fitted scikit-learn classifier with predict_proba.\n" + SIGNATURE
    )


def reflection_prompt(task: str, body: str, error: str, signature: str = SIGNATURE) -> str:
    """The state after a failed program: what was tried, how it failed, and the signature again.

    Args:
        task: the episode's task prompt (it ends in the signature).
        body: the failed action as it was drawn.
        error: one line that says what went wrong (see `describe_error`).
        signature: the line with `def` of the function that is asked for.
    """
    failed = body if body.endswith("\n") else body + "\n"
    return f"{task}{failed}# Failed: {error}\n# Corrected:\n{signature}"


def describe_error(exception: BaseException, line: int | None) -> str:
    """`describe_failure` of an exception."""
    return describe_failure(type(exception).__name__, str(exception), line)


def describe_failure(kind: str, message: str, line: int | None, limit: int = ERROR_CHARACTERS) -> str:
    """One short line for the reflection prompt: where, what kind, and the message without noise.

    Args:
        kind: the exception's name.
        message: what it says.
        line: the 1-based line of the program's body that raised it, or None where it is not in the body.
        limit: most characters of name and message together; what is longer is cut with an ellipsis.
    """
    message = clean_message(" ".join(without_controls(message).split()))
    kind = without_controls(kind)
    said = f"{kind}: {message}" if message else kind
    if len(said) > limit:
        said = said[: limit - 1] + "…"
    return f"line {line}: {said}" if line is not None else said


def without_controls(text: str) -> str:
    """Text in which line ends and tabs are spaces, and no other control or invisible character is left."""
    spaced = re.sub(r"\s", " ", text)
    return "".join(char for char in spaced if unicodedata.category(char)[0] != "C")


def clean_message(message: str) -> str:
    """A message without what says nothing of the mistake: paths, addresses, the order of sets, the data."""
    message = re.sub(r" \((/[^)]*|unknown location)\)", "", message)
    message = re.sub(r"(?:^|(?<=['\"\s=]))/(?:[\w.+-]+/)+(?=[\w.+-])", "", message)
    message = re.sub(r"0x[0-9a-fA-F]{6,}", "0x…", message)
    message = re.sub(r"array=\[[^\]]*\]?", "array=[…]", message)
    return re.sub(r"\{('[^{}]*')\}", lambda m: "{" + ", ".join(sorted(m[1].split(", "))) + "}", message)


def as_program(text: str) -> str:
    """Complete source from an action: the signature is put before a bare body, a whole program is kept.

    A body that is not indented is indented, but for the lines that begin inside of a string; a file that
    defines `build_model` itself is left alone.
    """
    text = text.removeprefix("\ufeff")
    if defines(text, "build_model"):
        return text
    lines = lines_of(text)
    first = next((line for line in lines if line.strip()), "")
    if first and not first[0].isspace():
        inside = _begin_inside_strings(text)
        lines = [
            INDENT + line if line.strip() and number not in inside else line
            for number, line in enumerate(lines, start=1)
        ]
    return SIGNATURE + "\n".join(lines) + "\n"


def defines(text: str, name: str) -> bool:
    """True where a text binds the name at its margin: by `def`, an assignment or an import, in any branch.

    Of a text that does not parse: where a line begins in `def name(`.
    """
    tree = parsed(text)
    if tree is None:
        return any(definition(name).match(line) for line in lines_of(text))
    if any(isinstance(statement, ast.Return) for statement in tree.body):  # a body, which may name itself
        return any(isinstance(s, ast.FunctionDef) and s.name == name for s in tree.body)
    return binds(tree.body, name)


def definition(name: str) -> re.Pattern[str]:
    """What the line of a function's definition begins with."""
    return re.compile(rf"(async\s+)?def\s+{name}\s*\(")


def binds(statements: Sequence[ast.AST], name: str) -> bool:
    """True where one of the statements, or one in their branches and loops, binds the name."""
    for statement in statements:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if statement.name == name:
                return True
        elif isinstance(statement, ast.Import | ast.ImportFrom):
            if any((alias.asname or alias.name.split(".")[0]) == name for alias in statement.names):
                return True
        elif isinstance(statement, ast.Name):
            if statement.id == name and isinstance(statement.ctx, ast.Store):
                return True
        elif not isinstance(statement, ast.Lambda) and binds(list(ast.iter_child_nodes(statement)), name):
            return True
    return False


def parsed(text: str) -> ast.Module | None:
    """The syntax tree of a text, or None where it has none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def lines_of(text: str) -> list[str]:
    """The lines of a text as Python parts them, without their ends.

    `str.splitlines` knows more line ends (form feeds, U+2028, …), which may stand inside of a string.
    """
    lines = re.split("\r\n|\r|\n", text)
    return lines[:-1] if lines[-1] == "" else lines


def _begin_inside_strings(text: str) -> set[int]:
    """Numbers of the lines, from 1 on, whose first character belongs to a string that began before."""
    inside: set[int] = set()
    source = "\n".join(lines_of(text)) + "\n"
    opened = []
    try:
        for token in tokenize.generate_tokens(io.StringIO(source, newline="\n").readline):
            kind = tokenize.tok_name[token.type]
            if kind.endswith("STRING_START"):  # of f- and t-strings, since Python 3.12
                opened.append(token.start[0])
            elif kind.endswith("STRING_END"):
                inside.update(range(opened.pop() + 1, token.end[0] + 1))
            elif kind == "STRING":
                inside.update(range(token.start[0] + 1, token.end[0] + 1))
    except (tokenize.TokenError, SyntaxError, IndexError):
        pass
    return inside
