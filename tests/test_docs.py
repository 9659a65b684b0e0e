"""The guides name files that are there, their Python runs as written, and their commands are commands."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from etpo.cli.main import main
from tests.test_imports import MAY_IMPORT

ROOT = Path(__file__).parents[1]
FOLDERS = ("kernels", "engine", "envs", "cli", "bench", "tests", "docs")
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
# What a page's block needs to be seen by: the name of the file that the page says it is.
NAMED = {"environments.md": ["my_env.py", "regex_env.py"]}


def python_blocks() -> list[tuple[str, int, str]]:
    """(page, number of the block, its text) of every block of Python."""
    found = []
    for page in PAGES:
        blocks = [text for language, text in FENCE.findall(page.read_text("utf-8")) if language == "python"]
        found += [(page.name, number, text) for number, text in enumerate(blocks)]
    return found


def commands() -> list[tuple[str, str]]:
    """(page, line) of every `etpo …` in a block, or in a line that stands alone between back quotes."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        fenced = [block for language, block in FENCE.findall(text) if language in ("", "console", "bash")]
        lines = [line for block in fenced for line in block.splitlines()]
        lines += [line for line in text.splitlines() if line.startswith("    etpo ")]
        found += [(page.name, line.strip()) for line in lines if line.strip().startswith("etpo ")]
    return found


def words_of(line: str) -> list[str]:
    """The words of a command behind `etpo`: what explains it, after `#` or two blanks, left out."""
    return shlex.split(re.split(r"\s{3,}|\s#", line.replace("…", ""))[0])[1:]


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "README.md", "docs/architecture.md"])
def test_every_file_that_a_guide_names_is_there(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    named = set(re.findall(rf"(?:{'|'.join(FOLDERS)})/[\w/.-]*\w", text)) | set(
        re.findall(r"\]\(([\w/.-]+)\)", text)
    )
    missing = [
        name for name in named if not list(ROOT.glob(name)) and not list((ROOT / page).parent.glob(name))
    ]
    assert len(named) > 3
    assert not [name for name in missing if "NAME" not in name]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)(?:#[\w-]+)?\)", page.read_text(encoding="utf-8"))
    assert not [link for link in links if "://" not in link and not (page.parent / link).exists()]


def test_the_guide_has_a_line_for_every_room() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rooms = {f"| `{room.replace('.', '/')}/` |" for room in MAY_IMPORT}
    missing = {room for room in rooms if room not in text}
    assert missing <= {
        f"| `{room}/` |" for room in ("envs/datasets", "envs/words", "engine/pretrain/grammar")
    }


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("page", "number", "text"), [
    pytest.param(*block, id=f"{block[0]}-{block[1]}") for block in python_blocks()
])  # fmt: skip
def test_python_of_a_page_runs_as_written(page: str, number: int, text: str, tmp_path: Path) -> None:
    file = tmp_path / NAMED.get(page, ["block.py"] * 9)[number]
    file.write_text(text, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, file.name], cwd=tmp_path, capture_output=True, text=True, timeout=580
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(("page", "line"), sorted(set(commands())))
def test_a_command_of_a_page_is_one(page: str, line: str) -> None:
    words = words_of(line)
    command: click.Command = main
    context = click.Context(main)
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        name, *words = words
        found = command.get_command(context, name)
        assert found is not None, f"{page}: {line}"
        command = found
    command.make_context(command.name, words, parent=context, resilient_parsing="--help" in words)


def test_the_commands_of_the_pages_are_found() -> None:
    """Guards the test above: an expression that finds nothing would pass it."""
    assert len(commands()) > 15
    assert words_of("etpo train --dataset a.csv --target 'x y'   # as you like") == [
        "train", "--dataset", "a.csv", "--target", "x y",
    ]  # fmt: skip


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: make docs installs it")
    command = [sys.executable, "-P", "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "WARNING" not in done.stderr
    assert "linear_kl" in (tmp_path / "api.html").read_text(encoding="utf-8")
    assert "--dataset" in (tmp_path / "commands.html").read_text(encoding="utf-8")
