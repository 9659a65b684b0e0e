"""Synthetic twins: generated tables with a real one's columns, types and class balance, and nothing else.

For trying things out where the real file cannot be had. What the columns say about the target is made up, so
a number measured on a twin says nothing about the real table; each such number is labelled synthetic.
"""

import zlib
from dataclasses import dataclass

import numpy as np
import pandas as pd

from etpo.envs.datasets.catalog import Recipe, find_name, find_recipe

MOST_ROWS = 3_000
SIGNAL = 0.6  # by how many standard deviations a telling column differs between two classes, typically


@dataclass(frozen=True)
class Column:
    """One column: its kind (`int`, `float`, `text`, `bool`, `id`), and what the kind needs.

    Attributes:
        low, high, mean: of a number.
        values: of text; of a `bool` none.
        missing: share of the cells that are empty.
    """

    name: str
    kind: str
    low: float = 0.0
    high: float = 1.0
    mean: float = 0.5
    values: tuple[str, ...] = ()
    missing: float = 0.0


@dataclass(frozen=True)
class Shape:
    """What a twin copies: the columns but for the target, the target's values with their counts, the rows."""

    columns: tuple[Column, ...]
    target: str
    class_counts: dict[str, int]


# A shape a data set. First line: the target and its values with their counts; then a column a line, `name |`
# and `int low high mean`, `float low high mean`, `text value; value`, `text N PREFIX` (N values), `bool` or
# `id`; behind a further bar the share of empty cells.
_SHAPES = {
    "breast-w": """
        Class | benign 458; malignant 241
        Clump_Thickness | int 1 10 4.4
        Cell_Size_Uniformity | int 1 10 3.1
        Cell_Shape_Uniformity | int 1 10 3.2
        Marginal_Adhesion | int 1 10 2.8
        Single_Epi_Cell_Size | int 1 10 3.2
        Bare_Nuclei | int 1 10 3.5 | 0.023
        Bland_Chromatin | int 1 10 3.4
        Normal_Nucleoli | int 1 10 2.9
        Mitoses | int 1 10 1.6""",
    "cmc": """
        Contraceptive_method_used | 1 629; 2 333; 3 511
        Wifes_age | int 16 49 32.5
        Wifes_education | int 1 4 3.0
        Husbands_education | int 1 4 3.4
        Number_of_children_ever_born | int 0 16 3.3
        Wifes_religion | int 0 1 0.85
        Wifes_now_working%3F | int 0 1 0.75
        Husbands_occupation | int 1 4 2.1
        Standard-of-living_index | int 1 4 3.1
        Media_exposure | int 0 1 0.07""",
    "credit-g": """
        class | good 700; bad 300
        checking_status | text <0; 0<=X<200; >=200; no checking
        duration | int 4 72 20.9
        credit_history | text no credits/all paid; all paid; existing paid; delayed previously; critical/other
        purpose | text new car; used car; furniture/equipment; radio/tv; repairs; education; business; other
        credit_amount | int 250 18424 3271
        savings_status | text <100; 100<=X<500; 500<=X<1000; >=1000; no known savings
        employment | text unemployed; <1; 1<=X<4; 4<=X<7; >=7
        installment_commitment | int 1 4 3.0
        personal_status | text male div/sep; female div/dep/mar; male single; male mar/wid
        other_parties | text none; co applicant; guarantor
        residence_since | int 1 4 2.8
        property_magnitude | text real estate; life insurance; car; no known property
        age | int 19 75 35.5
        other_payment_plans | text bank; stores; none
        housing | text rent; own; for free
        existing_credits | int 1 4 1.4
        job | text unemp/unskilled non res; unskilled resident; skilled; high qualif/self emp/mgmt
        num_dependents | int 1 2 1.16
        own_telephone | text none; yes
        foreign_worker | text yes; no""",
    "diabetes": """
        class | tested_negative 500; tested_positive 268
        preg | int 0 17 3.8
        plas | int 0 199 120.9
        pres | int 0 122 69.1
        skin | int 0 99 20.5
        insu | int 0 846 79.8
        mass | float 0 67.1 32
        pedi | float 0.078 2.42 0.47
        age | int 21 81 33.2""",
    "eucalyptus": """
        Utility | none 180; low 107; average 130; good 214; best 105
        Abbrev | text 16 A
        Rep | int 1 4 2.2
        Locality | text 8 L
        Map_Ref | text 14 N
        Latitude | text 12 S
        Altitude | int 70 300 174
        Rainfall | int 850 1750 1080 | 0.001
        Frosts | int -3 -2 -2.6
        Year | int 1980 1986 1982
        Sp | text 27 sp
        PMCno | int 1 3275 2057 | 0.01
        DBH | float 0.58 42.3 15.5 | 0.001
        Ht | float 1.15 21.79 8.8 | 0.001
        Surv | float 1.5 100 62 | 0.13
        Vig | float 0.5 5 3 | 0.094
        Ins_res | float 0 4.5 2.9 | 0.094
        Stem_Fm | float 0 5 2.9 | 0.094
        Crown_Fm | float 0 5 3 | 0.094
        Brnch_Fm | float 0 5 2.8 | 0.094""",
    "pc1": """
        defects | bool False 1032; True 77
        loc | float 0 602 22
        v(g) | float 1 136 5.4
        ev(g) | float 1 125 2.4
        iv(G) | float 1 76 3.7
        N | float 0 2075 113
        V | float 0 14619 665
        L | float 0 2 0.1
        D | float 0 125 18
        I | float 0 294 34
        E | float 0 1230608 19300
        B | float 0 4.87 0.22
        T | float 0 68367 1072
        lOCode | int 0 602 22
        lOComment | int 0 99 2.2
        lOBlank | int 0 96 4.8
        locCodeAndComment | int 0 63 1.3
        uniq_Op | int 0 99 15
        uniq_Opnd | int 0 538 24
        total_Op | int 0 1143 68
        total_Opnd | int 0 952 46
        branchCount | int 1 236 9""",
    "airlines": """
        Delay | 0 299119; 1 240264
        Airline | text 18 A
        Flight | int 1 7814 2428
        AirportFrom | text 293 F
        AirportTo | text 293 T
        DayOfWeek | int 1 7 3.9
        Time | int 10 1439 803
        Length | int 0 655 132""",
    "jungle_chess_2pcs_raw_endgame_complete": """
        class | b 17400; d 4350; w 23070
        white_piece0_strength | int 0 7 4.0
        white_piece0_file | int 0 6 3.0
        white_piece0_rank | int 0 8 4.0
        black_piece0_strength | int 0 7 4.0
        black_piece0_file | int 0 6 3.0
        black_piece0_rank | int 0 8 4.0""",
    "pharyngitis": """
        radt | 0 281; 1 231
        number | id
        age_y | float 3 14.3 6.07
        pain | int 0 1 0.84
        swollenadp | int 0 3 0.99
        tender | int 0 1 0.2
        tonsillarswelling | int 0 1 0.72
        exudate | int 0 1 0.22
        temperature | float 36.6 41 38.74
        sudden | int 0 1 0.8
        cough | int 0 1 0.39
        rhinorrhea | int 0 1 0.37
        conjunctivitis | int 0 1 0.03
        headache | int 0 1 0.28
        erythema | int 0 1 0.89
        petechiae | int 0 1 0.18
        abdopain | int 0 1 0.34
        diarrhea | int 0 1 0.05
        nauseavomit | int 0 1 0.23
        scarlet | int 0 1 0.1""",
    "health-insurance": """
        Response | 0 38673; 1 12209
        ID | id
        City_Code | text 36 C
        Region_Code | int 1 6194 1733
        Accomodation_Type | text Owned; Rented
        Reco_Insurance_Type | text Individual; Joint
        Upper_Age | int 18 75 44.9
        Lower_Age | int 16 75 42.7
        Is_Spouse | text No; Yes
        Health Indicator | text 9 X | 0.1
        Holding_Policy_Duration | text 15 D | 0.1
        Holding_Policy_Type | int 1 4 2.44 | 0.1
        Reco_Policy_Cat | int 1 22 15.1
        Reco_Policy_Premium | float 2280 43350.4 14184""",
    "kidney-stone": """
        target | 0 230; 1 184
        id | id
        gravity | float 1.005 1.04 1.02
        ph | float 4.76 7.94 5.96
        osmo | int 187 1236 652
        cond | float 5.1 38 21.4
        urea | int 10 620 279
        calc | float 0.17 14.34 4.11""",
    "spaceship-titanic": """
        Transported | bool False 4315; True 4378
        PassengerId | id
        HomePlanet | text Earth; Europa; Mars | 0.023
        CryoSleep | bool | 0.025
        Cabin | text 1500 B | 0.023
        Destination | text TRAPPIST-1e; 55 Cancri e; PSO J318.5-22 | 0.021
        Age | float 0 79 28.8 | 0.021
        VIP | bool | 0.023
        RoomService | float 0 14327 225 | 0.021
        FoodCourt | float 0 29813 458 | 0.021
        ShoppingMall | float 0 23492 174 | 0.024
        Spa | float 0 22408 311 | 0.021
        VRDeck | float 0 24133 305 | 0.022
        Name | text 2000 N | 0.023""",
}


def twin_recipe(name: str) -> Recipe:
    """The recipe of a data set's twin: its table is generated, the same one each time."""
    name = find_name(name)
    recipe = find_recipe(name)
    return Recipe(recipe.target, f"generated, synthetic: a twin of {recipe.source}", table=lambda: twin(name))


def twin(name: str) -> pd.DataFrame:
    """The generated table: up to `MOST_ROWS` rows in random order, the same at each call."""
    shape = shape_of(name)
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    classes = list(shape.class_counts)
    counts = np.array(list(shape.class_counts.values()))
    n_rows = min(int(counts.sum()), MOST_ROWS)
    ends = np.round(counts.cumsum() / counts.sum() * n_rows).astype(int)
    y = rng.permutation(np.repeat(np.arange(len(classes)), np.diff(ends, prepend=0)))
    columns = {column.name: _draw(column, y, len(classes), rng) for column in shape.columns}
    labels = pd.Series(classes).iloc[y].reset_index(drop=True)
    is_truth = set(classes) == {"False", "True"}
    columns[shape.target] = labels == "True" if is_truth else _as_numbers(labels)
    return pd.DataFrame(columns)


def shape_of(name: str) -> Shape:
    """The shape of a named table; of one that is built here, read off that table."""
    recipe = find_recipe(name)
    if recipe.table is not None:
        return _read_off(recipe.table(), recipe.target)
    head, *lines = _SHAPES[find_name(name)].strip().splitlines()
    target, values = (part.strip() for part in head.split("|"))
    counts = {}
    for value in values.removeprefix("bool ").split(";"):
        label, _, count = value.strip().rpartition(" ")
        counts[label] = int(count)
    return Shape(tuple(map(_column, lines)), target, counts)


def _column(line: str) -> Column:
    name, what, *rest = (part.strip() for part in line.split("|"))
    kind, _, details = what.partition(" ")
    missing = float(rest[0]) if rest else 0.0
    if kind in ("int", "float"):
        low, high, mean = map(float, details.split())
        return Column(name, kind, low, high, mean, missing=missing)
    first = details.split(" ")[0]
    if kind == "text" and first.isdigit() and ";" not in details:
        prefix = details.split(" ")[1]
        return Column(name, kind, values=tuple(f"{prefix}{i}" for i in range(int(first))), missing=missing)
    values = tuple(value.strip() for value in details.split(";")) if kind == "text" else ()
    return Column(name, kind, values=values, missing=missing)


def _read_off(table: pd.DataFrame, target: str) -> Shape:
    columns = []
    for name in table.columns.drop(target):
        column = table[name]
        if pd.api.types.is_numeric_dtype(column):
            kind = "int" if pd.api.types.is_integer_dtype(column) or (column % 1 == 0).all() else "float"
            columns.append(Column(name, kind, column.min(), column.max(), column.mean()))
        else:
            columns.append(Column(name, "text", values=tuple(sorted(column.unique()))))
    counts = table[target].value_counts().sort_index()
    return Shape(tuple(columns), target, {str(label): int(count) for label, count in counts.items()})


def _draw(column: Column, y: np.ndarray, classes: int, rng: np.random.Generator) -> pd.Series:
    """One column behind the labels y [rows]; its values lean on the class, more or less."""
    n = len(y)
    if column.kind == "id":
        return pd.Series(np.arange(n))
    shift = rng.normal(scale=SIGNAL, size=classes)[y]
    if column.kind in ("int", "float"):
        # A Beta draw has the range and the mean; the class moves the logit of where in the range it falls.
        width = column.high - column.low
        if width == 0:
            return pd.Series(np.full(n, column.low))
        middle = np.clip((column.mean - column.low) / width, 0.01, 0.99)
        level = 1 / (1 + np.exp(-(np.log(middle / (1 - middle)) + shift)))
        values = column.low + width * rng.beta(3 * level, 3 * (1 - level))
        if column.kind == "int":
            # A column of two values: the share of the upper one is the mean.
            values = column.low + (rng.random(n) < level) if width == 1 else np.round(values)
        drawn = pd.Series(values.astype(np.int64) if column.kind == "int" else values.round(4))
    else:
        options = np.array(column.values or (False, True), dtype=object)
        # How each class weighs the values.
        weights = rng.dirichlet(np.ones(len(options)), classes) + 0.5 / len(options)
        edges = (weights / weights.sum(axis=1, keepdims=True)).cumsum(axis=1)
        picks = (rng.random(n)[:, None] > edges[y]).sum(axis=1).clip(0, len(options) - 1)
        drawn = pd.Series(options[picks])
        if column.kind == "bool" and not column.missing:
            drawn = drawn.astype(bool)
    if column.missing:
        drawn = drawn.mask(rng.random(n) < column.missing)
    return drawn


def _as_numbers(labels: pd.Series) -> pd.Series:
    return labels.astype(int) if labels.str.fullmatch(r"-?\d+").all() else labels
