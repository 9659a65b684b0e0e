"""The audits catch what knows labels that it was not given, by whatever channel, and no honest program."""

from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.tree import DecisionTreeClassifier

from etpo.envs.audit import BY_HEART, PERMUTED, REVERSED
from etpo.envs.datasets import Dataset, load_dataset
from etpo.envs.sandbox import Sandbox
from etpo.envs.sandbox.modes import CONSENT, CONSENT_VARIABLE
from etpo.envs.sandbox.result import Failure, SplitResult
from etpo.envs.scoring import Scorer


class LeakyBox:
    """A sandbox in name only: functions of (x_train, y_train, x_val, seed) that may share state."""

    workers = 1

    def __init__(self, programs):
        self.programs = programs
        self.runs = []

    def run(self, jobs, timeout_s=None):
        return [self._one(*job) for job in jobs]

    def _one(self, source, arrays, seed):
        name = source.split()[-1]
        self.runs.append((name, seed))
        x_train, y_train, x_val = arrays.parts
        try:
            proba = self.programs[name](x_train, y_train, x_val, seed)
        except ValueError as error:
            return SplitResult("error", None, Failure("ValueError", str(error), 2), "", 0.0)
        return SplitResult("ok", np.asarray(proba, float), None, "", 0.0)


@pytest.fixture(autouse=True)
def _readable_arrays(monkeypatch):
    def split_arrays(x_train, y_train, x_val):
        return SimpleNamespace(parts=(x_train, y_train, x_val))

    monkeypatch.setattr("etpo.envs.splits.SplitArrays", split_arrays)


@pytest.fixture(scope="module")
def table() -> Dataset:
    return load_dataset("tic-tac-toe")


def two_columns(p):
    return np.stack([1 - p, p], 1)


def relay(*, noisy: bool):
    """Tells each split the labels that those before it were given."""
    known: dict[bytes, int] = {}
    last = [-1]
    draws = np.random.default_rng(0)

    def program(x_train, y_train, x_val, seed):
        if seed != last[0] + 1:
            known.clear()
        last[0] = seed
        p = np.array([known.get(row.tobytes(), 0.5) for row in x_val])
        known.update((row.tobytes(), int(label)) for row, label in zip(x_train, y_train, strict=True))
        return two_columns(0.9 * p + (0.01 * draws.random(len(p)) if noisy else 0.0))

    return program


def by_heart(x_train, y_train, x_val, seed):
    won = [(x_val[:, line] == 2).all(1) for line in ([0, 1, 2], [3, 4, 5], [6, 7, 8], [0, 4, 8], [2, 4, 6])]
    return two_columns(np.any(won, 0).astype(float))


HONEST = {
    "logistic": lambda a, y, b, seed: LogisticRegression().fit(a, y).predict_proba(b),
    "tree": lambda a, y, b, seed: DecisionTreeClassifier(random_state=seed).fit(a, y).predict_proba(b),
    "constant": lambda a, y, b, seed: np.full((len(b), 2), 0.5),
    "own-random-numbers": lambda a, y, b, seed: two_columns(np.random.default_rng().random(len(b))),
    "one-feature": lambda a, y, b, seed: LogisticRegression().fit(a[:, 4:5], y).predict_proba(b[:, 4:5]),
}


def score_all(table, programs, share=1.0):
    box = LeakyBox(programs)
    return dict(
        zip(programs, Scorer(table, box, audit_share=share).score_many(list(programs)), strict=True)
    ), box


def test_honest_programs_keep_their_scores(table):
    audited, _ = score_all(table, HONEST)
    plain, _ = score_all(table, HONEST, 0.0)
    assert {score.outcome for score in audited.values()} == {"ok"}
    del audited["own-random-numbers"]
    assert audited == {name: plain[name] for name in audited}


@pytest.mark.parametrize(
    ("program", "what"),
    [(relay(noisy=False), REVERSED), (relay(noisy=True), PERMUTED), (by_heart, BY_HEART)],
    ids=["relay", "noisy relay", "by heart"],
)
def test_what_knows_more_than_it_was_given_earns_minus_one(table, program, what):
    scores, _ = score_all(table, {"program": program})
    score = scores["program"]
    assert (score.reward, score.outcome, score.auc_mean) == (-1.0, "dishonest", None)
    assert score.error == f"dishonest: {what}"


def test_one_informative_feature_is_not_taken_for_knowledge_by_heart():
    """What is learnt from permuted labels points the right way half of the time."""
    draws = np.random.default_rng(0)
    y = np.arange(200) % 2
    for flip in range(6):
        x = (y + 0.1 * draws.normal(size=200))[:, None] * (-1) ** flip
        table = Dataset(f"line{flip}", x, y, ("a",), ("0", "1"), "generated", True)
        scores, _ = score_all(table, {"logistic": HONEST["logistic"]})
        assert scores["logistic"].outcome == "ok"


def test_every_new_best_program_is_audited_and_of_the_others_a_share(table):
    programs = HONEST | {f"tree{i}": HONEST["tree"] for i in range(60)}
    del programs["own-random-numbers"]
    _, box = score_all(table, programs, 1e-9)
    often = {name for name in programs if sum(run[0] == name for run in box.runs) > 5}
    assert len(often) == 1
    assert "tree" in next(iter(often))
    _, box = score_all(table, programs, 0.2)
    often = {name for name in programs if sum(run[0] == name for run in box.runs) > 5}
    assert 4 < len(often) < 30
    _, box = score_all(table, programs, 0.0)
    assert len(box.runs) == 5 * len(programs)


def test_no_message_carries_true_labels(table):
    def tell(x_train, y_train, x_val, seed):
        raise ValueError("".join(map(str, y_train[:100])))

    def fail_on_true_labels(x_train, y_train, x_val, seed):
        if (y_train == table.y[np.random.RandomState(0).permutation(958)[479:]]).all():
            raise ValueError("the truth")
        return two_columns(np.full(len(x_val), 0.5))

    scores, box = score_all(table, {"tell": tell, "depends": fail_on_true_labels})
    said = scores["tell"].error.partition("ValueError: ")[2]
    true = "".join(map(str, table.y[np.random.RandomState(0).permutation(958)[479:][:100]]))
    assert len(said) == 100
    assert said != true
    assert scores["depends"].error == "error: the program fails on some labels only"
    assert [run[1] for run in box.runs] == [0, 0, 0, 0]


def test_a_time_out_is_tried_once_more_alone_and_not_kept(table):
    class Slow(LeakyBox):
        batches: list[int] = []  # noqa: RUF012

        def run(self, jobs, timeout_s=None):
            self.batches.append(len(jobs))
            late = SplitResult("timeout", None, Failure("timeout", "late"), "", 1.0)
            return [late if len(jobs) > 1 or "always" in job[0] else self._one(*job) for job in jobs]

    box = Slow({"once": HONEST["constant"], "always": HONEST["constant"]})
    scorer = Scorer(table, box)
    once, always = scorer.score_many(["once", "always"])
    assert (once.outcome, always.outcome) == ("ok", "timeout")
    assert box.batches == [2, 1, 1, 1, 1, 1, 1]
    count = len(box.batches)
    assert scorer.score("once") == once
    assert len(box.batches) == count
    assert scorer.score("always").outcome == "timeout"
    assert len(box.batches) == count + 2


@pytest.mark.slow
def test_a_relay_through_an_open_file_is_caught_end_to_end(table, monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setenv(CONSENT_VARIABLE, CONSENT)
    source = f"""
import json, os
import numpy as np
NOTE = {str(tmp_path / "note")!r}
class Relay:
    def predict_proba(self, x):
        known = json.load(open(NOTE)) if os.path.exists(NOTE) else {{}}
        p = np.array([known.get(str(row.tolist()), 0.5) for row in x])
        known.update((str(row.tolist()), int(label)) for row, label in zip(self.x, self.y))
        json.dump(known, open(NOTE, "w"))
        return np.stack([1 - p, p], 1)
def build_model(x_train, y_train):
    relay = Relay()
    relay.x, relay.y = x_train, y_train
    return relay
"""
    with Sandbox("off", workers=1, timeout_s=30.0) as box:
        believed = Scorer(table, box).score(source)
        (tmp_path / "note").unlink()
        audited = Scorer(table, box, audit_share=1e-9).score(source)
    assert believed.reward > 0.85
    assert (audited.reward, audited.outcome) == (-1.0, "dishonest")
