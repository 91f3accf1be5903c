"""How a run of an experiment is started: its command, its settings and its log."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import yaml

import salkernels
import salkernels.training
from salkernels._shared.files import write_atomically

from ..plugins import files
from ..runlog import to_plain
from ..startup import without_current_folder
from .cells import Cell

CHILD = Path(__file__).with_name("child.py")  # a program of its own, not a module of this one


def command_of(cell: Cell, out: Path) -> list[str]:
    """The command of the run, whose settings are written beside its log."""
    settings = log_of(cell, out).with_suffix(".yaml")
    write_atomically(settings, yaml.safe_dump(to_plain(cell.config), sort_keys=False))
    places = {
        "path": without_current_folder(sys.path),
        "packages": {p.__name__: str(p.__file__) for p in (salkernels, salkernels.training)},
    }
    own = ["--plugin", *files()] if files() else []
    start = [sys.executable, "-I", str(CHILD), json.dumps(places), cell.command]
    return [*start, "--config", str(settings), *own]


def environment_of(cell: Cell) -> dict[str, str]:
    """Variables that are set for the run."""
    threads = cell.config.threads
    return {"OMP_NUM_THREADS": str(threads)} if threads else {}


def log_of(cell: Cell, out: Path) -> Path:
    return out / "logs" / f"{cell.config.out.relative_to(out).as_posix().replace('/', '_')}.log"
