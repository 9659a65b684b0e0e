"""Pages as a browser shows them: no errors, nothing fetched, by keyboard, wide and narrow, light and dark.

What the browser needs is fetched once by npm into a cache; without node, npm or its registry this is skipped.
`ETPO_SCREENSHOTS=FOLDER` keeps the screenshots.
"""

import json
import math
import os
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from etpo.engine.config import Config
from etpo.engine.report.compare import write_comparison
from etpo.engine.report.page import write_report
from etpo.engine.run_folder import RunFolder

HERE = Path(__file__).parents[2] / "browser"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "etpo-browser"
SOURCE = """    from sklearn.ensemble import RandomForestClassifier
    model = RandomForestClassifier(n_estimators={n}, max_depth={depth})
    model.fit(x_train, y_train)
    return {name}
"""
ERRORS = ("line 4: NameError: name 'clf' is not defined", "took too long", "TypeError: fit() missing 'y'")


@pytest.fixture(scope="session")
def look() -> Any:
    """Looks at a page: what tests/browser/look.mjs found."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not installed")
    CACHE.mkdir(parents=True, exist_ok=True)
    for file in ("package.json", "look.mjs"):
        shutil.copy(HERE / file, CACHE)
    wanted = json.loads((HERE / "package.json").read_text())["dependencies"]
    have = {name: CACHE / "node_modules" / name / "package.json" for name in wanted}
    if not all(
        f.exists() and json.loads(f.read_text())["version"] == wanted[name] for name, f in have.items()
    ):
        command = ["npm", "install", "--no-audit", "--no-fund", "--no-package-lock", "--fetch-retries=1"]
        try:
            subprocess.run(command, cwd=CACHE, check=True, capture_output=True, text=True, timeout=240)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            pytest.skip(f"npm cannot fetch the browser: {str(getattr(error, 'stderr', error))[-200:]}")

    def look_at(page: Path, name: str) -> dict[str, Any]:
        shots = os.environ.get("ETPO_SCREENSHOTS")
        folder = Path(shots) / name if shots else None
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
        command = ["node", "look.mjs", str(page.resolve()), *([str(folder.resolve())] if folder else [])]
        done = subprocess.run(command, cwd=CACHE, capture_output=True, text=True, timeout=280)
        if "error while loading shared libraries" in done.stderr:
            pytest.skip(f"the browser does not start here: {done.stderr[-200:]}")
        assert done.returncode == 0, done.stderr[-2000:]
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    return look_at


def run_of(path: Path, n: int, seed: int = 0, steps_in_all: int = 0, **config: Any) -> RunFolder:
    """A folder as a run of n programs leaves it, with made-up numbers."""
    draws = random.Random(seed)
    folder = RunFolder.create(path, Config(steps=steps_in_all or n, seed=seed, **config))
    programs, credit, metrics = [], [], []
    for step in range(1, n + 1):
        failed = draws.random() > 0.4 + 0.5 * step / n
        error = draws.choice(ERRORS) if failed else None
        text = SOURCE.format(n=step, depth=draws.randrange(1, 12), name="clf" if failed else "model")
        reward = -1.0 if failed else 0.5 + 0.4 * draws.random()
        outcome = "ok" if not failed else "timeout" if error == ERRORS[1] else "error"
        auc = None if failed else reward
        programs.append({
            "step": step, "env": step % 4, "episode": step // 8, "t": step // 4 % 2, "text": text,
            "reward": reward, "outcome": outcome, "auc_mean": auc, "auc_std": None if failed else 0.01,
            "error": error,
        })  # fmt: skip
        if step % max(1, n // 60) == 0:
            texts = [piece for line in text.splitlines(keepends=True) for piece in line.split(" ")]
            texts = [*(" " + piece for piece in texts), ""]
            values = {name: [draws.gauss(0, 0.1) for _ in texts] for name in ("q", "v", "advantage")}
            if failed:
                values["q"][-2] -= 1.0
            credit.append({
                "kind": "program", "stretch": 1, "why": ["best", "worst", "sample"], "draw": draws.random(),
                "step": step, "t": 0, "reward": reward, "outcome": outcome, "error": error,
                "line": 4 if error == ERRORS[0] else None, "texts": texts,
                "lines": [1 + "".join(texts[:k]).count("\n") for k in range(len(texts) - 1)] + [None],
                "logprob": [-0.1] * len(texts), "logprob_ref": [-0.2] * len(texts), "kl": [0.1] * len(texts),
                **values,
            })  # fmt: skip
        if step % max(1, n // 40) == 0 or step == n:
            metrics.append({
                "step": step, "wall_s": step / 2, "kl_ref": step / n / 5, "kl_update": 0.03, "entropy": 1.0,
                "reward_mean": math.tanh(2 * step / n) + draws.gauss(0, 0.1), "runnable_share": 0.5,
                "distinct_share": 0.9, "loss_q": 0.3, "loss_pi": 0.1, "q_mean": 0.4, "v_mean": 0.3,
                "auc_best": 0.8, "tokens_per_s": 10.0,
            })  # fmt: skip
    credit.append({"kind": "blame", "step": n, "n": 9, "on_line": 4, "on_line_update": 2, "by_chance": 3.0})
    for file, records in (
        (folder.programs_file, programs), (folder.credit_file, credit), (folder.metrics_file, metrics),
    ):  # fmt: skip
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def check(found: dict[str, Any]) -> None:
    """What holds for every page."""
    assert found["errors"] == []
    assert found["requests"] == []
    assert [one for one in found["axe"] if one["impact"] in ("serious", "critical")] == []
    assert all(reach <= width for width, reach, _ in found["widths"]), found["widths"]


def test_the_page_of_a_run(look: Any, tmp_path: Path) -> None:
    found = look(write_report(run_of(tmp_path / "run", 200)), "run")
    check(found)
    keyboard = found["keyboard"]
    assert keyboard["tenths"] == ["programs 1 to 20", "programs 181 to 200"]
    first, second = keyboard["numbers"]
    assert first != second
    assert all(name in first for name in ("log π", "log π̄", "KL", "Q", "V", "Q − V", "share of the change"))
    assert keyboard["active"] != "token-1"
    assert keyboard["shared"].split()[:2] == ["from", "sklearn.ensemble"]  # the beginning that is kept to
    assert found["filter"]["all"] == "200 of 200 programs"
    assert "RandomForestClassifier" in found["filter"]["opened"][0]


def test_a_page_of_ten_thousand_programs_is_small_and_opens(look: Any, tmp_path: Path) -> None:
    page = write_report(run_of(tmp_path / "run", 10_000))
    assert page.stat().st_size < 10e6
    found = look(page, "large")
    check(found)
    print(f"{page.stat().st_size / 1e6:.2f} MB, ready after {found['ready_ms']} ms")
    assert found["filter"]["all"] == "10,000 of 10,000 programs"


def test_the_page_of_several_runs(look: Any, tmp_path: Path) -> None:
    folders = [
        run_of(tmp_path / f"{algo}-{seed}", 120, seed, algo=algo)
        for algo in ("etpo", "ppo-kl") for seed in range(3)
    ]  # fmt: skip
    check(look(write_comparison(folders, tmp_path / "compare.html"), "compare"))
