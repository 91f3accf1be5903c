"""Tables as text: what the one writer of CSV and Markdown promises."""

from __future__ import annotations

import pytest

from salkernels._shared.tabular import csv_of_records, csv_text, markdown_table, read_csv


def test_records_come_back_from_csv(tmp_path):
    """Also with commas, quotes and lines of their own; what a record lacks is empty."""
    records = [{"name": 'a, "b"', "note": "two\nlines"}, {"name": "ω"}]
    path = tmp_path / "table.csv"
    path.write_text(csv_of_records(["name", "note"], records), encoding="utf-8")
    assert read_csv(path) == [records[0], {"name": "ω", "note": ""}]
    assert csv_text([["name", "note"], ["x", 1]]) == "name,note\nx,1\n"


def test_a_field_without_a_column_is_an_error():
    with pytest.raises(ValueError, match="other"):
        csv_of_records(["name"], [{"name": "a", "other": 1}])


def test_markdown():
    rows = [["name", "ms"], ["a", "1"]]
    assert markdown_table(rows) == "| name | ms |\n| --- | --- |\n| a | 1 |"
    assert markdown_table(rows, "lr") == "| name | ms |\n| :-- | --: |\n| a | 1 |"


@pytest.mark.parametrize(("rows", "sides"), [([["a", "b"], ["1"]], ""), ([["a", "b"]], "l")])
def test_a_table_with_holes_is_an_error(rows, sides):
    with pytest.raises(ValueError, match="expected 2 cells in every row"):
        markdown_table(rows, sides)
