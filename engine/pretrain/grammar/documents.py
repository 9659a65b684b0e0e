"""The corpus of the bundled model: programs that a probabilistic grammar writes, with mistakes and repairs.

A document is what one episode shows: a task prompt and a first program; where that program fails, often also
its real error and a corrected program. Nothing in it depends on a data set but the size in the prompt.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from etpo.engine.pretrain.grammar.check import first_error
from etpo.engine.pretrain.grammar.faults import FAULTS
from etpo.engine.pretrain.grammar.models import draw_model
from etpo.engine.pretrain.grammar.program import Call, Draw, Program, Size, imports_of, make_program
from etpo.envs.prompts import task_prompt

FAULTY_SHARE = 0.46
REPAIR_SHARE = 0.30
SAME_PROGRAM_SHARE = 0.95
TWO_FAULTS_SHARE = 0.06
# Faults whose error is the same whatever the model: a cheap one is run in its place.
ANY_MODEL = ("nothing_returned", "other_returned")
# Faults of the imports and of the last lines: they may come on top of another.
SECOND = ("missing_import", "misspelt_module", "unfitted", "wrong_variable", "wrong_shape", "wrong_method")
_CHEAP = Call("GaussianNB")

_WORDS = """
    adult apple band bank beans bike bird blood bone bridge car census churn city claims click clinic
    coffee credit crop customer dna drug energy engine erosion eye fault fish flight flower forest
    fraud glass grid heart hotel house image income iris leaf letter liver loan mail market mines moon
    mouse music noise ocean oil page patient phone plant points price pump quake rain ring river road
    robot satellite seeds sensor ship signal sleep soil sonar speech star steel stock student survey
    tax text thyroid tile train tree vehicle visit voice vote water wave weather wheat wind yeast zoo
"""
_SYLLABLES = """
    ba be bo da de do fa fi ga go ha ka ki la le lo ma mi mo na ne no pa po ra re ri ro sa se ta ti to
    va ve za
"""


@dataclass(frozen=True)
class Document:
    """One episode's worth of text.

    Attributes:
        task: the task prompt.
        body: the first program's body, without a newline at its end.
        error: one line, where the failed program is followed by its repair; else None.
        repaired: the corrected body, or None.
        kind: the fault's kind, or None where the first program is right.
        nats: −log p of the choices that made the first body (in the mean, an upper bound on its entropy).
    """

    task: str
    body: str
    error: str | None
    repaired: str | None
    kind: str | None
    nats: float


def documents(seed: int) -> Iterator[Document]:
    """An endless corpus, the same for the same seed."""
    rng = random.Random(seed)
    while True:
        yield draw_document(rng)


def draw_document(rng: random.Random) -> Document:
    """One document."""
    size, task = draw_task(rng)
    d = Draw(rng)
    program = draw_program(d, size)
    if not d.coin(FAULTY_SHARE):
        return Document(task, program.text(), None, None, None, d.nats)
    kind, body, error = break_program(d, program, size)
    if rng.random() >= REPAIR_SHARE / FAULTY_SHARE:
        return Document(task, body, None, None, kind, d.nats)
    repaired = program if rng.random() < SAME_PROGRAM_SHARE else draw_program(Draw(rng), size)
    return Document(task, body, error, repaired.text(), kind, d.nats)


def draw_task(rng: random.Random) -> tuple[Size, str]:
    """A data set's size and the prompt that names it. Names are random, some of them invented."""
    words = [rng.choice(_WORDS.split()) for _ in range(rng.choice((1, 1, 2, 2, 3)))]
    if rng.random() < 0.4:
        syllables = _SYLLABLES.split()
        words[-1] = "".join(rng.choice(syllables) for _ in range(rng.randint(2, 4)))
    if rng.random() < 0.2:
        words.append(str(rng.randint(1, 99)))
    name = rng.choice("-_").join(words)
    if rng.random() < 0.1:
        name += ":synthetic"
    n_rows = 2000 if rng.random() < 0.25 else int(120 * (2000 / 120) ** rng.random())
    n_features = int(3 * (60 / 3) ** rng.random())
    n_classes = rng.choice((2, 2, 2, 2, 2, 2, 3, 3, 4, 5, 6, 8, 10))
    return Size(n_rows, n_features, n_classes), task_prompt(name, n_rows, n_features, n_classes)


def draw_program(d: Draw, size: Size) -> Program:
    """A program without a fault."""
    model = draw_model(d, size)
    var = d.pick(("model", "clf", "pipe" if "ipeline" in model.name else "est", None), (52, 18, 12, 18))
    if var is None or d.coin(0.55):
        return make_program(model, var, ("return @.fit(x_train, y_train)",))
    return make_program(model, var, ("@.fit(x_train, y_train)", "return @"))


def break_program(d: Draw, program: Program, size: Size) -> tuple[str, str, str]:
    """(kind, body, error) of a program that fails: one fault, sometimes two."""
    kinds, weights = tuple(FAULTS), [weight for weight, _ in FAULTS.values()]
    while True:
        start = d.nats
        kind = d.pick(kinds, weights)
        broken = FAULTS[kind][1](d, program, size)
        tried = broken
        if isinstance(broken, Program) and kind in ANY_MODEL:
            tried = replace(broken, imports=imports_of(_CHEAP), model=_CHEAP)
        elif isinstance(broken, Program) and d.coin(TWO_FAULTS_SHARE):
            second = FAULTS[d.pick(SECOND)][1](d, broken, size)
            broken = tried = second or broken
        if broken is not None and tried is not None:
            error = first_error(_text(tried), size)
            if error is not None:
                return kind, _text(broken), error
        d.nats = start


def _text(broken: Program | str) -> str:
    return broken if isinstance(broken, str) else broken.text()
