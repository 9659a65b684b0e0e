import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from etpo.envs import datasets
from etpo.envs.datasets import DatasetError, UnknownDataset, dataset_names, file_of, load_dataset

LINES = [(0, 1, 2), (3, 4, 5), (6, 7, 8), (0, 3, 6), (1, 4, 7), (2, 5, 8), (0, 4, 8), (2, 4, 6)]
KAGGLE = {
    "pharyngitis": (512, 18, [281, 231], "number"),
    "health-insurance": (2000, 12, [1546, 454], "ID"),
    "kidney-stone": (414, 6, [230, 184], "id"),
    "spaceship-titanic": (2000, 12, [1071, 929], "PassengerId"),
}


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_tic_tac_toe_is_the_openml_table():
    table = datasets.tic_tac_toe()
    assert list(table.columns[[0, 4, 8, 9]]) == [
        "top-left-square",
        "middle-middle-square",
        "bottom-right-square",
        "Class",
    ]
    assert len(table) == 958
    assert not table.duplicated().any()
    assert table["Class"].value_counts().to_dict() == {"positive": 626, "negative": 332}
    boards = table.iloc[:, :9].to_numpy(str)
    x_wins = np.array([(boards[:, line] == "x").all(axis=1) for line in LINES]).any(axis=0)
    o_wins = np.array([(boards[:, line] == "o").all(axis=1) for line in LINES]).any(axis=0)
    assert (x_wins == (table["Class"] == "positive")).all()
    assert not (x_wins & o_wins).any()
    assert (~x_wins & ~o_wins).sum() == 16
    ahead = (boards == "x").sum(axis=1) - (boards == "o").sum(axis=1)
    assert (ahead == np.where(o_wins, 0, 1)).all()


def test_tic_tac_toe_reaches_the_learner_as_ranks():
    data = load_dataset("tic_tac_toe")
    assert data.name == "tic-tac-toe"
    assert data.class_names == ("negative", "positive")
    raw = datasets.tic_tac_toe()
    assert (data.x == raw.iloc[:, :9].map({"b": 0, "o": 1, "x": 2}.get).to_numpy()).all()
    assert (data.y == (raw["Class"] == "positive")).all()


def test_balance_scale_is_the_openml_table():
    table = datasets.balance_scale()
    assert list(table.columns) == ["left-weight", "left-distance", "right-weight", "right-distance", "class"]
    assert table["class"].value_counts().to_dict() == {"L": 288, "R": 288, "B": 49}
    for left_w, left_d, right_w, right_d, tips in table.itertuples(index=False):
        left, right = left_w * left_d, right_w * right_d
        assert tips == ("L" if left > right else "R" if right > left else "B")
    data = load_dataset("balance-scale")
    assert data.class_names == ("B", "L", "R")
    assert np.bincount(data.y).tolist() == [49, 288, 288]
    assert set(np.unique(data.x)) == {1, 2, 3, 4, 5}


@pytest.mark.parametrize(
    ("name", "shape", "counts"),
    [
        ("breast-cancer", (569, 30), [212, 357]),
        ("wine", (178, 13), [59, 71, 48]),
        ("digits", (1797, 64), [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]),
        ("diabetes-progression", (442, 10), [221, 221]),
    ],
)
def test_scikit_learns_own(name, shape, counts):
    data = load_dataset(name)
    assert data.x.shape == shape
    assert data.x.dtype == np.float64
    assert data.y.dtype == np.int64
    assert np.bincount(data.y).tolist() == counts


@pytest.mark.parametrize("name", KAGGLE)
def test_kaggle_files(name):
    home = os.environ.get("ETPO_DATA_HOME")
    if home is None or not any((Path(home) / n).is_dir() for n in (name, name.replace("-", "_"))):
        pytest.skip("ETPO_DATA_HOME has no such data set")
    rows, features, counts, identifier = KAGGLE[name]
    data = load_dataset(name)
    assert data.x.shape == (rows, features)
    assert np.bincount(data.y).tolist() == counts
    assert identifier not in data.feature_names
    assert np.isfinite(data.x).all()


def test_preparation_of_a_csv(tmp_path):
    lines = ["id,size,colour,flag,label"]
    lines += [
        f"{i},{i * 0.5},{'red' if i % 3 else 'blue'},{i % 2 == 0},{'yes' if i % 4 else 'no'}"
        for i in range(9)
    ]
    lines[3] = "2,,red,True,yes"
    lines[5] = "4,inf,red,True,yes"
    data = load_dataset(write(tmp_path / "t.csv", "\n".join(lines)), "label")
    assert data.name == "t"
    assert data.feature_names == ("size", "colour", "flag")
    assert data.class_names == ("no", "yes")
    kept = [0, 1, 3, 5, 6, 7, 8]
    assert data.x[:, 0].tolist() == [i * 0.5 for i in kept]
    assert data.x[:, 1].tolist() == [1 if i % 3 else 0 for i in kept]
    assert data.x[:, 2].tolist() == [i % 2 == 0 for i in kept]
    assert data.y.tolist() == [1 if i % 4 else 0 for i in kept]


def test_the_first_2000_complete_rows_of_a_named_table_are_kept(tmp_path):
    table = pd.DataFrame({"a": np.arange(2500.0), "target": np.arange(2500) % 2})
    table.loc[0, "a"] = np.nan
    (tmp_path / "kidney-stone").mkdir()
    table.to_csv(tmp_path / "kidney-stone/long.csv", index=False)
    data = load_dataset("kidney-stone", data_home=tmp_path)
    assert data.x[:, 0].tolist() == list(range(1, 2001))
    assert data.notes == ()


def test_classes_are_sorted_as_numbers(tmp_path):
    path = write(tmp_path / "n.csv", "a,y\n1,10\n2,9\n3,\n4,10\n5,-1\n")
    data = load_dataset(path, "y")
    assert data.class_names == ("-1", "9", "10")
    assert data.y.tolist() == [2, 1, 2, 0]


def test_an_id_column_whose_values_repeat_is_a_feature(tmp_path):
    path = write(tmp_path / "n.csv", "store_id,y\n1,0\n2,1\n1,1\n")
    assert load_dataset(path, "y").feature_names == ("store_id",)


def test_paper_protocol_ranks_numbers_beside_text_and_keeps_a_share(tmp_path):
    text = "size,colour,y\n3.5,red,0\n100,blue,1\n-7,red,1\n"
    path = write(tmp_path / "p.csv", text)
    assert load_dataset(path, "y").x[:, 0].tolist() == [3.5, 100, -7]
    assert load_dataset(path, "y", "paper").x[:, 0].tolist() == [1, 2, 0]
    numbers = write(tmp_path / "q.csv", text.replace("red", "5").replace("blue", "6"))
    assert load_dataset(numbers, "y", "paper").x[:, 0].tolist() == [3.5, 100, -7]
    part = load_dataset("tic-tac-toe", protocol="paper")
    assert len(part.y) == 96
    assert (part.x == load_dataset("tic-tac-toe", protocol="paper").x).all()
    assert len(load_dataset("balance-scale", protocol="paper").y) == 125


def test_data_home_takes_either_spelling(tmp_path, monkeypatch):
    monkeypatch.setenv("ETPO_DATA_HOME", str(tmp_path))
    (tmp_path / "kidney_stone").mkdir()
    write(tmp_path / "kidney_stone" / "train.csv", "id,ph,target\n1,5.5,0\n2,6.5,1\n")
    assert load_dataset("kidney-stone").x.tolist() == [[5.5], [6.5]]
    write(tmp_path / "kidney_stone" / "test.csv", "id,ph\n1,5.5\n")
    with pytest.raises(DatasetError, match="2 CSV files"):
        load_dataset("kidney-stone")
    long = "jungle_chess_2pcs_raw_endgame_complete"
    (tmp_path / long.replace("_", "-")).mkdir()
    file = write(tmp_path / long.replace("_", "-") / "t.csv", "a,class\n1,b\n2,w\n")
    assert str(file_of(long)) == file
    assert load_dataset(long).name == long


def test_errors_are_one_line(tmp_path):
    path = write(tmp_path / "t.csv", "age,label\n1,a\n2,a\n")
    numbers = write(tmp_path / "numbers.csv", "a,y\n" + "".join(f"{i},{i / 4}\n" for i in range(200)))
    (tmp_path / "latin.csv").write_bytes("a,y\n1,é\n".encode("latin-1"))
    cases = [
        (("tic-tac",), UnknownDataset, "did you mean tic-tac-toe"),
        (("titanic",), UnknownDataset, "did you mean spaceship-titanic"),
        (("pharingitis",), UnknownDataset, "did you mean pharyngitis"),
        (("iris",), UnknownDataset, "`etpo data list` names those that are known"),
        ((str(tmp_path / "none.csv"), "y"), DatasetError, "No such file"),
        ((write(tmp_path / "empty.csv", ""), "y"), DatasetError, "empty file"),
        (
            (path, "lable"),
            DatasetError,
            "expected a column 'lable', got 2: 'age', 'label'; did you mean 'label'",
        ),
        ((path, "label"), DatasetError, "2 values of 'label', got 1 and 1 in 2 complete rows"),
        ((numbers, "y"), DatasetError, "at most 50 classes, got 'y' with 200 values in 200 rows"),
        ((str(tmp_path / "latin.csv"), "y"), DatasetError, "expected a CSV file in UTF-8"),
        ((path,), ValueError, "--target"),
        (("wine", None, "papr"), ValueError, "'papr'"),
    ]
    for arguments, kind, words in cases:
        with pytest.raises(kind, match=words) as caught:
            load_dataset(*arguments)
        assert "\n" not in str(caught.value)


def test_names_load():
    assert {"tic-tac-toe", "balance-scale", "pharyngitis", "wine"} <= set(dataset_names())
