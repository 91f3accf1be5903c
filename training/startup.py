"""Where modules come from: never from the folder that a command happens to be started in."""

from __future__ import annotations

import os
import site
import sys
import sysconfig


def without_current_folder(path: list[str]) -> list[str]:
    """The module path without the current folder, which `python -m` puts first.

    A data folder may hold a yaml.py of anyone. The folders of Python itself stay.
    """
    here = os.path.realpath(os.getcwd())
    own = {*site.getsitepackages(), site.getusersitepackages(), *sysconfig.get_paths().values()}
    if here in {os.path.realpath(folder) for folder in own}:
        return list(path)
    return [entry for entry in path if entry and os.path.realpath(entry) != here]


def leave_current_folder() -> None:
    """Takes the current folder out of the module path of this process."""
    sys.path[:] = without_current_folder(sys.path)
