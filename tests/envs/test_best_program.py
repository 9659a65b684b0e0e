import ast
import re
import subprocess
import sys
from dataclasses import replace

import pytest

from etpo.envs import datasets
from etpo.envs.best_program import best_program
from etpo.envs.datasets import load_dataset
from etpo.envs.scoring import Scorer

FOREST = """\
from sklearn.ensemble import RandomForestClassifier
return RandomForestClassifier(n_estimators=10).fit(x_train, y_train)
"""


def run(folder, text, target):
    (folder / "best_program.py").write_text(text)
    command = [sys.executable, "-I", "best_program.py", "data.csv", "--target", target]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(("name", "protocol"), [("tic-tac-toe", "default"), ("balance-scale", "paper")])
def test_best_program_prints_the_scorers_numbers(sandbox, tmp_path, name, protocol):
    table = datasets.find_recipe(name).table
    assert table is not None
    table().to_csv(tmp_path / "data.csv", index=False)
    data = load_dataset(name, protocol=protocol)
    score = Scorer(data, sandbox).score(FOREST)
    code, out, err = run(tmp_path, best_program(FOREST, data, score.auc_mean, score.auc_std), data.target)
    assert code == 0, err
    mean, std = map(float, re.fullmatch(r"ROC AUC mean (\S+) std (\S+)\n", out).groups())
    assert mean == pytest.approx(score.auc_mean, abs=1e-12)
    assert std == pytest.approx(score.auc_std, abs=1e-12)


def test_best_program_of_any_csv_drops_the_identifier_and_names_a_missing_target(sandbox, tmp_path):
    table = datasets.tic_tac_toe()
    table.insert(0, "game_id", range(len(table)))
    table.to_csv(tmp_path / "data.csv", index=False)
    data = load_dataset(str(tmp_path / "data.csv"), "Class")
    score = Scorer(data, sandbox).score(FOREST)
    whole = "def build_model(x_train, y_train):\n    " + FOREST.replace("\n", "\n    ")
    text = best_program(whole, data, score.auc_mean, score.auc_std)
    assert f"mean ROC AUC {score.auc_mean:.4f}" in text
    code, out, err = run(tmp_path, text, "Class")
    assert code == 0, err
    assert float(out.split()[3]) == pytest.approx(score.auc_mean, abs=1e-12)
    code, out, err = run(tmp_path, text, "Klass")
    assert code == 1
    assert "no column 'Klass'" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("name", ['a"""b', "a\\", 'x\\"""\nraise SystemExit(3)\n"""', "\\N"])
def test_no_name_breaks_out_of_the_head(small, name):
    text = best_program(FOREST, replace(small, name=name, target=name), 0.5, 0.1)
    head = ast.parse(text).body[0]
    assert isinstance(head, ast.Expr)
    assert f"data set {name}: mean" in ast.literal_eval(head.value)
