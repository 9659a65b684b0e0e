import numpy as np
import pytest

from etpo.envs.datasets import RECIPES, dataset_names, load_dataset
from etpo.envs.datasets.twins import MOST_ROWS, shape_of, twin


@pytest.mark.parametrize("name", dataset_names())
def test_a_twin_has_the_shape_and_is_called_synthetic(name):
    shape, table = shape_of(name), twin(name)
    assert list(table.columns) == [column.name for column in shape.columns] + [shape.target]
    assert shape.target == RECIPES[name].target
    assert len(table) == min(sum(shape.class_counts.values()), MOST_ROWS)
    share = table[shape.target].astype(str).value_counts(normalize=True)
    for label, count in shape.class_counts.items():
        assert share[label] == pytest.approx(count / sum(shape.class_counts.values()), abs=1 / len(table))
    for column in shape.columns:
        drawn = table[column.name]
        if column.kind in ("int", "float"):
            assert drawn.min() >= column.low - 1e-4
            assert drawn.max() <= column.high + 1e-4
            assert abs(drawn.mean() - column.mean) <= 0.35 * (column.high - column.low)
        assert drawn.isna().mean() == pytest.approx(column.missing, abs=0.03)
        assert drawn.nunique() > 1 or column.low == column.high
    data = load_dataset(name + ":synthetic")
    assert data.synthetic
    assert data.name == name + ":synthetic"
    assert "synthetic" in data.source
    again = load_dataset(name.replace("_", "-") + ":synthetic")
    assert (again.x == data.x).all()


@pytest.mark.parametrize("name", ["wine", "tic-tac-toe", "balance-scale"])
def test_a_twin_of_a_table_that_is_here_has_its_columns_types_and_classes_and_other_rows(name):
    real, made = load_dataset(name), load_dataset(name + ":synthetic")
    assert made.feature_names == real.feature_names
    assert made.class_names == real.class_names
    assert (np.bincount(made.y) == np.bincount(real.y)).all()
    assert made.x.shape == real.x.shape
    assert set(np.unique(made.x[:, 0])) <= set(np.unique(real.x[:, 0])) or name == "wine"
    assert not (made.x == real.x).all()
    assert not real.synthetic


def test_the_columns_of_the_kaggle_files_are_the_twins(kaggle_home):
    for name in ("pharyngitis", "health-insurance", "kidney-stone", "spaceship-titanic"):
        real, made = load_dataset(name, data_home=kaggle_home), load_dataset(name + ":synthetic")
        assert made.feature_names == real.feature_names
        assert made.class_names == real.class_names
