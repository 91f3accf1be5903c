"""Modules that are called as the function of their name.

`salkernels.training.pretrain` is a module, which Python sets as an attribute of the package when
something imports it, and by the same name the function that people want to call.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class CallableModule(ModuleType):
    """A module that stands for the function of its own name."""

    def __call__(self, *args: Any, **settings: Any) -> Any:
        function = getattr(self, self.__name__.rpartition(".")[2])
        return function(*args, **settings)


def make_callable(name: str) -> None:
    """Makes the module of that (dotted) name callable."""
    sys.modules[name].__class__ = CallableModule
