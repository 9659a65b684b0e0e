"""Python source as HTML with its syntax marked, and what differs between two programs."""

import difflib
import re
from functools import lru_cache
from typing import NamedTuple

from markupsafe import Markup, escape
from pygments.lexers import PythonLexer
from pygments.token import Comment, Keyword, Name, Number, Operator, String, _TokenType

# What is told apart by colour, the first that fits; the style sheet has a class of each name.
_CLASSES: tuple[tuple[_TokenType, str], ...] = (
    (Comment, "c"), (Keyword, "k"), (Operator.Word, "k"), (String, "s"), (Number, "m"), (Name.Function, "f"),
    (Name.Class, "f"), (Name.Builtin, "b"), (Name.Namespace, "n"),
)  # fmt: skip


class DiffLine(NamedTuple):
    """One line of a difference: `+`, `-` or a blank, and the line with its syntax marked."""

    sign: str
    html: Markup


@lru_cache(maxsize=4096)
def python(source: str) -> Markup:
    """The source with its syntax marked; nothing of it but white space at its end is lost."""
    lexer = PythonLexer(stripnl=False, ensurenl=False)
    parts = [_marked(kind, text) for kind, text in lexer.get_tokens(source.rstrip())]
    return Markup("").join(parts)


def difference(old: str, new: str) -> list[DiffLine]:
    """The lines of `new`, and those that it has not of `old`, in their order."""
    lines = difflib.ndiff(old.rstrip().splitlines(), new.rstrip().splitlines())
    return [DiffLine(line[0], python(line[2:])) for line in lines if line[0] != "?"]


def family(source: str) -> str:
    """What a program builds: the names of the classes that it calls, in their order, or an empty string."""
    called = re.findall(r"(?<![\w.\"'])([A-Z]\w+)\(", source)
    return " + ".join(dict.fromkeys(called))


def _marked(kind: _TokenType, text: str) -> Markup:
    for group, css in _CLASSES:
        if kind in group and text.strip():
            return Markup('<span class="s-{}">{}</span>').format(css, text)
    return escape(text)
