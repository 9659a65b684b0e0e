"""Reference pipelines on the Kaggle files: our scorer beside a plain script that knows nothing of etpo.envs.

    python -m etpo.bench.pipelines --json docs/results/pipelines.json --markdown docs/results/pipelines.md

Needs the four files in the data home (`ETPO_DATA_HOME`, or `etpo data get`).
"""

import argparse
import json
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import sklearn
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import LabelEncoder

from etpo.envs.datasets import file_of, load_dataset
from etpo.envs.sandbox import Sandbox
from etpo.envs.scoring import Scorer

# name: (target, identifier)
KAGGLE = {
    "pharyngitis": ("radt", "number"),
    "health-insurance": ("Response", "ID"),
    "kidney-stone": ("target", "id"),
    "spaceship-titanic": ("Transported", "PassengerId"),
}
_PIPELINE = "from sklearn.pipeline import make_pipeline\nfrom sklearn.preprocessing import StandardScaler\n"
PIPELINES = {
    "logistic regression, scaled": _PIPELINE + "from sklearn.linear_model import LogisticRegression\n"
    "m = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))\n",
    "nearest neighbours, 25, scaled": _PIPELINE + "from sklearn.neighbors import KNeighborsClassifier\n"
    "m = make_pipeline(StandardScaler(), KNeighborsClassifier(n_neighbors=25))\n",
    "Gaussian naive Bayes": "from sklearn.naive_bayes import GaussianNB\nm = GaussianNB()\n",
    "decision tree, depth 4": "from sklearn.tree import DecisionTreeClassifier\n"
    "m = DecisionTreeClassifier(max_depth=4, random_state=0)\n",
    "random forest, 100": "from sklearn.ensemble import RandomForestClassifier\n"
    "m = RandomForestClassifier(n_estimators=100, random_state=0)\n",
    "gradient boosting, 50": "from sklearn.ensemble import GradientBoostingClassifier\n"
    "m = GradientBoostingClassifier(n_estimators=50, random_state=0)\n",
}
FIT = "return m.fit(x_train, y_train)\n"


@dataclass(frozen=True)
class Row:
    """One pipeline on one data set: mean and standard deviation over five halvings, ours and the script's."""

    dataset: str
    pipeline: str
    auc_mean: float
    auc_std: float
    plain_mean: float
    plain_std: float

    @property
    def difference(self) -> float:
        return max(abs(self.auc_mean - self.plain_mean), abs(self.auc_std - self.plain_std))


def measure(names: list[str]) -> list[Row]:
    """Score every pipeline on the named data sets, both ways."""
    rows = []
    with Sandbox() as sandbox:
        for name in names:
            scorer = Scorer(load_dataset(name), sandbox)
            scores = scorer.score_many([body + FIT for body in PIPELINES.values()])
            for (pipeline, body), score in zip(PIPELINES.items(), scores, strict=True):
                if score.auc_mean is None or score.auc_std is None:
                    raise ValueError(f"{pipeline} on {name}: {score.error}")
                aucs = plain_aucs(file_of(name), *KAGGLE[name], body)
                mean, std = float(np.mean(aucs)), float(np.std(aucs))
                rows.append(Row(name, pipeline, score.auc_mean, score.auc_std, mean, std))
    return rows


def plain_aucs(file: Path, target: str, identifier: str, body: str) -> list[float]:
    """ROC AUC on five halvings with pandas and scikit-learn alone, for two classes.

    Args:
        file: CSV file as it came from Kaggle.
        target, identifier: columns that are no features.
        body: source that puts an unfitted classifier into `m`.
    """
    table = pd.read_csv(file, low_memory=False).dropna().head(2_000)
    y = LabelEncoder().fit_transform(table[target].astype(str))
    x = table.drop(columns=[target, identifier])
    for column in x.columns:
        if not pd.api.types.is_numeric_dtype(x[column]) or pd.api.types.is_bool_dtype(x[column]):
            x[column] = LabelEncoder().fit_transform(x[column].astype(str))
    features = x.to_numpy(np.float64)
    aucs = []
    for seed in range(5):
        x_train, x_val, y_train, y_val = train_test_split(features, y, test_size=0.5, random_state=seed)
        space: dict[str, Any] = {}
        exec(body, space)
        proba = space["m"].fit(x_train, y_train).predict_proba(x_val)
        aucs.append(float(roc_auc_score(y_val, proba[:, 1])))
    return aucs


def to_markdown(rows: list[Row]) -> str:
    """The table, and how far the two ways are apart."""
    worst = max(row.difference for row in rows)
    lines = [
        "# Reference pipelines on the Kaggle files",
        "",
        "Mean ROC AUC ± standard deviation over five random halvings (seeds 0–4) of the first 2,000 complete",
        "rows, by etpo's scorer (each halving in a process of the box), and by a plain script of pandas and",
        f"scikit-learn. Largest difference of a mean or a standard deviation: {worst:.1e}.",
        "",
        "| data set | pipeline | etpo | plain script | difference |",
        "|---|---|---|---|---|",
        *(
            f"| {r.dataset} | {r.pipeline} | {r.auc_mean:.6f} ± {r.auc_std:.6f} "
            f"| {r.plain_mean:.6f} ± {r.plain_std:.6f} | {r.difference:.0e} |"
            for r in rows
        ),
        "",
        f"Made by `python -m etpo.bench.pipelines`; scikit-learn {sklearn.__version__}, pandas "
        f"{pd.__version__}, Python {platform.python_version()}, {platform.machine()}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--markdown", type=Path, help="write the table there")
    options = parser.parse_args()
    rows = measure(list(KAGGLE))
    text = to_markdown(rows)
    print(text)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n", encoding="utf-8")
    if options.markdown:
        options.markdown.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
