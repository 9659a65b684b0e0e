import itertools

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import train_test_split

from etpo.envs.datasets import Dataset, DatasetError, load_dataset
from etpo.envs.scoring import Scorer, check_proba, halves, make_split, roc_auc, spread_columns

FIT = """\
    from sklearn.linear_model import LogisticRegression
    return LogisticRegression(C={c}).fit(x_train, y_train)
"""
SEARCH = """from sklearn.model_selection import GridSearchCV
from sklearn.naive_bayes import GaussianNB
return GridSearchCV(GaussianNB(), {"var_smoothing": [1e-9]}).fit(x_train, y_train)"""
CONSTANT = """\
class Model:
    def predict_proba(self, x):
        import numpy as np
        return {returned}
return Model()
"""


def table(y, classes) -> Dataset:
    y = np.asarray(y, dtype=np.int64)
    names = tuple(f"c{i}" for i in range(classes))
    return Dataset("t", np.arange(2.0 * len(y)).reshape(-1, 2), y, ("a", "b"), names, "generated", True)


@pytest.fixture
def scorer(small, sandbox):
    return Scorer(small, sandbox)


@pytest.fixture
def submitted(sandbox, monkeypatch):
    """The number of splits that were run since the test began, as a list that grows."""
    seen = []
    submit = sandbox.submit
    monkeypatch.setattr(sandbox, "submit", lambda *a: seen.append(a) or submit(*a))
    return seen


@pytest.mark.parametrize("rows", [10, 11])
def test_halves_are_those_of_train_test_split(rows):
    for seed in range(4):
        train, val = halves(rows, seed)
        their_train, their_val = train_test_split(
            np.arange(rows), test_size=0.5, random_state=seed, shuffle=True
        )
        assert train.tolist() == their_train.tolist()
        assert val.tolist() == their_val.tolist()


@pytest.mark.filterwarnings("ignore:lbfgs failed")
@pytest.mark.parametrize("name", ["tic-tac-toe", "wine"])
def test_the_reward_is_the_mean_auc_over_five_halvings(sandbox, name):
    data = load_dataset(name)
    scorer = Scorer(data, sandbox)
    score = scorer.score(FIT.format(c=1.0))
    here = []
    for seed in range(5):
        x_train, x_val, y_train, y_val = train_test_split(data.x, data.y, test_size=0.5, random_state=seed)
        proba = LogisticRegression(C=1.0).fit(x_train, y_train).predict_proba(x_val)
        binary = proba.shape[1] == 2
        here.append(roc_auc_score(y_val, proba[:, 1] if binary else proba, multi_class="ovo"))
    assert score.outcome == "ok"
    assert score.error is None
    assert score.auc_splits == pytest.approx(here, abs=1e-12)
    assert score.reward == score.auc_mean == pytest.approx(np.mean(here), abs=1e-12)
    assert score.auc_std == pytest.approx(np.std(here), abs=1e-12)
    assert score.wall_s > 0


@pytest.mark.parametrize(
    ("action", "outcome", "error"),
    [
        (
            "return None",
            "error",
            "TypeError: build_model returned None; it must return the fitted classifier",
        ),
        ("x = 1\n\ny = z\n", "error", "line 3: NameError: name 'z' is not defined"),
        (
            "def build_model(x_train, y_train):\n    return z",
            "error",
            "line 2: NameError: name 'z' is not defined",
        ),
        ("x = 1\nretrun x", "error", "line 2: SyntaxError: invalid syntax"),
        ("import os\nos._exit(4)", "crashed", "crashed: the process ended before the model"),
        (
            SEARCH,
            "refused",
            "line 3: refused: GridSearchCV is not allowed; choose the hyperparam",
        ),
        ("return bytearray(2**40)", "memory", "MemoryError: the program needs more memory than it may use"),
        (CONSTANT.format(returned="np.full((len(x), 2), np.nan)"), "invalid_output", "NaN or infinite"),
        (CONSTANT.format(returned="np.full((len(x), 2), 0.4)"), "invalid_output", "summing to 1"),
        (CONSTANT.format(returned="[[-1.0, 2.0]] * len(x)"), "invalid_output", "summing to 1"),
        (
            CONSTANT.format(returned="np.ones((len(x), 1))"),
            "invalid_output",
            "shape (30, 1), expected (30, 2)",
        ),
        (CONSTANT.format(returned="np.ones((3, 2))/2"), "invalid_output", "shape (3, 2), expected (30, 2)"),
        (
            CONSTANT.format(returned="x[:, 0]"),
            "invalid_output",
            "invalid output: predict_proba returned 1 dim",
        ),
    ],
)
def test_a_failure_earns_minus_one_and_one_line(scorer, submitted, action, outcome, error):
    score = scorer.score(action)
    assert (score.reward, score.outcome) == (-1.0, outcome)
    assert (score.auc_mean, score.auc_std, score.auc_splits) == (None, None, None)
    assert error in score.error
    assert "\n" not in score.error
    # Once more on permuted labels, for a message that carries none; and not on the other splits.
    assert len(submitted) <= 2
    assert len({job[2] for job in submitted}) <= 1


def test_failing_on_a_later_split_fails(small, sandbox):
    last = make_split(small, 4)
    total = float(small.x[halves(60, 4)[0]].sum())
    body = f"if abs(x_train.sum() - {total!r}) < 1e-9: raise ValueError('late')\n" + FIT.format(c=1).replace(
        "    ", ""
    )
    score = Scorer(small, sandbox).score(body)
    assert (score.reward, score.outcome, score.error) == (-1.0, "error", "line 1: ValueError: late")
    assert len(last.y_val) == 30


def test_a_late_timeout_is_a_timeout(small, sandbox):
    score = Scorer(small, sandbox, timeout_s=0.3).score("import time\ntime.sleep(60)")
    assert score.outcome == "timeout"
    assert "0.3 s" in score.error


def test_scores_come_in_order_and_do_not_depend_on_the_batch(small, sandbox):
    slow = "import time\ntime.sleep(0.1)\n" + FIT.format(c=0.01).replace("    ", "")
    actions = [slow, FIT.format(c=1.0), "return None", FIT.format(c=100.0), FIT.format(c=1.0)]
    together = Scorer(small, sandbox).score_many(actions)
    alone = [Scorer(small, sandbox).score(action) for action in actions]
    assert [(s.reward, s.outcome, s.error, s.auc_splits) for s in together] == [
        (s.reward, s.outcome, s.error, s.auc_splits) for s in alone
    ]
    assert together[1] is together[4]
    assert len({s.reward for s in together}) == 4


def test_what_runs_at_the_same_time_has_the_same_labels(small, sandbox, monkeypatch):
    under_way, together = {}, []
    submit, wait = sandbox.submit, sandbox.wait

    def note_start(source, arrays, seed, timeout_s):
        number = submit(source, arrays, seed, timeout_s)
        under_way[number] = seed
        together.append(set(under_way.values()))
        return number

    def note_end():
        number, result = wait()
        del under_way[number]
        return number, result

    monkeypatch.setattr(sandbox, "submit", note_start)
    monkeypatch.setattr(sandbox, "wait", note_end)
    scores = Scorer(small, sandbox).score_many([FIT.format(c=1.0), "return 1", FIT.format(c=2.0)])
    assert [score.outcome for score in scores] == ["ok", "error", "ok"]
    # The last: what failed on the first split, for its message.
    assert together == [{0}] * 3 + [{seed} for seed in (1, 1, 2, 2, 3, 3, 4, 4, 0)]


def test_a_known_program_is_not_run_again(scorer, submitted):
    first = scorer.score(FIT.format(c=1.0))
    assert len(submitted) == 5
    assert scorer.score(FIT.format(c=1.0)) is first
    assert len(submitted) == 5


def test_fresh_splits_are_others(small, sandbox, submitted):
    scorer = Scorer(small, sandbox, timeout_s=7.0)
    fresh = scorer.fresh()
    assert [split.seed for split in fresh.splits] == list(range(5, 25))
    assert fresh.timeout_s == 7.0
    score = fresh.score(FIT.format(c=1.0))
    assert len(score.auc_splits) == len(submitted) == 20
    assert score.auc_splits[0] == scorer.fresh([5]).score(FIT.format(c=1.0)).auc_mean


def test_an_interrupt_drops_what_was_under_way(small, sandbox, monkeypatch):
    scorer = Scorer(small, sandbox)

    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(sandbox, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        scorer.score_many([FIT.format(c=1.0)])
    monkeypatch.undo()
    assert scorer.score(FIT.format(c=1.0)).outcome == "ok"


def test_auc_of_several_classes_is_the_mean_over_pairs_that_are_there():
    draws = np.random.default_rng(0)
    y = np.repeat([0, 1, 3], 7)
    proba = draws.dirichlet(np.ones(4), size=21)
    pairs = []
    for a, b in itertools.combinations([0, 1, 3], 2):
        two = np.isin(y, [a, b])
        pairs.append(
            (roc_auc_score(y[two] == a, proba[two, a]) + roc_auc_score(y[two] == b, proba[two, b])) / 2
        )
    assert roc_auc(y, proba) == pytest.approx(np.mean(pairs), abs=1e-15)


def test_a_class_that_the_training_half_lacks_has_probability_zero(sandbox):
    y = np.arange(40) % 2
    train, val = halves(40, 0)
    y[val[0]] = 2
    score = Scorer(table(y, 3), sandbox, split_seeds=(0,)).score(FIT.format(c=1.0))
    assert score.outcome == "ok"
    proba = np.array([[0.2, 0.8]])
    assert spread_columns(proba, np.array([0, 2]), 3).tolist() == [[0.2, 0.0, 0.8]]
    assert spread_columns(np.eye(3), np.array([0, 2]), 3).tolist() == np.eye(3).tolist()
    assert check_proba(proba, 1, 3, 2) is None
    assert check_proba(np.array([[0.2, 0.2, 0.2, 0.4]]), 1, 3, 2) is not None
    assert len(train) == 20


def test_a_half_of_one_class_is_refused_when_the_scorer_is_made(sandbox):
    y = np.zeros(20)
    y[halves(20, 3)[1][0]] = 1
    Scorer(table(np.arange(20) % 2, 2), sandbox, split_seeds=(3,))
    with pytest.raises(DatasetError, match="training half of split 3 holds fewer than 2 classes"):
        Scorer(table(y, 2), sandbox, split_seeds=(3,))
    with pytest.raises(DatasetError, match="validation half of split 3"):
        Scorer(table(1 - np.isin(np.arange(20), halves(20, 3)[0][:2]), 2), sandbox, split_seeds=(3,))
    with pytest.raises(ValueError, match="at least one seed"):
        Scorer(table(np.arange(20) % 2, 2), sandbox, split_seeds=())
