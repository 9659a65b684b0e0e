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


@pytest.mark.slow
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


@pytest.mark.slow
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
    assert "expected a column 'Klass'" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("name", ['a"""b', "a\\", 'x\\"""\nraise SystemExit(3)\n"""', "\\N"])
def test_no_name_breaks_out_of_the_head(small, name):
    text = best_program(FOREST, replace(small, name=name, target=name), 0.5, 0.1)
    head = ast.parse(text).body[0]
    assert isinstance(head, ast.Expr)
    assert f"data set {name}: mean" in ast.literal_eval(head.value)


MODEL = "    return LogisticRegression(C=s).fit(x_train, y_train)\n"
HEAD = "from sklearn.linear_model import LogisticRegression\n"
PROGRAMS = {
    "future": "from __future__ import annotations\n"
    + HEAD
    + "def build_model(x_train, y_train, s=1.0):\n"
    + MODEL,
    "docstring": '"""A model."""\nfrom __future__ import annotations\n'
    + HEAD
    + "def build_model(x_train, y_train, s=1.0):\n"
    + MODEL,
    "names of the harness": HEAD
    + "np = encode = halves = random = sys = 3.0\ndef main(): return 0.5\n"
    + "def build_model(x_train, y_train):\n    s = main()\n"
    + MODEL,
    "a global that counts": HEAD
    + "n = [0]\ndef build_model(x_train, y_train):\n    n[0] += 1; s = 0.1 / n[0] ** 9\n"
    + MODEL,
    "random numbers while it is read": "import numpy as np\n"
    + HEAD
    + "s = np.random.rand()\ndef build_model(x_train, y_train):\n"
    + MODEL,
    "its own name": HEAD
    + "if __name__ == '__main__':\n    raise SystemExit(3)\n"
    + "def build_model(x_train, y_train, s=1.0):\n    print('built')\n"
    + MODEL,
    "strings": HEAD
    + "t = '''a\\tb\n\n c'''\ndef build_model(x_train, y_train):\n    s = float(len(t))\n"
    + MODEL,
    "odd characters": HEAD
    + "t = 'a\x0c\u2028b'\ndef build_model(x_train, y_train):\n    s = float(len(t))\n"
    + MODEL,
}


@pytest.mark.slow
def test_a_program_is_kept_apart_from_its_harness(sandbox, tmp_path):
    rows = [
        f"{i * 7 % 11}.5;{i * 37 % 13},25;{'None' if (i * 7 % 11 + i % 3) > 6 else 'b'}" for i in range(90)
    ]
    (tmp_path / "data.csv").write_text("a;b;y\n" + "\n".join([*rows, "x;1,5;b", ";;b"]) + "\n")
    data = load_dataset(str(tmp_path / "data.csv"), "y")
    assert len(data.y) == 90
    scorer = Scorer(data, sandbox)
    for name, program in PROGRAMS.items():
        score = scorer.score(program)
        assert score.outcome == "ok", (name, score)
        code, out, err = run(tmp_path, best_program(program, data, score.auc_mean, score.auc_std), "y")
        assert code == 0, (name, err)
        assert out == f"ROC AUC mean {score.auc_mean!s} std {score.auc_std!s}\n", name
    assert "2 of 92 rows dropped" in err
