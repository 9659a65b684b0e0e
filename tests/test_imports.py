"""Imports run one way, from room to room as this table says.

cli → bench → engine → {envs, kernels}; those two import nothing else of etpo. Inside, each folder has a rule
of its own. The empty name is the package itself: its version, and the base of its exceptions.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("bench", "cli", "engine", "envs", "kernels")
# What the files of a folder may import of etpo besides what is in that folder. A file keeps the rule of the
# innermost folder that stands here.
MAY_IMPORT = {
    "kernels": set(),
    "envs": {""},
    "envs.datasets": {""},
    "envs.words": {"envs.text_space"},
    "envs.sandbox": {""},
    "envs.sandbox.box": set(),
    "engine": {"", "envs", "kernels"},
    "engine.models": {"", "kernels", "envs.prompts", "engine.config"},
    "engine.learners": {
        "kernels", "engine.behaviour", "engine.config", "engine.losses", "engine.models", "engine.optim",
        "engine.policy_gradient", "engine.replay", "engine.returns", "engine.step", "engine.surrogates",
        "engine.targets", "engine.values",
    },
    "engine.agents": {
        "", "engine.checkpoint", "engine.config", "engine.environments", "engine.interrupt",
        "engine.models.prompt_form", "engine.progress", "engine.records", "engine.run_folder", "envs.answers",
    },
    "engine.report": {"", "engine.config", "engine.run_folder", "envs.prompts"},
    "engine.pretrain": {
        "envs", "engine.checkpoint", "engine.drawing", "engine.models", "engine.optim", "engine.run_folder",
    },
    "engine.pretrain.grammar": {"envs.prompts", "envs.sandbox", "envs.scoring"},
    "bench": {"", "engine", "envs", "kernels"},
    "bench.kernels": {"kernels", "engine.machine"},
    "cli": {"", "bench", "engine", "envs", "kernels"},
}  # fmt: skip


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


def forbidden(source: str, package: str) -> list[str]:
    """One line for each import that the rule of the folder `package`, such as `engine.models`, forbids."""
    room = package
    while room not in MAY_IMPORT:
        room = room.rpartition(".")[0]
    found = []
    for line, name in imported_modules(source, f"etpo.{package}"):
        first, _, rest = name.partition(".")
        if first in PACKAGES:
            found.append(f"{line}: imports {first}, which must be spelled etpo.{first}")
        elif first == "etpo":
            target = rest if rest.partition(".")[0] in PACKAGES else ""
            if not any(is_in(target, other) for other in {room, *MAY_IMPORT[room]}):
                found.append(f"{line}: etpo.{room} must not import {name}")
    return found


def is_in(module: str, room: str) -> bool:
    """True for the room itself and for what is inside; nothing is inside the empty room."""
    return module == room or (bool(room) and module.startswith(f"{room}."))


@pytest.mark.parametrize("folder", PACKAGES)
def test_imports_run_one_way(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    found = []
    for path in files:
        package = ".".join(path.relative_to(ROOT).parent.parts)
        lines = forbidden(path.read_text(encoding="utf-8"), package)
        found += [f"{path.relative_to(ROOT)}:{line}" for line in lines]
    assert not found, "\n".join(found)


def test_every_folder_of_the_table_is_there() -> None:
    assert [
        room for room in MAY_IMPORT if not (ROOT / room.replace(".", "/") / "__init__.py").is_file()
    ] == []


def test_algorithms_share_parts_and_not_each_other() -> None:
    for path in (ROOT / "engine" / "learners").glob("[!_]*.py"):
        names = {
            name for _, name in imported_modules(path.read_text(encoding="utf-8"), "etpo.engine.learners")
        }
        others = {name for name in names if name.startswith("etpo.engine.learners.") and name.count(".") > 3}
        assert not others, f"{path.name} imports {others}"


def test_only_who_starts_a_run_imports_the_loop() -> None:
    """Not even the agents' loop: what the two share stands beside them."""
    users = [
        path.relative_to(ROOT).as_posix()
        for path in sorted((ROOT / "engine").rglob("*.py"))
        for _, name in imported_modules(path.read_text(encoding="utf-8"), "etpo.engine")
        if is_in(name, "etpo.engine.loop") or is_in(name, "etpo.engine.run")
    ]
    assert set(users) <= {"engine/loop.py"}


@pytest.mark.parametrize(
    ("source", "package"),
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
        ("from etpo.engine.run import Run", "engine.models"),
        ("from etpo.envs.scoring import Scorer", "engine.models"),
        ("from etpo.engine.loop import train", "engine.agents"),
        ("from etpo.engine.learners import Learner", "engine.report"),
        ("from etpo.envs.sandbox.result import SplitResult", "envs.sandbox.box"),
        ("from ..result import SplitResult", "envs.sandbox.box"),
        ("from etpo.engine.models.roles import Role", "engine.pretrain.grammar"),
    ],
)
def test_the_rule_sees_every_kind_of_import(source: str, package: str) -> None:
    assert len(forbidden(source, package)) == 1


@pytest.mark.parametrize(
    ("source", "package"),
    [
        ("from . import losses\nfrom .streams import Stream\nimport etpo.kernels.losses", "kernels"),
        (
            "from etpo.kernels import Stream\nfrom ..envs import vector\nfrom etpo import __version__",
            "engine",
        ),
        ("import torch\nfrom transformers import AutoTokenizer", "envs"),
        ("from etpo.envs import prompts\nfrom etpo.kernels import Stream", "engine.models"),
        ("from . import wire\nfrom .wire import read", "envs.sandbox.box"),
    ],
)
def test_the_rule_lets_the_right_imports_pass(source: str, package: str) -> None:
    assert forbidden(source, package) == []
