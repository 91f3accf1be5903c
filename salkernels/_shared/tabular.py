"""Tables as text: CSV for programs, Markdown for people."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

_SIDES = {"l": ":--", "r": "--:"}


def csv_text(rows: Iterable[Sequence[object]]) -> str:
    """Rows, the first of which is the header, as CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def csv_of_records(columns: Sequence[str], records: Iterable[Mapping[str, object]]) -> str:
    """Records as CSV with these columns; a field that a record lacks is empty.

    Raises:
        ValueError: a record has a field that is not among the columns.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def read_csv(path: Path) -> list[dict[str, str]]:
    """The records of a CSV file, by the names in its header."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def markdown_table(rows: Sequence[Sequence[str]], sides: str = "") -> str:
    """Rows, the first of which is the header, as a Markdown table without a final newline.

    sides: a letter for each column, "l" or "r" for text at its left or right; "" leaves that to the
        reader's program.

    Raises:
        ValueError: `sides` or a row does not have one entry per column.
    """
    width = len(rows[0])
    if any(len(row) != width for row in rows) or len(sides) not in (0, width):
        raise ValueError(
            f"expected {width} cells in every row, as in the header, and as many sides or none, "
            f"got rows of {sorted({len(row) for row in rows})} and sides {sides!r}"
        )
    rule = [_SIDES[side] for side in sides] or ["---"] * width
    return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], rule, *rows[1:]])
