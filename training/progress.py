"""How far a run is, on a terminal or in a log."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

from .data.saying import Rhythm
from .data.saying import say as say_anyway
from .distributed import is_main


def say(text: str) -> None:
    """One line on standard error about what is being done; of many processes the first says it."""
    if is_main():
        say_anyway(text)


class Progress:
    """How far a run is, with loss, rate and ETA: a bar on a terminal, now and then a line in a log.

    Of many processes only the first shows it.
    """

    def __init__(self, name: str, step: int, steps: int) -> None:
        self.name, self.step, self.steps = name, step, steps
        self.first, self.began = step, time.monotonic()
        self.rhythm = Rhythm()
        self.bar = tqdm(
            total=steps, initial=step, desc=name, unit="step", mininterval=1.0,
            disable=None if is_main() else True, file=sys.stderr,
        )  # fmt: skip

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def update(self, terms: dict[str, float]) -> None:
        self.step += 1
        shown = {name: f"{value:.3g}" for name, value in terms.items()}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()
        last = self.step == self.steps
        if is_main() and self.bar.disable and (self.rhythm.due() or last):
            rate = (self.step - self.first) / max(time.monotonic() - self.began, 1e-9)
            left = tqdm.format_interval((self.steps - self.step) / rate)
            values = "".join(f"{name} {value}, " for name, value in shown.items())
            print(
                f"{self.name}: step {self.step} of {self.steps}, {values}{rate:.2f} step/s, "
                f"ETA {left}",
                file=sys.stderr,
                flush=True,
            )
