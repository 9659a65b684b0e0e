"""The commands besides train: what they print, on tiny models and small data."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from etpo import __version__
from etpo.cli.doctor import NOBODY, protections
from etpo.cli.doctor import _data_home as doctor_data_home
from etpo.engine.trained import load
from etpo.envs.datasets import load_dataset
from etpo.envs.sandbox.modes import hidden_paths

GOOD = (
    "from sklearn.linear_model import LogisticRegression\nreturn LogisticRegression().fit(x_train, y_train)\n"
)


@pytest.fixture
def run(cli, tmp_path: Path, quick: list[str]) -> Path:
    """A finished run on the instant environment."""
    out = tmp_path / "run"
    assert cli("train", *quick, "--steps", "16", "--out", out).exit_code == 0
    return out


def test_help_and_import_load_nothing_heavy() -> None:
    heavy = "{'torch', 'transformers', 'sklearn', 'pandas', 'gymnasium', 'rich.live'}"
    for module in ("etpo", "etpo.cli.main"):
        code = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
        told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert told.stdout == "[]\n", module


def test_version_and_help_of_every_command(cli) -> None:
    assert cli("--version").stdout == f"etpo, version {__version__}\n"
    for name in ("train", "eval", "sample", "score", "export", "doctor", "pretrain", "data"):
        result = cli(name, "--help")
        assert result.exit_code == 0
        assert result.stdout.startswith(f"Usage: main {name}")


def test_no_command_shows_the_help_as_wrong_use(cli) -> None:
    result = cli()
    assert result.exit_code == 2
    assert "Commands:" in result.stderr


@pytest.mark.slow
def test_score_prints_one_json_object_and_exits_with_0_whatever_the_program_did(cli, tmp_path: Path) -> None:
    (tmp_path / "good.py").write_text(GOOD)
    (tmp_path / "bad.py").write_text("return fit(x_train)\n")
    good = cli("score", tmp_path / "good.py", "--dataset", "wine")
    record = json.loads(good.stdout)
    assert list(record) == ["reward", "outcome", "auc_mean", "auc_std", "error", "wall_s"]
    assert record["outcome"] == "ok"
    assert record["reward"] == record["auc_mean"] > 0.9
    assert json.loads(cli("score", tmp_path / "good.py", "--dataset", "wine:synthetic").stdout)["synthetic"]
    bad = cli("score", tmp_path / "bad.py", "--dataset", "wine")
    assert bad.exit_code == 0
    record = json.loads(bad.stdout)
    assert (record["reward"], record["outcome"], record["auc_mean"]) == (-1.0, "error", None)
    assert "NameError" in record["error"]


@pytest.mark.slow
def test_eval_compares_policy_and_reference_and_scores_the_best_program_on_fresh_splits(
    cli, tmp_path: Path, tiny_folder: Path
) -> None:
    out = tmp_path / "run"
    options = ["--dataset", "wine", "--model", tiny_folder, "--max-new-tokens", "4", "--threads", "1"]
    assert cli("train", *options, "--steps", "8", "--envs", "4", "--out", out).exit_code == 0
    newest = max((out / "checkpoints").iterdir()) / "state.json"
    meta = json.loads(newest.read_text())
    meta["state"]["best"] = {"step": 3, "action": GOOD, "auc_mean": 0.99, "auc_std": 0.01}
    newest.write_text(json.dumps(meta))
    result = cli("eval", out, "-n", "3", "--json", tmp_path / "e.json")
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "e.json").read_text())
    assert (record["dataset"], record["step"], record["n"]) == ("wine", 8, 3)
    assert record["policy"]["n"] == record["reference"]["n"] == 3
    best = record["best_program"]
    assert 0.9 < best["auc_fresh"] <= 1.0
    assert best["auc_fresh"] != best["auc_mean"]
    assert f"on 20 fresh splits: {best['auc_fresh']:.4f}" in result.stdout
    lines = {line[:28].strip(): line[28:].split() for line in result.stdout.splitlines()}
    assert lines["mean reward"] == [f"{record[role]['reward_mean']:.4f}" for role in ("policy", "reference")]


def test_eval_of_a_run_in_an_environment_rewards_first_actions(cli, run: Path, tmp_path: Path) -> None:
    result = cli("eval", run, "-n", "6", "--json", tmp_path / "e.json")
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "e.json").read_text())
    assert record["env"] == "letters_env:Letters"
    trained = load(run)
    for role in ("policy", "reference"):
        texts = trained.sample("say", 6, seed=0, role=role)
        rewards = [0.5 + len(set(text)) / 1000 if len(text) % 2 == 0 else -1.0 for text in texts]
        assert record[role]["n"] == 6
        assert record[role]["reward_mean"] == pytest.approx(sum(rewards) / 6)
    shown = [line.split() for line in result.stdout.splitlines() if line.startswith("mean reward")]
    assert shown == [
        ["mean", "reward", *(f"{record[r]['reward_mean']:.4f}" for r in ("policy", "reference"))]
    ]
    assert "AUC" not in result.stdout


def test_sample_shows_programs_of_a_run_and_of_a_model(cli, run: Path, tiny_folder: Path) -> None:
    first = cli("sample", run, "-n", "2", "--seed", "4")
    assert first.exit_code == 0, first.output
    assert "# program 2 of 2" in first.stdout
    assert cli("sample", run, "-n", "2", "--seed", "4").stdout == first.stdout
    assert cli("sample", run, "-n", "2", "--seed", "5").stdout != first.stdout
    of_model = cli("sample", tiny_folder, "-n", "1", "--dataset", "wine")
    assert "def build_model(x_train, y_train):" in of_model.stdout


def test_export_writes_a_folder_for_transformers(cli, tmp_path: Path, run: Path) -> None:
    result = cli("export", run, "--out", tmp_path / "model")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "model" / "tokenizer.json").is_file()
    again = cli("export", run, "--out", tmp_path / "model")
    assert again.exit_code == 2
    assert "empty" in again.stderr


def test_data_says_what_is_here_and_where(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ETPO_DATA_HOME", str(tmp_path))
    file = tmp_path / "kidney_stone" / "train.csv"
    file.parent.mkdir()
    file.write_text("id,target\n")
    rows = {line.split()[0]: line for line in cli("data", "list").stdout.splitlines()}
    assert "built in" in rows["wine"]
    assert str(file) in rows["kidney-stone"]
    assert " no " in rows["pharyngitis"]
    assert cli("data", "path", "kidney-stone").stdout == f"{file}\n"
    assert cli("data", "get", "kidney_stone").exit_code == 0
    assert "nothing to fetch (scikit-learn's load_wine; target target)" in cli("data", "get", "wine").stdout
    twin = cli("data", "get", "pharyngitis:synthetic").stdout
    assert "nothing to fetch (generated, synthetic: a twin of Kaggle yoshifumimiya/pharyngitis" in twin
    assert "built in; 178 rows" in cli("data", "check", "wine:synthetic").stdout


def test_data_list_says_what_it_cannot_read(cli, monkeypatch: pytest.MonkeyPatch):
    def refused(name: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("etpo.envs.datasets.home.find_file", refused)
    made = cli("data", "list")
    assert made.exit_code == 0
    assert "unreadable (Permission denied)" in made.stdout
    assert "built in" in made.stdout


@pytest.mark.parametrize("name", ["wine", "tic-tac-toe", "pharyngitis:synthetic"])
def test_a_saved_table_is_the_one_that_is_scored(cli, tmp_path: Path, name: str) -> None:
    file = tmp_path / "tables" / "data.csv"
    saved = cli("data", "save", name, "--out", file)
    assert saved.exit_code == 0, saved.output
    want = load_dataset(name)
    got = load_dataset(str(file), want.target)
    np.testing.assert_array_equal(got.y, want.y)
    np.testing.assert_allclose(got.x, want.x, rtol=1e-15)
    assert got.class_names == want.class_names


def test_a_table_that_cannot_be_saved_is_one_line(cli, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for words in (["wine", "--out", tmp_path / "file" / "x.csv"], ["wines", "--out", tmp_path / "x.csv"]):
        result = cli("data", "save", *words)
        assert result.exit_code in (1, 2)
        assert result.stderr.count("\n") == 1
        assert not (tmp_path / "x.csv").exists()


def test_doctor_tells_versions_and_what_the_sandbox_really_does(cli) -> None:
    result = cli("doctor")
    assert result.exit_code == 0, result.output
    facts = dict(line.split(maxsplit=1) for line in result.stdout.splitlines() if line[0] != " ")
    assert facts["etpo"] == __version__
    assert {"python", "torch", "transformers", "gpu", "cores", "threads", "etpo-nano"} <= set(facts)
    assert "memory limit" in facts["sandbox"]


def test_doctor_finds_the_data_home_where_the_loader_does(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/nowhere")
    monkeypatch.setenv("ETPO_DATA_HOME", "~/tables")
    assert doctor_data_home() == "/nowhere/tables (not there yet)"
    monkeypatch.delenv("ETPO_DATA_HOME")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000_000)  # a user that the machine does not know
    assert "set ETPO_DATA_HOME" in doctor_data_home()
    assert "~/.cache" in hidden_paths()


def test_a_protection_counts_only_where_the_probe_shows_it() -> None:
    bare = {
        "uid": NOBODY, "limits": {"AS": -1, "NPROC": -1, "FSIZE": -1}, "no_new_privs": 0, "seccomp": 0,
        "parent": 1, "socket": True, "labels": True,
    }  # fmt: skip
    assert not any(protections(bare).values())
    full = {
        "uid": 99_999, "limits": {"AS": 1, "NPROC": 1, "FSIZE": 1}, "no_new_privs": 1, "seccomp": 2,
        "parent": 0, "socket": False, "labels": False,
    }  # fmt: skip
    assert all(protections(full).values())


def test_pretrain_passes_its_options_on_and_prints_the_numbers(
    cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from etpo.engine.pretrain import train as pretrain

    def stub(out: Path, **options) -> dict[str, float]:
        options.pop("progress")({"stage": "train", "step": 1, "of": 4, "loss": 2.5, "wall_s": 2.0})
        assert options == {"seed": 3, "tokens": 1000, "minutes": None, "threads": 1}
        return {"perplexity": 3.25, "steps": 4}

    monkeypatch.setattr(pretrain, "pretrain", stub)
    result = cli("pretrain", "--out", tmp_path / "m", "--seed", "3", "--tokens", "1000", "--threads", "1")
    assert result.exit_code == 0, result.output
    assert "step 1 of 4  loss 2.5000  left 6 s" in result.stdout
    assert "3.25" in result.stdout
