"""Reads a CSV file of a user's own: as its header says, or not at all.

Nothing is dropped, guessed or moved in silence: what was dropped, drawn or taken as text is counted in
notes, and a file whose columns could stand under wrong names is refused. Imports nothing of etpo, for its
text stands in best_program.py.
"""

import codecs
import csv
import difflib
import gzip
import io
import itertools
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    import _csv

MOST_ROWS = 2_000
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
# Words for no value among numbers; in a column of text they are values like others.
GAPS = frozenset(
    ["", "na", "n/a", "#n/a", "#na", "<na>", "nan", "-nan", "null", "none", "nil", "missing", "?", "-", "."]
)
# A column is one of numbers where so many of its cells are; the other cells are dirt, and their rows dropped.
CLEAN_SHARE = 0.95
DECIMAL_COMMA = re.compile(r"[+-]?(\d{1,3}(\.\d{3})+|\d+)(,\d+)?([eE][+-]?\d+)?")
LOOKS_LIKE_NUMBER = re.compile(r"[$€£]?\s*[+-]?\d[\d.,' ]*\s*(%|[A-Za-z]{1,3}|[$€£])?")


def read_table(path: str | Path, target: str, head: bool = False) -> tuple[pd.DataFrame, list[str]]:
    """The complete rows of a CSV file, at most 2,000, numbers as float64 and all else as text.

    The separator is found, and decimal commas where it is no comma; byte order marks are read, gzip too.
    Names and cells lose blanks at their ends. A row with an empty cell is dropped, in a column of numbers
    also one with a word for a gap (NA, null, ?, …), an infinite number, or text, where at most one cell in
    twenty has it; with more such cells the column is text. A column without any value is dropped.

    Args:
        path: the file.
        target: the target's column.
        head: keep the first 2,000 rows instead of 2,000 drawn with seed 0.

    Returns:
        The table in the order of the file, and one note for each thing that was dropped, drawn or guessed.

    Raises:
        OSError: the file cannot be read.
        ValueError: no such table; what was expected and what came, without the path.
    """
    text = read_text(path)
    separator = find_separator(text, target)
    header, rows, n_short = split_rows(text, separator)
    target, notes = check_header(header, target)
    if separator != ",":
        notes.append(f"separated by {SEPARATORS[separator]}")
    names = unique_names(header)
    columns: dict[str, np.ndarray] = {}
    for index, name in enumerate(names):
        cells = [cells[index] for _, cells in rows]
        lines = [line for line, _ in rows]
        column, said = read_column(cells, lines, name, separator != ",", name == target)
        notes += said
        if column is not None:
            columns[name] = column
    if target not in columns:
        raise ValueError(f"expected values in the target's column {target!r}, got none in {len(rows)} rows")
    table = pd.DataFrame(columns)
    kept, said = keep_rows(table, n_short, head)
    return kept, notes + said


def read_text(path: str | Path) -> str:
    """The file's text; UTF-8, or what its byte order mark says."""
    raw = Path(path).read_bytes()
    if raw[:2] == b"\x1f\x8b":
        raw = gzip.decompress(raw)
    marks = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
    encoding = next((name for mark, name in marks.items() if raw.startswith(mark)), "utf-8")
    if not raw.strip():
        raise ValueError("expected a header line and rows, got an empty file")
    if encoding == "utf-8" and b"\0" in raw:
        raise ValueError("expected a CSV file with a header line, got binary data")
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ValueError(
            f"expected a CSV file in UTF-8 with a header line, got the byte 0x{raw[error.start]:02x} in line "
            f"{line}; save it as UTF-8 (one in Latin-1: iconv -f latin1 -t utf-8)"
        ) from error


def find_separator(text: str, target: str) -> str:
    """The one under which the target is a column of the header, and most rows are as long as the header."""

    def fits(separator: str) -> tuple[bool, bool, float]:
        rows = [row for row in itertools.islice(_cells(text, separator, strict=False), 200) if row]
        header = [name.strip() for name in rows[0]]
        regular = sum(len(row) == len(header) for row in rows) / len(rows)
        return len(header) > 1 and target.strip() in header, len(header) > 1, regular

    return max(SEPARATORS, key=fits)


def _cells(text: str, separator: str, strict: bool) -> "_csv.Reader":
    csv.field_size_limit(2**31 - 1)
    lines = io.StringIO(text.lstrip("\r\n"), newline="")
    return csv.reader(lines, delimiter=separator, skipinitialspace=True, strict=strict)


def split_rows(text: str, separator: str) -> tuple[list[str], list[tuple[int, list[str]]], int]:
    """The header, (line, cells) of the rows that are as long, and how many are shorter."""
    reader = _cells(text, separator, strict=True)
    rows: list[tuple[int, list[str]]] = []
    skipped = len(text) - len(text.lstrip("\r\n"))
    first = text[:skipped].count("\n")
    n_short = 0
    try:
        header = [name.strip() for name in next(reader)]
        for cells in reader:
            line = reader.line_num + first
            if any(cells[len(header) :]):
                raise ValueError(
                    f"line {line}: expected {len(header)} fields as in the header, got {len(cells)}; name "
                    f"every column in the header, and quote a field that holds {separator!r}"
                )
            if len(cells) < len(header):
                n_short += bool(cells)
            else:
                rows.append((line, [cell.strip() for cell in cells[: len(header)]]))
    except csv.Error as error:
        raise ValueError(
            f"line {reader.line_num + first}: expected a field that ends with its quotation mark, got {error}"
        ) from error
    if not rows:
        what = f"{n_short} rows that are shorter than the header" if n_short else "no rows"
        raise ValueError(f"expected rows behind the header line, got {what}")
    return header, rows, n_short


def check_header(header: list[str], target: str) -> tuple[str, list[str]]:
    """The target as the header spells it, and notes. ValueError where there is none, or more than one."""
    target = target.strip()
    count = header.count(target)
    if count == 0:
        shown = ", ".join(repr(name) for name in header[:12]) + (", …" if len(header) > 12 else "")
        near = difflib.get_close_matches(target, header, n=1, cutoff=0.6)
        hint = f"; did you mean {near[0]!r:.80}?" if near else ""
        raise ValueError(f"expected a column {target!r}, got {len(header)}: {shown}{hint}")
    if count > 1:
        raise ValueError(f"expected one column {target!r}, got {count} of this name")
    twice = sorted({name for name in header if name and header.count(name) > 1})
    return target, [f"several columns are named {name!r}" for name in twice]


def unique_names(header: list[str]) -> list[str]:
    """Names as pandas gives them: `a`, `a.1`, …; `Unnamed: 3` for none."""
    names: list[str] = []
    for index, name in enumerate(header):
        wanted = name = name or f"Unnamed: {index}"
        number = 0
        while wanted in names or (number and wanted in header):
            number += 1
            wanted = f"{name}.{number}"
        names.append(wanted)
    return names


def read_column(
    cells: list[str], lines: list[int], name: str, decimal_comma: bool, is_target: bool
) -> tuple[np.ndarray | None, list[str]]:
    """A column's values, NaN (of text: None) in gaps, and notes; None where it holds no value."""
    is_gap = [cell.lower() in GAPS for cell in cells]
    n_present = len(cells) - sum(is_gap)
    if not n_present and not (is_target and any(cells)):
        return None, [f"column {name!r} left out, as it holds no value"]
    has_comma = decimal_comma and any("," in cell and DECIMAL_COMMA.fullmatch(cell) for cell in cells)
    values = [np.nan if gap else to_number(cell, has_comma) for cell, gap in zip(cells, is_gap, strict=True)]
    dirty = [i for i, value in enumerate(values) if value is None]
    n_numbers = n_present - len(dirty)
    if n_numbers and (not dirty or (n_numbers >= CLEAN_SHARE * n_present and not is_target)):
        notes = [f"column {name!r} read with decimal commas"] if has_comma else []
        if dirty:
            first = f"first {cells[dirty[0]]!r:.40} in line {lines[dirty[0]]}"
            notes.append(
                f"column {name!r} is of numbers, but for {len(dirty)} of {n_present} cells ({first}): their "
                "rows are dropped"
            )
        return np.array([np.nan if value is None else value for value in values], np.float64), notes
    notes = []
    odd = [cells[i] for i in dirty]
    if n_numbers and n_numbers >= n_present / 2:
        notes = [f"column {name!r} is taken as text, as {len(dirty)} of {n_present} cells are no numbers "
                 f"(such as {odd[0]!r:.40})"]  # fmt: skip
    elif not is_target:
        like = [cell for cell in odd if LOOKS_LIKE_NUMBER.fullmatch(cell)]
        if len(like) > len(odd) / 2:
            notes = [f"column {name!r} is taken as text, as {like[0]!r:.40} is no plain number"]
    return np.array([cell or None for cell in cells], object), notes


def to_number(cell: str, decimal_comma: bool) -> float | None:
    """The number that a cell is, or None; with `decimal_comma` 1.234,5 is 1234.5."""
    if decimal_comma and DECIMAL_COMMA.fullmatch(cell):
        cell = cell.replace(".", "").replace(",", ".") if "," in cell else cell.replace(".", "")
    try:
        return None if "_" in cell else float(cell)
    except ValueError:
        return None


def keep_rows(table: pd.DataFrame, n_short: int, head: bool) -> tuple[pd.DataFrame, list[str]]:
    """The complete rows, at most 2,000 of them, and what was dropped."""
    n_rows, dropped, notes = len(table) + n_short, [], []
    if n_short:
        dropped.append(f"{n_short} shorter than the header")
    is_infinite = np.zeros(len(table), bool)
    for name in table.columns:
        if table[name].dtype.kind == "f":
            is_infinite |= np.isinf(table[name].to_numpy())
    gaps = table.isna()
    if is_infinite.any():
        dropped.append(f"{is_infinite.sum()} with an infinite number")
    is_incomplete = gaps.any(axis=1).to_numpy() & ~is_infinite
    if is_incomplete.any():
        counts = gaps.sum().sort_values(ascending=False)
        where = ", ".join(f"{name!r} {n}" for name, n in counts[counts > 0].head(5).items())
        dropped.append(f"{is_incomplete.sum()} with a gap (by column: {where})")
    table = table[~(is_incomplete | is_infinite)]
    if dropped:
        notes.append(f"{n_rows - len(table)} of {n_rows} rows dropped: {'; '.join(dropped)}")
    if not len(table):
        raise ValueError(f"expected rows without gaps, got none: {notes[-1]}")
    if len(table) > MOST_ROWS:
        which = "the first ones" if head else "drawn with seed 0"
        notes.append(f"{MOST_ROWS} of {len(table)} complete rows kept, {which}")
        order = np.arange(len(table)) if head else np.random.RandomState(0).permutation(len(table))
        table = table.iloc[np.sort(order[:MOST_ROWS])]
    return table.reset_index(drop=True), notes
