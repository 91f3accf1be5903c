"""A run of an experiment, started as a file: `python -I child.py PLACES COMMAND ...`.

It runs the very package of its parent, whatever lies in the current folder: `-I` keeps that folder
and the environment's paths out, and PLACES (JSON) says where the parent found its modules. It ends
with its parent: where that is gone, standard input ends.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

PATIENCE = 300.0  # seconds for the step in progress and its checkpoint


def load(name: str, file: str) -> None:
    """Imports a package from this file and no other."""
    spec = importlib.util.spec_from_file_location(
        name, file, submodule_search_locations=[str(Path(file).parent)]
    )
    assert spec is not None  # a .py file has a loader
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    parent, _, last = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], last, module)


def end_with_parent() -> None:
    """Asks this process to end, as a batch system does, once its parent is gone."""
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(PATIENCE)
    os.kill(os.getpid(), signal.SIGTERM)  # the second one acts at once


def run() -> int:
    places = json.loads(sys.argv[1])
    sys.argv[:2] = ["salkernels-train"]
    sys.path[:] = places["path"]
    threading.Thread(target=end_with_parent, daemon=True).start()
    for name, file in places["packages"].items():
        load(name, file)
    from salkernels.training.cli import main

    return main()


if __name__ == "__main__":
    sys.exit(run())
