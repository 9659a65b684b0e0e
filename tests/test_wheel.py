"""What is built from the checkout works away from it: packages, data, command, kernels, report.

The dependencies are those of this environment; `make wheel-check` does the same in a fresh one.
"""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# As if etpo had never been installed for development here.
PLAIN = "import sys; sys.meta_path = [m for m in sys.meta_path if 'editable' not in repr(m).lower()]\n"


def run(code: str, cwd: Path, *folders: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PLAIN + code], cwd=cwd, env=environment, capture_output=True, text=True,
        timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's content, unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    build = "from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
    source = folder / "source"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file() and not name.startswith(("tests/", "docs/results/")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).symlink_to(ROOT / name)
    done = subprocess.run(
        [sys.executable, "-c", "import sys\n" + build, str(folder)],
        cwd=source,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        archive.extractall(folder / "installed")
    return folder / "installed"


@pytest.mark.slow
def test_every_module_and_file_is_in_the_wheel(wheel: Path) -> None:
    for package in ("kernels", "engine", "envs", "cli", "bench"):
        for file in (ROOT / package).rglob("*"):
            if file.suffix in (".py", ".j2", ".css", ".js", ".safetensors", ".txt", ".toml", ".json"):
                inside = wheel / "etpo" / file.relative_to(ROOT)
                assert inside.exists(), f"{file.relative_to(ROOT)} is missing; see pyproject.toml"


@pytest.mark.slow
def test_the_wheel_trains_and_reports_away_from_the_checkout(wheel: Path, tmp_path: Path) -> None:
    told = run(
        "import torch, etpo, etpo.kernels\n"
        "h, w = torch.randn(4, 8), torch.randn(50, 8)\n"
        "assert etpo.kernels.linear_kl(h, w, h, w).abs().max() < 1e-5\n"
        "print(etpo.__file__, etpo.kernels.__file__)",
        tmp_path, wheel,
    )  # fmt: skip
    assert all(path.startswith(str(wheel)) for path in told.split())
    command = "from etpo.cli.main import main; import sys; sys.argv = ['etpo', *{}]; main()"
    told = run(
        command.format(["train", "--env", "etpo/GridWorld-v0", "--steps", "16", "--max-new-tokens", "4",
                        "--threads", "1", "--out", "run"]),
        tmp_path, wheel,
    )  # fmt: skip
    assert "Report: run/report.html" in told
    assert run(command.format(["report", "run"]), tmp_path, wheel) == "Report: run/report.html\n"


@pytest.mark.slow
def test_the_kernels_need_nothing_but_torch(wheel: Path, tmp_path: Path) -> None:
    code = """
class Block:
    def find_spec(self, name, *_):
        if name.split('.')[0] in NAMES:
            raise ImportError(name)

sys.meta_path.insert(0, Block())
import torch
from etpo.kernels import linear_kl
from etpo.kernels.causal_lm import stream_of
print('ok')
"""
    others = [
        "transformers",
        "sklearn",
        "pandas",
        "click",
        "gymnasium",
        "scipy",
        "rich",
        "jinja2",
        "pygments",
    ]
    assert run(f"NAMES = {others}\n{code}", tmp_path, wheel) == "ok\n"


def test_the_checkout_is_importable_from_inside_without_an_installation() -> None:
    told = run("import etpo.kernels, etpo.envs.words; print(etpo.__version__)", ROOT, ROOT)
    assert told.strip()
