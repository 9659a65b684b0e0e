"""CSV files that people bring: each is what its header says, or is refused in one line."""

import codecs
import gzip

import numpy as np
import pytest

from etpo.envs.datasets import DatasetError, load_dataset

ROWS = [(i * 37 % 11 / 4, i % 7 - 3.5, "pq"[i % 2]) for i in range(60)]


def table(path, rows=ROWS, header="a,b,y", separator=","):
    lines = [header.replace(",", separator), *(separator.join(map(str, row)) for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def plain(data):
    """The very table of ROWS."""
    return data.x.tolist() == [[a, b] for a, b, _ in ROWS] and data.class_names == ("p", "q")


@pytest.mark.parametrize("word", ["None", "NA", "null", "N/A", "nan", "?", "-"])
def test_a_word_for_a_gap_is_a_class_and_a_value_of_text_like_others(tmp_path, word):
    rows = [(a, (word, "mild")[i % 2], (word, "x", "z")[i % 3]) for i, (a, _, _) in enumerate(ROWS)]
    data = load_dataset(table(tmp_path / "t.csv", rows), "y")
    assert len(data.y) == 60
    assert word in data.class_names
    assert len(data.class_names) == 3
    assert np.unique(data.x[:, 1]).tolist() == [0, 1]


@pytest.mark.parametrize("word", ["", "NA", "None", "?", "null"])
def test_a_gap_among_numbers_is_dropped_counted_and_said(tmp_path, word, caplog):
    rows = [(word if i % 10 == 0 else a, b, y) for i, (a, b, y) in enumerate(ROWS)]
    data = load_dataset(table(tmp_path / "t.csv", rows), "y")
    assert len(data.y) == 54
    assert "6 of 60 rows dropped: 6 with a gap (by column: 'a' 6)" in caplog.text


def test_a_dirty_cell_costs_its_row_and_is_named(tmp_path, caplog):
    rows = [("1.2x" if i == 17 else a, b, y) for i, (a, b, y) in enumerate(ROWS)]
    data = load_dataset(table(tmp_path / "t.csv", rows), "y")
    assert data.x[:, 0].tolist() == [a for i, (a, _, _) in enumerate(ROWS) if i != 17]
    assert "'a' is of numbers, but for 1 of 60 cells (first '1.2x' in line 19)" in caplog.text


def test_a_column_that_is_ranked_though_it_looks_like_numbers_is_named(tmp_path):
    rows = [("3+" if i % 5 == 0 else i % 3, f"{b}%", y) for i, (_, b, y) in enumerate(ROWS)]
    notes = " ".join(load_dataset(table(tmp_path / "t.csv", rows), "y").notes)
    assert "'a' is taken as text, as 12 of 60 cells are no numbers (such as '3+')" in notes
    assert "'b' is taken as text, as '-3.5%' is no plain number" in notes


@pytest.mark.parametrize("extra", ["1", "x"])
def test_rows_longer_than_the_header_are_refused(tmp_path, extra):
    rows = [(*row, extra) for row in ROWS]
    with pytest.raises(DatasetError, match=r"line 2: expected 3 fields as in the header, got 4"):
        load_dataset(table(tmp_path / "t.csv", rows), "y")
    with pytest.raises(DatasetError, match="line 9: expected 3 fields"):
        load_dataset(table(tmp_path / "t.csv", [*ROWS[:7], *rows[7:8], *ROWS[8:]]), "y")


def test_an_empty_field_behind_each_row_changes_nothing(tmp_path):
    assert plain(load_dataset(table(tmp_path / "t.csv", [(*row, "") for row in ROWS]), "y"))
    data = load_dataset(table(tmp_path / "t.csv", [(*row, "") for row in ROWS], "a,b,y,"), "y")
    assert plain(data)
    assert data.notes == ("column 'Unnamed: 3' left out, as it holds no value",)


def test_shorter_rows_are_dropped_and_counted(tmp_path):
    data = load_dataset(table(tmp_path / "t.csv", [*ROWS, ("1",), ("1", "2")]), "y")
    assert plain(data)
    assert data.notes == ("2 of 62 rows dropped: 2 shorter than the header",)


def test_an_empty_column_costs_no_row(tmp_path):
    data = load_dataset(table(tmp_path / "t.csv", [(a, "", b, y) for a, b, y in ROWS], "a,gap,b,y"), "y")
    assert plain(data)
    assert data.notes == ("column 'gap' left out, as it holds no value",)


@pytest.mark.parametrize(("separator", "name"), [(";", "semicolons"), ("\t", "tabs"), ("|", "vertical bars")])
def test_other_separators_are_found_and_said(tmp_path, separator, name):
    data = load_dataset(table(tmp_path / "t.csv", separator=separator), "y")
    assert plain(data)
    assert data.notes == (f"separated by {name}",)


def test_decimal_commas_are_read_where_the_separator_is_no_comma(tmp_path):
    rows = [(str(a).replace(".", ","), f"1.00{i % 9},5", y) for i, (a, _, y) in enumerate(ROWS)]
    data = load_dataset(table(tmp_path / "t.csv", rows, separator=";"), "y")
    assert data.x[:, 0].tolist() == [a for a, _, _ in ROWS]
    assert data.x[:, 1].tolist() == [1000.5 + i % 9 for i in range(60)]
    assert "column 'a' read with decimal commas" in data.notes


def test_of_a_long_file_rows_are_drawn_and_the_paper_takes_its_head(tmp_path):
    rows = [(i, i % 5, "p" if i < 3000 else "q") for i in range(6000)]
    path = table(tmp_path / "t.csv", rows)
    data = load_dataset(path, "y")
    assert len(data.y) == 2000
    assert 900 < (data.y == 0).sum() < 1100
    assert (np.diff(data.x[:, 0]) > 0).all()
    assert data.notes == ("2000 of 6000 complete rows kept, drawn with seed 0",)
    assert (load_dataset(path, "y").x == data.x).all()
    with pytest.raises(DatasetError, match="2 values of 'y', got 2 and 1 in 2000 complete rows"):
        load_dataset(path, "y", "paper")


def test_encodings_and_gzip(tmp_path):
    text = (tmp_path / "t.csv", table(tmp_path / "t.csv"))[0].read_text()
    for name, raw in {
        "bom.csv": codecs.BOM_UTF8 + text.encode(),
        "utf16.csv": text.encode("utf-16"),
        "z.csv.gz": gzip.compress(text.encode()),
        "crlf.CSV": text.replace("\n", "\r\n").encode(),
        "blank.csv": b"\n\n" + text.encode() + b"\n\n",
        "spaces.csv": text.replace(",", " , ").encode(),
    }.items():
        (tmp_path / name).write_bytes(raw)
        assert plain(load_dataset(str(tmp_path / name), "y")), name


def test_quoted_fields_hold_separators_line_ends_and_quotes(tmp_path):
    rows = [(f'"x, ""{i % 3}""\nz"', b, y) for i, (_, b, y) in enumerate(ROWS)]
    data = load_dataset(table(tmp_path / "t.csv", rows), "y")
    assert data.x[:, 0].tolist() == [i % 3 for i in range(60)]
    with pytest.raises(DatasetError, match="ends with its quotation mark"):
        load_dataset(table(tmp_path / "t.csv", [*ROWS, ('"open', 1, "p")]), "y")


def test_infinite_numbers_identifiers_and_double_names_are_said(tmp_path):
    rows = [("inf" if i == 3 else a, b, i, y) for i, (a, b, y) in enumerate(ROWS)]
    data = load_dataset(table(tmp_path / "t.csv", rows, "a,a,id,y"), "y")
    assert data.feature_names == ("a", "a.1")
    assert data.notes == (
        "several columns are named 'a'",
        "1 of 60 rows dropped: 1 with an infinite number",
        "identifier 'id' left out",
    )


def test_what_is_no_table_is_refused_in_one_line(tmp_path):
    (tmp_path / "binary.csv").write_bytes(bytes(range(256)))
    for path, words in {
        table(tmp_path / "no_rows.csv", []): "expected rows behind the header line, got no rows",
        table(tmp_path / "twice.csv", ROWS, "y,b,y"): "expected one column 'y', got 2",
        table(tmp_path / "none.csv", [(1, 2, "")] * 9): "expected values in the target's column 'y'",
        table(tmp_path / "gaps.csv", [("", 2, "p"), (1, "", "q")]): "2 of 2 rows dropped",
        table(tmp_path / "only.csv", [(y,) for _, _, y in ROWS], "y"): "at least 1 feature",
        str(tmp_path / "binary.csv"): "binary data",
        str(tmp_path): "Is a directory",
    }.items():
        with pytest.raises((DatasetError, ValueError), match=words) as caught:
            load_dataset(path if path.endswith(".csv") else path + "/.", "y")
        assert "\n" not in str(caught.value)


def test_the_digest_tells_tables_apart(tmp_path):
    data = load_dataset(table(tmp_path / "t.csv"), "y")
    assert data.digest == load_dataset(table(tmp_path / "other name.csv"), "y").digest
    rows = [(a + 1e-9 * (i == 3), b, y) for i, (a, b, y) in enumerate(ROWS)]
    assert data.digest != load_dataset(table(tmp_path / "t.csv", rows), "y").digest
    rows = [(a, b, y.replace("p", "r")) for a, b, y in ROWS]
    assert data.digest != load_dataset(table(tmp_path / "t.csv", rows), "y").digest
