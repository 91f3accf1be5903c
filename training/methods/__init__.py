"""Pre-training methods: each is a file here, and its name in FILES."""

from __future__ import annotations

import importlib
import inspect
from types import ModuleType

from .base import Corpus, Method, Outcome, Run, Views, first, second, side_by_side
from .ccrop import CCropConfig
from .contrast import ContrastConfig
from .densecl import DenseCLConfig
from .gcl import GCLConfig
from .pcl import PCLConfig
from .pirl import PIRLConfig
from .sal import SAL, SALConfig

# The name of a file is that of its method: for `--method`, and of its settings.
FILES = (
    "random",
    "rotation",
    "pirl",
    "simclr",
    "gcl",
    "pcl",
    "ccrop",
    "sal",
    "densecl",
)


def method_in(module: ModuleType) -> type[Method]:
    """The method that a file defines.

    Raises:
        TypeError: it defines none, or several, or one without a label.
    """
    found = [
        kind
        for kind in vars(module).values()
        if inspect.isclass(kind)
        and issubclass(kind, Method)
        and kind.__module__ == module.__name__
        and not inspect.isabstract(kind)
    ]
    if len(found) != 1:
        names = ", ".join(kind.__name__ for kind in found) or "none"
        raise TypeError(f"{module.__name__}: expected one subclass of Method, got {names}")
    if not hasattr(found[0], "label"):
        raise TypeError(f"{module.__name__}: expected {found[0].__name__}.label")
    return found[0]


METHODS: dict[str, type[Method]] = {
    name: method_in(importlib.import_module(f".{name}", __name__)) for name in FILES
}

__all__ = [
    "FILES",
    "METHODS",
    "SAL",
    "CCropConfig",
    "ContrastConfig",
    "Corpus",
    "DenseCLConfig",
    "GCLConfig",
    "Method",
    "Outcome",
    "PCLConfig",
    "PIRLConfig",
    "Run",
    "SALConfig",
    "Views",
    "first",
    "method_in",
    "second",
    "side_by_side",
]
