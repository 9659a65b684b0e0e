"""One hostile test for each promise of the box. Hostile programs are bounded themselves."""

import math
import os

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from etpo.bench.sandbox.mix import split_processes
from etpo.envs.sandbox import Sandbox, SplitArrays
from etpo.envs.sandbox.box import wire
from tests.envs.programs import FIT, program


@pytest.fixture(scope="module")
def arrays(small):
    return SplitArrays(small.x[:30], small.y[:30], small.x[30:])


def run_one(sandbox, body, arrays, seed=0):
    return sandbox.run([(program(body), arrays, seed)])[0]


def test_probabilities_are_those_of_the_same_fit_here(sandbox, arrays, small):
    result = sandbox.run([(FIT, arrays, 0)])[0]
    here = LogisticRegression().fit(small.x[:30], small.y[:30]).predict_proba(small.x[30:])
    assert result.outcome == "ok"
    np.testing.assert_allclose(result.proba, here, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("body", "outcome", "kind", "words", "line"),
    [
        ("return None", "error", "TypeError", "returned None", None),
        ("return 3", "error", "AttributeError", "int has no predict_proba", None),
        ("\nx = 1\ny = {}['k']", "error", "KeyError", "'k'", 3),
        ("import no_such_package", "error", "ModuleNotFoundError", "no_such_package", 2),
        (
            "from sklearn.svm import LinearSVC\nreturn LinearSVC()",
            "error",
            "AttributeError",
            "LinearSVC",
            None,
        ),
        (
            "from sklearn.linear_model import LogisticRegression\nreturn LogisticRegression()",
            "error",
            "NotFittedError",
            "not fitted",
            None,
        ),
        ("import sys\nsys.exit(3)", "error", "SystemExit", "3", 3),
        ("raise KeyboardInterrupt", "error", "KeyboardInterrupt", "", 2),
        ("raise type('<b>' * 500, (Exception,), {})('m' * 10**6)", "error", "bbbb", "mmmm", 2),
        ("def f(): return f()\nreturn f()", "error", "RecursionError", "recursion", 2),
        ("nonlocal q", "error", "SyntaxError", "nonlocal", 2),
        ("open('big', 'wb').write(bytes(2**26))", "error", "OSError", "File too large", 2),
        ("import os\nos._exit(0)", "crashed", "crashed", "process ended before", None),
        ("import os\nos._exit(9)", "crashed", "crashed", "process ended before", None),
        ("import os\nos.abort()", "crashed", "crashed", "killed by a signal", None),
        ("import os\nos.kill(0, 9)", "crashed", "crashed", "killed by a signal", None),
        ("keep = [bytearray(2**26) for _ in range(24)]", "memory", "MemoryError", "memory", None),
        ("import numpy as np\nreturn np.ones(10**12)", "memory", "MemoryError", "memory", None),
    ],
)
def test_every_way_to_fail_has_its_outcome(sandbox, arrays, body, outcome, kind, words, line):
    result = run_one(sandbox, body, arrays)
    assert result.outcome == outcome
    assert result.proba is None
    assert kind in result.failure.kind
    assert words in result.failure.message
    assert result.failure.line == line
    assert len(result.failure.kind) <= wire.MAX_KIND_BYTES
    assert len(result.failure.message) <= wire.MAX_MESSAGE_BYTES


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ("x[:, 0]", "1 dimensions"),
        ("[x, x]", "3 dimensions"),
        ("'text'", "array of numbers"),
        ("[[1], [2, 3]]", "array of numbers"),
    ],
)
def test_what_is_no_table_of_numbers_is_invalid_output(sandbox, arrays, returned, words):
    body = f"class Model:\n    def predict_proba(self, x): return {returned}\nreturn Model()"
    result = run_one(sandbox, body, arrays)
    assert (result.outcome, result.proba) == ("invalid_output", None)
    assert words in result.failure.message


@pytest.mark.parametrize(
    "body", ["while True: pass", "import os\nos.kill(os.getpid(), 19)", "import time\ntime.sleep(1000)"]
)
def test_a_program_that_hangs_or_stops_itself_times_out(sandbox, arrays, body):
    job = sandbox.submit(
        program("import os\nprint(os.getpid(), flush=True)\n" + body), arrays, 0, timeout_s=0.4
    )
    number, result = sandbox.wait()
    assert number == job
    assert result.outcome == "timeout"
    assert "0.4 s" in result.failure.message
    assert 0.4 <= result.wall_s < 10


def test_a_flood_of_output_is_cut_and_stops_nothing(sandbox, arrays):
    flood = """
    import os
    for _ in range(100_000):
        print("x" * 100)
    os.write(1, bytes(10**6))
    os.write(2, bytes(10**6))
    """
    result = sandbox.run([(program(flood) + FIT.partition("\n")[2], arrays, 0)])[0]
    assert result.outcome == "ok"
    assert len(result.stdout) == wire.MAX_STDOUT_BYTES


def test_a_flood_of_the_result_pipe_is_invalid_output(sandbox, arrays):
    result = run_one(sandbox, "import os\nwhile True: os.write(4, bytes(2**20))", arrays)
    assert result.outcome == "invalid_output"
    assert "more than a result" in result.failure.message


@pytest.mark.parametrize(
    "frame",
    [
        "b'etpo'",
        "b'none' + bytes(33)",
        "struct.pack('<4sBIdIIIII', b'etpo', 0, 0, 0, 2**31, 2**31, 0, 0, 0)",
        "struct.pack('<4sBIdIIIII', b'etpo', 0, 0, 0, 1, 1, 2**32 - 1, 2**32 - 1, 0)",
        "struct.pack('<4sBIdIIIII', b'etpo', 250, 0, 0, 0, 0, 0, 0, 0)",
    ],
)
def test_a_forged_frame_is_not_believed(sandbox, arrays, frame):
    result = run_one(sandbox, f"import os, struct\nos.write(4, {frame})\nos._exit(0)", arrays)
    assert result.outcome == "crashed"


def test_processes_left_behind_are_killed(sandbox, arrays):
    body = """
    import os, time
    pids = []
    for kind in range(6):
        pid = os.fork()
        if pid == 0:
            if kind % 2:
                os.setsid()
            if kind % 3 == 0 and os.fork():
                os._exit(0)
            open(f"pid{kind}", "w").write(str(os.getpid()))
            time.sleep(1000)
        while not (os.path.exists(f"pid{kind}") and os.path.getsize(f"pid{kind}")):
            time.sleep(0.001)
        pids.append(open(f"pid{kind}").read())
    print(*pids)
    return 1
    """
    result = run_one(sandbox, body, arrays)
    assert len(result.stdout.split()) == 6
    assert split_processes(sandbox._process.pid) == []


def test_processes_are_limited(sandbox, arrays):
    body = """
    import os, time
    count = 0
    for _ in range(200):
        try:
            if os.fork() == 0:
                time.sleep(1000)
        except BlockingIOError:
            break
        count += 1
    print(count)
    return 1
    """
    result = run_one(sandbox, body, arrays)
    assert 0 < int(result.stdout) < 200


def test_a_fork_that_returns_from_build_model_sends_no_second_result(sandbox, arrays):
    source = program("import os\npid = os.fork()\nif pid: os.waitpid(pid, 0)") + FIT.partition("\n")[2]
    assert sandbox.run([(source, arrays, 0)])[0].outcome == "ok"


def test_a_child_stands_in_its_own_session_and_group(sandbox, arrays):
    body = "import os\nprint(os.getpid() == os.getsid(0) == os.getpgid(0))\nreturn 1"
    assert run_one(sandbox, body, arrays).stdout == "True\n"


def test_a_child_holds_its_own_split_and_nothing_else(sandbox, arrays):
    body = """
    import os, sys
    held = []
    for fd in range(1024):
        try:
            os.fstat(fd)
            held.append(fd)
        except OSError:
            pass
    secrets = [name for name in os.environ if "ETPO" in name]
    print(held, secrets, [name for name in sys.modules if name.startswith("etpo")], sys.path[0])
    return 1
    """
    stdout = run_one(sandbox, body, arrays).stdout
    assert stdout.startswith("[0, 1, 2, 4] [] [] ")
    assert "envs" not in stdout


def test_a_program_cannot_change_what_the_next_one_gets(sandbox, arrays):
    spoil = program("x_train[:] = 0\ny_train[:] = 1 - y_train\nreturn 1")
    first, _, last = sandbox.run([(FIT, arrays, 0), (spoil, arrays, 0), (FIT, arrays, 0)])
    assert (first.proba == last.proba).all()


def test_the_working_folder_is_private_empty_and_removed(sandbox, arrays):
    body = """
    import os, tempfile
    print(os.getcwd(), tempfile.gettempdir() == os.environ["HOME"] == os.getcwd())
    for _ in range(1100):
        os.mkdir("deep")
        os.chdir("deep")
    open("file", "w").close()
    os.mkdir("locked", 0)
    return 1
    """
    folder, is_home = run_one(sandbox, body, arrays).stdout.split()
    assert is_home == "True"
    assert not os.path.exists(folder)
    body = "import os, stat\nprint(os.listdir('.'), stat.filemode(os.stat('.').st_mode))\nreturn 1"
    assert run_one(sandbox, body, arrays).stdout == "[] drwx------\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may change users")
def test_started_by_root_each_slot_has_a_user_of_its_own(sandbox, arrays):
    body = """
    import os, time
    print(*os.getresuid(), *os.getresgid(), os.getgroups())
    time.sleep(0.3)
    os.setuid(0)
    """
    results = sandbox.run([(program(body), arrays, 0)] * 2)
    users = {result.stdout for result in results}
    assert len(users) == 2
    for user in users:
        *ids, groups = user.split()
        assert groups == "[]"
        assert len(set(ids)) == 1
        assert int(ids[0]) not in (0, 65534)
    assert {result.failure.kind for result in results} == {"PermissionError"}


def test_randomness_comes_from_the_seed(sandbox, arrays):
    body = """
    import random
    import numpy as np
    from sklearn.ensemble import RandomForestClassifier
    print(random.random(), np.random.rand())
    return RandomForestClassifier(n_estimators=3, n_jobs=-1).fit(x_train, y_train)
    """
    first, again, other = sandbox.run([(program(body), arrays, seed) for seed in (7, 7, 8)])
    assert first.stdout == again.stdout != other.stdout
    assert (first.proba == again.proba).all()
    assert (first.proba != other.proba).any()


def test_addresses_do_not_reach_messages(sandbox, arrays):
    message = run_one(sandbox, "raise ValueError(object())", arrays).failure.message
    assert message == "<object object at 0x…>"


def test_results_come_in_the_order_of_submission(sandbox, arrays):
    sleeps = (0.2, 0.0, 0.1, 0.0)
    body = "import time\ntime.sleep({})\nprint({})\nreturn 1"
    results = sandbox.run([(program(body.format(s, i)), arrays, 0) for i, s in enumerate(sleeps)])
    assert [int(result.stdout) for result in results] == [0, 1, 2, 3]


COMMON_PROGRAMS = {
    "pipeline": """
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler, PolynomialFeatures, QuantileTransformer
        from sklearn.feature_selection import SelectKBest, mutual_info_classif
        from sklearn.svm import SVC
        steps = [StandardScaler(), PolynomialFeatures(2), SelectKBest(mutual_info_classif, k=3)]
        model = make_pipeline(*steps, QuantileTransformer(n_quantiles=5), SVC(probability=True))
        return model.fit(x_train, y_train)
        """,
    "voting": """
        from sklearn.ensemble import VotingClassifier, HistGradientBoostingClassifier, ExtraTreesClassifier
        from sklearn.neural_network import MLPClassifier
        parts = [("a", HistGradientBoostingClassifier(max_iter=5)), ("b", ExtraTreesClassifier(5, n_jobs=2)),
                 ("c", MLPClassifier((4,), max_iter=20))]
        return VotingClassifier(parts, voting="soft", n_jobs=-1).fit(x_train, y_train)
        """,
    "cross-validation": """
        from sklearn.model_selection import cross_val_score
        from sklearn.gaussian_process import GaussianProcessClassifier
        model = GaussianProcessClassifier()
        print(cross_val_score(model, x_train, y_train, cv=3, n_jobs=4, scoring="roc_auc"))
        return model.fit(x_train, y_train)
        """,
    "pandas and scipy": """
        import pandas as pd
        from scipy import stats
        from sklearn.compose import ColumnTransformer
        from sklearn.preprocessing import OneHotEncoder
        from sklearn.neighbors import KNeighborsClassifier
        frame = pd.get_dummies(pd.cut(pd.Series(x_train[:, 0]), 3))
        print(frame.describe(), stats.spearmanr(x_train[:, 0], y_train))
        return KNeighborsClassifier(3).fit(x_train, y_train)
        """,
    "processes": """
        import multiprocessing
        from concurrent.futures import ThreadPoolExecutor
        from sklearn.naive_bayes import GaussianNB
        with multiprocessing.get_context("fork").Pool(2) as pool, ThreadPoolExecutor(4) as threads:
            assert pool.map(abs, [-1, 2]) == list(threads.map(abs, [-1, 2]))
        return GaussianNB().fit(x_train, y_train)
        """,
}


def test_common_programs_find_all_their_imports(sandbox, arrays):
    programs = dict(COMMON_PROGRAMS)
    if wire.MOUNT_NAMESPACE in sandbox.layers().missing:
        del programs["processes"]  # without shared memory of its own a program gets none
    results = sandbox.run([(program(body), arrays, 0) for body in programs.values()])
    assert {name: r.failure for name, r in zip(programs, results, strict=True) if r.failure} == {}


def test_hostile_programs_leak_no_descriptor_and_no_process(sandbox, arrays):
    bodies = [
        "import os\nos._exit(1)",
        "return 1",
        "import os\nos.write(4, bytes(2**24))",
        "raise ValueError",
    ]
    jobs = [(program(body), arrays, 0) for body in bodies]
    sandbox.run(jobs)
    before = os.listdir("/proc/self/fd")
    server_fds = f"/proc/{sandbox._process.pid}/fd"
    can_look = os.geteuid() == 0
    server_before = len(os.listdir(server_fds)) if can_look else 0
    sandbox.run(jobs * 10)
    assert os.listdir("/proc/self/fd") == before
    assert (len(os.listdir(server_fds)) if can_look else 0) == server_before
    assert split_processes(sandbox._process.pid) == []


@pytest.mark.parametrize("name", ["GridSearchCV", "RandomizedSearchCV", "HalvingGridSearchCV"])
def test_search_estimators_reached_by_other_ways_are_refused_too(sandbox, arrays, name):
    body = f"""
    import sklearn.experimental.enable_halving_search_cv
    import sklearn.model_selection as m
    from sklearn.linear_model import LogisticRegression
    search = getattr(m, {name[:4]!r} + {name[4:]!r})
    return search(LogisticRegression(), {{"C": [1, 2]}}).fit(x_train, y_train)
    """
    result = run_one(sandbox, body, arrays)
    assert result.outcome == "refused"
    assert name in result.failure.message
    assert result.failure.line == 6


def test_wrong_use_is_a_value_error(sandbox):
    times = ({"timeout_s": 0.0}, {"timeout_s": math.inf}, {"timeout_s": math.nan})
    for settings in ({"mode": "none"}, *times, {"workers": 0}, {"memory_mib": -1}):
        with pytest.raises(ValueError, match=str(next(iter(settings.values())))):
            Sandbox(**settings)
    with pytest.raises(ValueError, match="no job"):
        sandbox.wait()
    with pytest.raises(ValueError, match=r"\(3,\)"):
        SplitArrays(np.ones((2, 1)), np.arange(3), np.ones((2, 1)))
