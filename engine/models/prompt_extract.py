"""Takes the function out of what a model says: out of a fenced block, a repeated prompt, or text behind it.

The action of a coding environment is the body of one function, or a whole program that defines it. What is
cut here is only what surrounds it: a program's mistakes stay in it, for the model is to learn from them, and
so do its strings, blank lines and all.
"""

import ast
import re
import textwrap

from etpo.envs.prompts import binds, defines, definition, lines_of, parsed

_FENCE = re.compile(r"^([ \t]*)(```+|~~~+)[^\n]*\n(.*?)(?:^[ \t]*\2[^\n]*$|\Z)", re.DOTALL | re.MULTILINE)
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_SIGNATURE = re.compile(r"^def (\w+)\(([^)]*)\)[^\n]*:\s*\Z", re.MULTILINE)


def signature_of(state: str) -> tuple[str, str] | None:
    """(name, parameters) of the function whose body a state asks for; None where it ends in no `def`."""
    found = _SIGNATURE.search(state)
    return (found[1], found[2]) if found else None


def extract(said: str, name: str) -> str:
    """The body of the function `name`, or a program that defines it, from all that a model said.

    Args:
        said: the model's whole answer.
        name: of the function that was asked for.

    Returns:
        Of several fenced blocks the last that defines the function, else the first. Of a program: from the
        first import or definition to the end of the last definition. Of a body: the lines before the first
        that is not indented, where the first one is. A text with a mistake is not cut at its end.
    """
    said = said.removeprefix("\ufeff")
    blocks = [_unindented(block, indent, name) for indent, _, block in _FENCE.findall(said)]
    if blocks:
        said = next((block for block in reversed(blocks) if defines(block, name)), blocks[0])
    return _program(said, name) if defines(said, name) else _body(said)


def _unindented(block: str, indent: str, name: str) -> str:
    """A fenced block without its fence's indentation, and a program without any of its own."""
    if indent:
        block = re.sub(f"^[ \t]{{1,{len(indent)}}}", "", block, flags=re.MULTILINE)
    if defines(block, name):
        return block
    at_margin = textwrap.dedent(block)
    return at_margin if defines(at_margin, name) else block


def _program(text: str, name: str) -> str:
    """The lines that belong to the program: from its first to its last import or definition."""
    lines = lines_of(text)
    tree = parsed(text)
    start, end = _span_in_prose(lines, name) if tree is None else _span(tree, name)
    return _strip_end(lines[start:end])


def _span(tree: ast.Module, name: str) -> tuple[int, int]:
    """First line and end of the program in a text that is all Python; a sentence of one word may be, too."""
    first = next(s for s in tree.body if not isinstance(s, ast.Expr))
    decorators = getattr(first, "decorator_list", [])
    start = min([first.lineno, *(decorator.lineno for decorator in decorators)]) - 1
    defined = next(i for i, s in enumerate(tree.body) if binds([s], name))
    last = tree.body[defined]
    for statement in tree.body[defined + 1 :]:
        is_more = isinstance(statement, (*_DEFINITIONS, ast.Import, ast.ImportFrom))
        if not is_more and not binds([statement], name):
            break
        last = statement
    return start, last.end_lineno or last.lineno


def _span_in_prose(lines: list[str], name: str) -> tuple[int, int]:
    """First line and end of the program among other lines, or of one with a mistake."""
    starts = [
        i for i, line in enumerate(lines) if re.match(r"(import|from|def|class|@)\b|@|\w+ *=[^=]", line)
    ]
    defined = next(i for i, line in enumerate(lines) if definition(name).match(line))
    # A sentence may begin with an import's word: the first start from which all parses up to the definition.
    start = next((i for i in starts if i <= defined and _parses(lines[i:defined])), defined)
    end = defined + 1
    for i in range(defined + 1, len(lines)):
        if lines[i].strip() and not lines[i][0].isspace() and lines[i][0] not in ")]}#@":
            # A definition further down belongs to the program, a sentence that begins like one does not.
            is_more = re.match(r"def \w+ *\(|class \w+|import \w+|from [\w.]+ import", lines[i])
            if not is_more and _parses(lines[start:i]):
                break
        end = i + 1
    return start, end


def _body(text: str) -> str:
    """An indented body without what follows it; a bare body without the prose behind its last return."""
    lines = lines_of(text)
    first = next((i for i, line in enumerate(lines) if line.strip()), None)
    if first is None:
        return text
    if lines[first][0].isspace():
        for i in range(first, len(lines)):
            at_margin = lines[i].strip() and not lines[i][0].isspace() and lines[i][0] != "#"
            if at_margin and _parses(["def _():", *lines[:i]]):  # else: inside of a bracket or a string
                return _strip_end(lines[:i])
        return text
    if parsed(text) is None:
        for i in range(len(lines) - 1, -1, -1):
            if re.match(r"return\b", lines[i]) and _parses(lines[: i + 1]):
                return "\n".join(lines[: i + 1]) + "\n"
    return text


def _strip_end(lines: list[str]) -> str:
    """The lines without blank ones, comments at the margin and decorators at their end."""
    while lines and (not lines[-1].strip() or lines[-1][0] in "#@"):
        lines = lines[:-1]
    return "\n".join(lines) + "\n"


def _parses(lines: list[str]) -> bool:
    return parsed("\n".join(lines)) is not None
