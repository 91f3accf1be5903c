"""Errors that end a run, apart from what is wrong with data (`data.errors`)."""

from __future__ import annotations


class RunError(RuntimeError):
    """A run that cannot start or go on, with what to do about it."""


class Stopped(Exception):
    """A signal ended the run after its state was saved; `code` is the shell's exit status."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code
