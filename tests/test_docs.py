"""The guides name files and rooms that are there."""

import re
from pathlib import Path

import pytest

from tests.test_imports import MAY_IMPORT

ROOT = Path(__file__).parents[1]
FOLDERS = ("kernels", "engine", "envs", "cli", "bench", "tests", "docs")


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


def test_the_guide_has_a_line_for_every_room() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rooms = {f"| `{room.replace('.', '/')}/` |" for room in MAY_IMPORT}
    missing = {room for room in rooms if room not in text}
    assert missing <= {
        f"| `{room}/` |" for room in ("envs/datasets", "envs/words", "engine/pretrain/grammar")
    }
