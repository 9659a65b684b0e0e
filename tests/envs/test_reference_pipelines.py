"""On the Kaggle files our scorer gives the AUC of a plain scikit-learn script, which is written out here."""

import numpy as np
import pandas as pd
import pytest
from sklearn.ensemble import GradientBoostingClassifier, RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import train_test_split
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.tree import DecisionTreeClassifier

from etpo.bench.pipelines import FIT, KAGGLE, PIPELINES, Row, plain_aucs, to_markdown
from etpo.envs.datasets import file_of, load_dataset
from etpo.envs.scoring import Scorer

MODELS = {
    "logistic regression, scaled": lambda: make_pipeline(StandardScaler(), LogisticRegression(max_iter=500)),
    "nearest neighbours, 25, scaled": lambda: make_pipeline(
        StandardScaler(), KNeighborsClassifier(n_neighbors=25)
    ),
    "Gaussian naive Bayes": GaussianNB,
    "decision tree, depth 4": lambda: DecisionTreeClassifier(max_depth=4, random_state=0),
    "random forest, 100": lambda: RandomForestClassifier(n_estimators=100, random_state=0),
    "gradient boosting, 50": lambda: GradientBoostingClassifier(n_estimators=50, random_state=0),
}
COLUMNS = {  # of the text columns each value's place in the order of the values
    "pharyngitis": [],
    "health-insurance": [
        "City_Code", "Accomodation_Type", "Reco_Insurance_Type", "Is_Spouse", "Health Indicator",
        "Holding_Policy_Duration",
    ],
    "kidney-stone": [],
    "spaceship-titanic": ["HomePlanet", "CryoSleep", "Cabin", "Destination", "VIP", "Name"],
}  # fmt: skip


def plain_script(file, name: str, model) -> list[float]:
    """What somebody would write who has never seen etpo."""
    target, identifier = KAGGLE[name]
    table = pd.read_csv(file, low_memory=False).dropna()[:2000]
    y = table.pop(target).astype(int).to_numpy()
    del table[identifier]
    for column in COLUMNS[name]:
        values = table[column].astype(str)
        table[column] = values.map({v: i for i, v in enumerate(sorted(set(values)))})
    x = table.astype(float).to_numpy()
    aucs = []
    for seed in range(5):
        x_train, x_val, y_train, y_val = train_test_split(x, y, test_size=0.5, random_state=seed)
        aucs.append(roc_auc_score(y_val, model().fit(x_train, y_train).predict_proba(x_val)[:, 1]))
    return aucs


@pytest.mark.parametrize("name", KAGGLE)
def test_the_scorer_gives_a_plain_script_s_auc(kaggle_home, sandbox, name):
    assert set(MODELS) == set(PIPELINES)
    scores = Scorer(load_dataset(name), sandbox).score_many([body + FIT for body in PIPELINES.values()])
    for pipeline, score in zip(PIPELINES, scores, strict=True):
        aucs = plain_script(file_of(name), name, MODELS[pipeline])
        assert score.auc_splits == pytest.approx(aucs, abs=1e-12), (pipeline, score.error)
        assert score.auc_mean == pytest.approx(np.mean(aucs), abs=1e-12)
        assert score.auc_std == pytest.approx(np.std(aucs), abs=1e-12)
    body = PIPELINES["Gaussian naive Bayes"]  # the table's own script, which docs/results shows
    plain = plain_aucs(file_of(name), *KAGGLE[name], body)
    assert plain == pytest.approx(plain_script(file_of(name), name, GaussianNB), abs=1e-12)


def test_the_table_tells_the_largest_difference():
    rows = [Row("a", "p", 0.7, 0.01, 0.7, 0.01), Row("a", "q", 0.7, 0.01, 0.7, 0.01 + 2e-9)]
    text = to_markdown(rows)
    assert "standard deviation: 2.0e-09" in text
    assert "| a | p | 0.700000 ± 0.010000 | 0.700000 ± 0.010000 | 0e+00 |" in text
