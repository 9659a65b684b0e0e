"""`etpo compare` and `etpo bench learning --compare`, on a tiny model and an instant environment."""

import json
from pathlib import Path

import pytest


@pytest.mark.slow
def test_compare_makes_runs_tables_and_a_figure_and_then_only_reads(
    cli, tmp_path: Path, letters: str, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))  # the runs are processes of their own
    shared = [f"env={letters}", f"model={tiny_folder}", "max_new_tokens=4", "envs=2"]
    words = ["compare", "--datasets", "letters", "--algos", "etpo,reflection", "--seeds", "2", "--steps", "4"]
    words += [part for pair in shared for part in ("--set", pair)]
    words += ["--work", tmp_path / "work", "--jobs", "2"]
    made = cli(
        *words, "--json", tmp_path / "c.json", "--markdown", tmp_path / "c.md", "--plot", tmp_path / "c.svg"
    )
    assert made.exit_code == 0, made.output
    assert "[4/4] letters, " in made.stdout
    rows = json.loads((tmp_path / "c.json").read_text())["datasets"]["letters"]
    assert [row["algorithm"] for row in rows] == ["etpo", "reflection"]
    assert all(seed["cpu_s"] > 0 for row in rows for seed in row["seeds"])
    assert (tmp_path / "c.md").read_text().startswith("# Algorithms compared\n")
    assert (tmp_path / "c.svg").read_text().count("<polyline") == 2
    assert "etpo compare --datasets letters" in (tmp_path / "work" / "README.md").read_text()
    again = cli(*words)
    assert again.exit_code == 0
    assert again.stdout.startswith("# Algorithms compared")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["compare", "--algos", "etpoo"], "--algos: expected an algorithm"),
        (["compare", "--algos", ","], "--algos: expected algorithms"),
        (["compare", "--ablation", "gama"], "--ablation: expected an ablation"),
        (["compare", "--algos", "etpo", "--set", "beta"], "--set: expected OPTION=VALUE"),
        (["compare", "--datasets", ""], "--datasets: expected names"),
        (["compare", "--plot", "x.png"], "--plot: expected an .svg file"),
        (["bench", "learning", "--tune", "6"], "expected --compare"),
        (["bench", "learning", "--compare", "etpo", "--rows", "lora"], "expected no --ablation"),
        (["bench", "learning", "--compare", "etpo", "--seeds", "101"], "--seeds: expected at most 100"),
        (["bench", "learning", "--compare", "reflection", "--tune", "6"], "grid of step sizes"),
    ],
)
def test_wrong_use_is_one_line(cli, tmp_path: Path, words: list[str], told: str) -> None:
    result = cli(*words, "--work", tmp_path / "w")
    assert result.exit_code == 2
    assert told in result.stderr
    assert result.stderr.count("\n") == 1
