"""Imports run one way: cli → bench → engine → {envs, kernels}; those two import nothing else of etpo.

Only the package itself, with its version and the base of its exceptions, is open to envs too.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What each folder may import of etpo besides itself; "" is the package's own __init__, with the version.
ALLOWED = {
    "kernels": set(),
    "envs": {""},
    "engine": {"", "envs", "kernels"},
    "bench": {"", "engine", "envs", "kernels"},
    "cli": {"", "bench", "engine", "envs", "kernels"},
}
PACKAGES = set(ALLOWED)


def imported_modules(source: str, package: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import in a file of `package`, wherever in the file it stands.

    `from m import n` counts as `m.n`, since n may be a module.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def forbidden(source: str, folder: str, package: str) -> list[str]:
    """One line for each import that the rule forbids in a file of etpo.`folder`."""
    found = []
    for line, name in imported_modules(source, package):
        first, _, rest = name.partition(".")
        if first in PACKAGES:
            found.append(f"{line}: imports {first}, which must be spelled etpo.{first}")
        elif first == "etpo":
            part = rest.partition(".")[0]
            target = part if part in PACKAGES else ""
            if target != folder and target not in ALLOWED[folder]:
                found.append(f"{line}: etpo.{folder} must not import {name}")
    return found


@pytest.mark.parametrize("folder", sorted(ALLOWED))
def test_imports_run_one_way(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    found = []
    for path in files:
        package = ".".join(["etpo", *path.relative_to(ROOT).parent.parts])
        lines = forbidden(path.read_text(encoding="utf-8"), folder, package)
        found += [f"{path.relative_to(ROOT)}:{line}" for line in lines]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("source", "folder"),
    [
        ("import etpo.engine.loop", "envs"),
        ("from etpo import kernels", "envs"),
        ("from etpo import __version__", "kernels"),
        ("def f():\n    from etpo.envs.vector import VectorEnv", "kernels"),
        ("if TYPE_CHECKING:\n    from etpo.cli import main", "engine"),
        ("from ..engine import loop", "kernels"),
        ("from .. import engine", "kernels"),
        ("from etpo.cli.main import main", "bench"),
        ("import kernels", "engine"),
        ("from kernels.losses import linear_kl", "engine"),
    ],
)
def test_the_rule_sees_every_kind_of_import(source: str, folder: str) -> None:
    assert len(forbidden(source, folder, f"etpo.{folder}")) == 1


@pytest.mark.parametrize(
    ("source", "folder"),
    [
        ("from . import losses\nfrom .streams import Stream\nimport etpo.kernels.losses", "kernels"),
        (
            "from etpo.kernels import Stream\nfrom ..envs import vector\nfrom etpo import __version__",
            "engine",
        ),
        ("import torch\nfrom transformers import AutoTokenizer", "envs"),
    ],
)
def test_the_rule_lets_the_right_imports_pass(source: str, folder: str) -> None:
    assert forbidden(source, folder, f"etpo.{folder}") == []
