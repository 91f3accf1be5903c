"""What is wrong with data, said in one line per file."""

from __future__ import annotations

from collections.abc import Sequence

SHOWN_PROBLEMS = 20


class DataError(ValueError):
    """The data cannot be used as they are; the message says what to do."""


def raise_problems(title: str, problems: Sequence[str]) -> None:
    """Raise one DataError that lists all problems, one per line; nothing happens without any.

    Raises:
        DataError: there is a problem; at most 20 are shown, then how many are left.
    """
    if not problems:
        return
    lines = [title, *(f"  {problem}" for problem in problems[:SHOWN_PROBLEMS])]
    if len(problems) > SHOWN_PROBLEMS:
        lines.append(f"  ... and {len(problems) - SHOWN_PROBLEMS} more")
    raise DataError("\n".join(lines))


def listed(names: Sequence[str], most: int = 5) -> str:
    """Names for a message, the first few of many: "a, b and 3 more"."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
