"""What is being done, on a terminal or in a log: nobody is left to wait in silence."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

from .text import printable

Item = TypeVar("Item")


def say(text: str) -> None:
    """One line on standard error, above a bar if there is one."""
    tqdm.write(printable(text), file=sys.stderr)


class Rhythm:
    """When the next line of a log is due: after 5 seconds at first, later every 30.

    A batch system's log would be filled by a bar that rewrites itself, and empty without any.
    """

    SOONEST, LATEST = 5.0, 30.0  # seconds

    def __init__(self) -> None:
        self.began = self.said = time.monotonic()

    def due(self) -> bool:
        """Whether it is time; if so, the next one is counted from now."""
        now = time.monotonic()
        wait = min(self.LATEST, max(self.SOONEST, (now - self.began) / 10))
        if now - self.said < wait:
            return False
        self.said = now
        return True


def counted(items: Sequence[Item], doing: str, unit: str, *, shown: bool = True) -> Iterator[Item]:
    """The items, with how many are done: a bar on a terminal, now and then a line in a log."""
    bar = tqdm(items, doing, unit=unit, disable=None if shown else True, mininterval=0.5)
    if not (shown and bar.disable):
        yield from bar
        return
    rhythm = Rhythm()
    total = f"{len(items)} {unit}{'s' * (len(items) != 1)}"
    for number, item in enumerate(items):
        if rhythm.due():
            say(f"{doing}: {number} of {total}")
        yield item
    say(f"{doing}: {total} in {tqdm.format_interval(time.monotonic() - rhythm.began)}")
