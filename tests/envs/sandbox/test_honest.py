"""No program can raise its reward but by predicting better: tricks earn what a coin does, look-ups fail."""

import numpy as np
import pytest

from etpo.envs.datasets import Dataset, load_dataset
from etpo.envs.sandbox.box import wire
from etpo.envs.scoring import Scorer
from tests.envs.programs import make_passable

ROWS = 1_000
# Standard error of the AUC of a coin on one half, both classes equally frequent; a mean over halves has less.
COIN = np.sqrt((ROWS / 2 + 1) / (12 * (ROWS / 4) ** 2))

# `answer(labels)` returns a model that says these labels, or the same for every row where they do not fit.
HEAD = """
def build_model(x_train, y_train):
    import gc, os, sys, time
    import numpy as np
    n = len(x_train)
    class Model:
        def __init__(self, labels): self.labels = labels
        def predict_proba(self, x):
            p = np.full((len(x), 2), 0.5)
            labels = self.labels(x) if callable(self.labels) else self.labels
            if labels is not None and len(labels) == len(x):
                p[:, 1] = labels
                p[:, 0] = 1 - p[:, 1]
            return p
    answer = Model
"""


def trick(body: str) -> str:
    return HEAD + "".join(f"    {line}\n" for line in body.strip("\n").splitlines())


# Each looks for arrays of labels that are not its own y_train.
SEARCH = """
def labels_among(objects):
    for o in objects:
        if isinstance(o, np.ndarray) and o.shape == (n,) and o is not y_train and np.isin(o, (0, 1)).all():
            if not np.array_equal(o, y_train):
                return o
"""
TRICKS = {
    "garbage collector": SEARCH
    + """
gc.unfreeze()
objects = gc.get_objects()
return answer(labels_among([*objects, *gc.get_referents(*objects)]))
""",
    "stack": SEARCH
    + """
frames, found = [*sys._current_frames().values()], []
while frames:
    frame = frames.pop()
    if frame is not None:
        found += [*frame.f_locals.values(), *frame.f_globals.values()]
        frames.append(frame.f_back)
return answer(labels_among(found))
""",
    "stack at prediction": SEARCH
    + """
def look(x):
    frame, found = sys._getframe(), []
    while frame is not None:
        found += [*frame.f_locals.values(), *frame.f_globals.values()]
        frame = frame.f_back
    return labels_among(found)
return answer(look)
""",
    "modules": SEARCH
    + """
found = [v for m in list(sys.modules.values()) for v in list(vars(m).values())]
assert not [name for name in sys.modules if name.startswith("etpo")]
return answer(labels_among(found))
""",
    "behind the arrays": """
whole = x_train
while getattr(whole, "base", None) is not None:
    whole = whole.base
data = np.frombuffer(whole, np.uint8)
used = 24 + 2 * x_train.nbytes + y_train.nbytes
rest = data[used:].view(np.int64) if (len(data) - used) % 8 == 0 else data[used:]
return answer(rest[:n] if len(rest) >= n else None)
""",
    "descriptors": """
found = None
for fd in range(64):
    try:
        data = os.pread(fd, 10**7, 0)
    except OSError:
        continue
    numbers = np.frombuffer(data[: len(data) // 8 * 8], np.int64)
    if len(numbers) >= n and np.isin(numbers[-n:], (0, 1)).all():
        found = numbers[-n:]
return answer(found)
""",
    "metrics": """
import sklearn.metrics, sklearn.metrics._ranking as r
for m in (sklearn.metrics, r):
    m.roc_auc_score = m.auc = lambda *a, **k: 1.0
np.mean = lambda *a, **k: 1.0
return answer(None)
""",
    "a forged answer": """
import struct
p = np.zeros((n, 2)); p[:, 1] = 1
os.write(4, struct.pack("<4sBIdIIIII", b"etpo", 0, 0, 0, n, 2, 0, 0, 0) + p.tobytes())
os._exit(0)
""",
    "an answer that changes": """
class Shifty(np.ndarray):
    def __array__(self, *a, **k): return np.tile([0.0, 1.0], (n, 1))
    def __eq__(self, other): return True
    def __lt__(self, other): return False
class Model:
    def predict_proba(self, x): return np.tile([0.0, 1.0], (n, 1)).view(Shifty)
return Model()
""",
    "an earlier split's files": """
import pickle
places = [".", "..", "/tmp", "/var/tmp", "/dev/shm", "/box", "/box/files", os.path.expanduser("~"), "/run",
          "/run/lock", os.path.dirname(np.__file__), "/"]
known = {}
for place in places:
    try:
        with open(place + "/etpo-notes", "rb") as f: known.update(pickle.load(f))
    except OSError: pass
mine = known | {row.tobytes(): int(label) for row, label in zip(x_train, y_train)}
for place in places:
    try:
        with open(place + "/etpo-notes", "wb") as f: pickle.dump(mine, f)
    except OSError: pass
return answer(lambda x: [known.get(row.tobytes(), 0.5) for row in x])
""",
    "an earlier split's process": """
import pickle
mine = {row.tobytes(): int(label) for row, label in zip(x_train, y_train)}
def read():
    known = {}
    for place in ("/tmp", "/var/tmp", "/dev/shm", "."):
        try:
            with open(place + "/etpo-daemon", "rb") as f: known.update(pickle.load(f))
        except (OSError, EOFError, pickle.UnpicklingError): pass
    return known
if os.fork() == 0:
    os.setsid()
    if os.fork(): os._exit(0)
    for _ in range(1000):
        for place in ("/tmp", "/var/tmp", "/dev/shm", "."):
            try:
                with open(place + "/etpo-daemon", "wb") as f: pickle.dump(mine | read(), f)
            except OSError: pass
        time.sleep(0.01)
    os._exit(0)
known = read()
return answer(lambda x: [known.get(row.tobytes(), 0.5) for row in x])
""",
    "locks on a file that all can read": """
import fcntl, hashlib, struct, sklearn
file = open(sklearn.__file__)
def place(row, label):
    return 2 * int.from_bytes(hashlib.sha256(row.tobytes()).digest()[:6], "little") + int(label)
def lock(command, kind, at):
    return struct.unpack("hhqqi4x", fcntl.fcntl(file, command, struct.pack("hhqqi4x", kind, 0, at, 1, 0)))[0]
def told(row):
    for label in (0, 1):
        if lock(fcntl.F_GETLK, fcntl.F_WRLCK, place(row, label)) != fcntl.F_UNLCK:
            return label
    return 0.5
try:
    for row, label in zip(x_train, y_train):
        lock(fcntl.F_SETLK, fcntl.F_RDLCK, place(row, label))
    def tell(x):
        known = [told(row) for row in x]
        time.sleep(0.3)
        return known
    time.sleep(0.3)
    return answer(tell)
except OSError:
    return answer(None)
""",
    "System V memory": """
import ctypes
libc = ctypes.CDLL(None)
libc.shmat.restype = ctypes.c_void_p
key = libc.shmget(4711, 4096, 0o1666)
assert key == -1
return answer(None)
""",
}


@pytest.fixture(scope="module")
def coins() -> Dataset:
    """Labels that have nothing to do with the features."""
    draws = np.random.default_rng(3)
    y = np.arange(ROWS) % 2
    draws.shuffle(y)
    return Dataset("coins", draws.normal(size=(ROWS, 2)), y, ("a", "b"), ("0", "1"), "generated", True)


@pytest.mark.parametrize("name", TRICKS)
def test_a_trick_earns_what_a_coin_earns(sandbox, coins, name):
    if name == "System V memory" and wire.SECCOMP in sandbox.layers().missing:
        pytest.skip("this machine has no seccomp")
    score = Scorer(coins, sandbox).score(trick(TRICKS[name]))
    assert score.outcome == "ok", score
    assert abs(score.auc_mean - 0.5) < 4 * COIN


def test_the_order_of_rows_tells_nothing(sandbox):
    """The table is sorted by class, and the program works the halves out: the seeds are no secret."""
    x = np.random.default_rng(0).normal(size=(ROWS, 2))
    table = Dataset("sorted", x, np.arange(ROWS) * 2 // ROWS, ("a", "b"), ("0", "1"), "generated", True)
    body = """
from sklearn.model_selection import train_test_split
for seed in range(100):
    train, val = train_test_split(np.arange(2 * n), test_size=0.5, random_state=seed)
    if np.array_equal(train >= n, y_train == 1):
        return answer(val >= n)
raise ValueError("the halves are not those of any seed")
"""
    score = Scorer(table, sandbox).score(trick(body))
    assert score.outcome == "ok", score
    assert abs(score.auc_mean - 0.5) < 4 * COIN


LOOKUPS = {
    "scikit-learn's loader": (
        "breast-cancer",
        """
from sklearn.datasets import load_breast_cancer
x, y = load_breast_cancer(return_X_y=True)
known = {row.tobytes(): label for row, label in zip(x, y)}
return answer(lambda x: [known.get(row.tobytes(), 0.5) for row in x])
""",
    ),
    "scikit-learn's files": (
        "breast-cancer",
        """
import csv, sklearn
with open(os.path.join(os.path.dirname(sklearn.__file__), "datasets", "data", "breast_cancer.csv")) as file:
    rows = [list(map(float, row)) for row in list(csv.reader(file))[1:]]
known = {np.array(row[:-1]).tobytes(): row[-1] for row in rows}
return answer(lambda x: [known.get(row.tobytes(), 0.5) for row in x])
""",
    ),
    "any copy of the file": (
        "breast-cancer",
        """
import csv
rows = []
for top in ("/", sys.prefix, sys.base_prefix, "/usr", "/home", "/root", "/opt", "/var", "/tmp"):
    for folder, _, names in os.walk(top):
        for name in names:
            if name == "breast_cancer.csv":
                with open(os.path.join(folder, name)) as file:
                    rows = [list(map(float, row)) for row in list(csv.reader(file))[1:]]
known = {np.array(row[:-1]).tobytes(): row[-1] for row in rows}
return answer(lambda x: [known.get(row.tobytes(), 0.5) for row in x])
""",
    ),
    "OpenML": ("breast-cancer", "from sklearn.datasets import fetch_openml\nreturn fetch_openml(data_id=15)"),
    "etpo's generator": (
        "tic-tac-toe",
        """
from etpo.envs.datasets import load_dataset
data = load_dataset("tic-tac-toe")
known = {row.tobytes(): label for row, label in zip(data.x, data.y)}
return answer(lambda x: [known.get(row.tobytes(), 0.5) for row in x])
""",
    ),
}


@pytest.mark.parametrize("name", LOOKUPS)
def test_a_look_up_finds_no_labels(sandbox, name):
    missing = sandbox.layers().missing
    if wire.LANDLOCK in missing and wire.MOUNT_NAMESPACE in missing and name != "OpenML":
        pytest.skip("this machine permits neither Landlock nor a mount namespace")
    dataset, body = LOOKUPS[name]
    score = Scorer(load_dataset(dataset), sandbox, split_seeds=(0, 1)).score(trick(body))
    assert score.outcome == "error" or score.auc_mean == 0.5, score


def test_opening_the_csv_is_an_error(sandbox, coins, tmp_path):
    missing = sandbox.layers().missing
    if wire.LANDLOCK in missing and wire.MOUNT_NAMESPACE in missing:
        pytest.skip("this machine permits neither Landlock nor a mount namespace")
    path = tmp_path / "coins.csv"
    rows = (f"{a},{b},{label}" for (a, b), label in zip(coins.x, coins.y, strict=True))
    path.write_text("\n".join(["a,b,label", *rows]) + "\n")
    make_passable(tmp_path)
    path.chmod(0o644)
    data = load_dataset(str(path), target="label")
    body = f"""
import pandas as pd
table = pd.read_csv({str(path)!r})
known = {{row.tobytes(): label for row, label in zip(table[["a", "b"]].to_numpy(), table["label"])}}
return answer(lambda x: [known.get(row.tobytes(), 0.5) for row in x])
"""
    score = Scorer(data, sandbox).score(trick(body))
    assert score.outcome == "error", score
    assert "Error" in score.error
