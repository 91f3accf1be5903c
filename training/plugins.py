"""Methods and data sets of one's own: files named by --plugin, and entry points of other packages.

A plug-in is code that runs in this process. It is therefore named on the command line or installed
by the user, and never by a file of settings.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import sys
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any

from . import methods
from .config import PretrainConfig, RunConfig
from .data.datasets import DATASETS, DatasetInfo
from .data.manifest import dataset_names
from .data.text import name_problem
from .errors import RunError
from .methods import METHODS, Method, method_in

GROUPS = ("salkernels.methods", "salkernels.datasets")  # of entry points
RECIPE = "see 'Plug-ins' in the documentation"


@dataclass(frozen=True)
class Plugin:
    """Where methods and data sets come from.

    Args:
        name: of the file, "spread.py", or of the installed package and its version.
        digest: sha256 of the source, in hexadecimal; of a package, of all its Python files.
        path: of the file; None for an installed package.
        methods: names of methods that it defines.
        datasets: names of data sets that it defines.
    """

    name: str
    digest: str
    path: Path | None
    methods: tuple[str, ...]
    datasets: tuple[str, ...]

    def __str__(self) -> str:
        kinds = (("method", self.methods), ("data set", self.datasets))
        return f"{self.name}: " + ", ".join(f"{kind} {n}" for kind, names in kinds for n in names)


LOADED: dict[str, Plugin] = {}  # by name


def load(path: str | Path) -> Plugin:
    """Runs a plug-in's file and registers the method and the data sets that it defines.

    The file is run as if it lay in `salkernels/training/methods`, so a file made by the recipe for
    a method works in either place. Its method is called as the file is. A file that was loaded
    before and has not changed is not run again.

    Raises:
        RunError: no such file, an error in it, nothing in it that can be registered, or a name that
            is taken.
    """
    path = Path(path).expanduser().absolute()
    content = _content(path)
    digest = hashlib.sha256(content).hexdigest()
    before = LOADED.get(path.name)
    if before is not None and before.path != path:
        raise RunError(f"{path}: {before.path} has the same name; rename one of them")
    if before is not None and before.digest == digest:
        return before
    if before is not None:  # it was edited since, as in a notebook
        _forget(before)
    if Path(methods.__file__).with_name(path.name).exists():  # it would hide sal.py, or base.py
        raise RunError(f"{path}: the package has a {path.name} of its own; rename the file")
    module = _run(path, content)
    try:
        LOADED[path.name] = _registered(module, path, digest)
    except RunError:
        sys.modules.pop(module.__name__)
        raise
    return LOADED[path.name]


def load_installed() -> None:
    """Registers what installed packages offer under the entry points of GROUPS.

    One that cannot be used is said on standard error and left out: it must not stand in the way of
    runs that do not need it.
    """
    for group in GROUPS:
        for entry in importlib.metadata.entry_points(group=group):
            try:
                _register(entry, method=group == GROUPS[0])
            except Exception as error:  # whatever the code of others raises
                reason = " ".join(str(error).split())[:200]
                print(
                    f"warning: the plug-in {entry.value} is left out: {type(error).__name__}: "
                    f"{reason}",
                    file=sys.stderr,
                )


def load_all(arguments: Sequence[str]) -> list[Path]:
    """Loads installed plug-ins and those named in a command's arguments, and returns the latter.

    Before the parser is made, which has their settings.

    Raises:
        RunError: as load.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--plugin", nargs="*", type=Path, default=[])
    named: list[Path] = finder.parse_known_args(list(arguments))[0].plugin
    load_installed()
    for path in named:
        load(path)
    return named


def add_option(parser: argparse.ArgumentParser) -> None:
    """Adds --plugin to a command's parser."""
    there = "; ".join(map(str, LOADED.values()))
    text = "Python files with methods or data sets of your own" + (there and f" ({there})")
    parser.add_argument("--plugin", type=Path, nargs="+", default=[], metavar="FILE", help=text)


def used_by(config: RunConfig) -> dict[str, str]:
    """The plug-ins that a run takes its method or its data set from: name -> digest."""
    names = {"method": getattr(config, "method", None), "dataset": config.dataset}
    return {
        plugin.name: plugin.digest
        for plugin in LOADED.values()
        if names["method"] in plugin.methods or names["dataset"] in plugin.datasets
    }


def files() -> list[str]:
    """The files that were loaded, for processes that are to load them too."""
    return [str(plugin.path) for plugin in LOADED.values() if plugin.path]


def methods_of(names: Iterable[str]) -> list[str]:
    """Those of the names that are methods of plug-ins."""
    own = {method for plugin in LOADED.values() for method in plugin.methods}
    return [name for name in names if name in own]


def _content(path: Path) -> bytes:
    if path.suffix != ".py" or not path.stem.isidentifier():
        raise RunError(
            f"{path}: expected a Python file, the name of which is that of the method, such as "
            f"spread.py; {RECIPE}"
        )
    try:
        return path.read_bytes()
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror}") from error


def _run(path: Path, content: bytes) -> ModuleType:
    """The module that the file's content makes, exactly the bytes that were hashed."""
    module = ModuleType(f"{methods.__name__}.{path.stem}")
    module.__file__, module.__package__ = str(path), methods.__name__
    sys.modules[module.__name__] = module  # dataclasses look their module up
    try:
        exec(compile(content, str(path), "exec"), vars(module))
    except (Exception, SystemExit) as error:
        sys.modules.pop(module.__name__)
        raise RunError(_where(path, error)) from error
    return module


def _where(path: Path, error: BaseException) -> str:
    """In one line, where in the plug-in's file an error arose and which."""
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == str(path)
    ]
    line = error.lineno if isinstance(error, SyntaxError) else (lines or [None])[-1]
    place = f", line {line}" if line else ""
    return f"{path}{place}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _registered(module: ModuleType, path: Path, digest: str) -> Plugin:
    """Puts what a module defines where the rest of the package looks for it."""
    own = (path.stem,) if _has_method(module) else ()
    found = _datasets_in(module, path)
    if not own and not found:
        raise RunError(
            f"{path}: expected one subclass of Method or an instance of DatasetInfo, got neither; "
            f"{RECIPE}"
        )
    for name in own:
        _require_free(name, str(path), method=True)
    for name in found:
        _require_free(name, str(path), method=False)
    METHODS.update({name: _method_of(module, path) for name in own})
    DATASETS.update(found)
    return Plugin(path.name, digest, path, own, tuple(found))


def _forget(plugin: Plugin) -> None:
    del LOADED[plugin.name]
    for name in plugin.methods:
        sys.modules.pop(METHODS.pop(name).__module__, None)
    for name in plugin.datasets:
        del DATASETS[name]


def _has_method(module: ModuleType) -> bool:
    return any(
        isinstance(kind, type) and issubclass(kind, Method) and kind.__module__ == module.__name__
        for kind in vars(module).values()
    )


def _method_of(module: ModuleType, path: Path) -> type[Method]:
    try:
        return method_in(module)
    except TypeError as error:
        raise RunError(f"{path}: {error}") from error


def _datasets_in(module: ModuleType, path: Path) -> dict[str, DatasetInfo]:
    """The data sets that a module defines, by name; not those of the package that it imports."""
    found: dict[str, DatasetInfo] = {}
    known = [*DATASETS.values()]
    for value in vars(module).values():
        if not isinstance(value, DatasetInfo) or value in known:
            continue
        if found.setdefault(value.name, value) is not value:
            raise RunError(f"{path}: two data sets are called {value.name!r}; rename one of them")
    return found


def _require_free(name: str, where: str, *, method: bool) -> None:
    problem = name_problem(name)
    if method and not name.isidentifier():
        problem = f"the name of a method is a word that Python takes for a name, got {name!r}"
    taken = {*METHODS, *(f.name for f in fields(PretrainConfig))} if method else {*dataset_names()}
    if name in taken:
        problem = f"the name {name!r} is taken"
    if problem:
        raise RunError(f"{where}: {problem}; choose another name")


def _register(entry: importlib.metadata.EntryPoint, *, method: bool) -> None:
    """One entry point: the class of a method, or the DatasetInfo of a data set."""
    owner = f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.value
    known = LOADED.get(owner)
    names = (known.methods if method else known.datasets) if known else ()
    if entry.name in names:
        return
    value: Any = entry.load()
    if method and not (isinstance(value, type) and issubclass(value, Method)):
        raise TypeError(f"expected a subclass of Method, got {value!r}")
    if method and not hasattr(value, "label"):
        raise TypeError(f"expected {value.__name__}.label")
    if not method and not (isinstance(value, DatasetInfo) and value.name == entry.name):
        raise TypeError(f"expected a DatasetInfo called {entry.name!r}, got {value!r}")
    _require_free(entry.name, entry.value, method=method)
    if method:
        METHODS[entry.name] = value
    else:
        DATASETS[entry.name] = value
    LOADED[owner] = Plugin(
        owner,
        _package_digest(entry.module),
        None,
        (*(known.methods if known else ()), *([entry.name] if method else [])),
        (*(known.datasets if known else ()), *([] if method else [entry.name])),
    )


def _package_digest(module: str) -> str:
    """Of all Python files of the package that a module is in."""
    spec = importlib.util.find_spec(module.partition(".")[0])
    assert spec is not None  # it was just imported
    folders: Sequence[str] = list(spec.submodule_search_locations or ())
    paths = sorted(
        (path.relative_to(folder).as_posix(), path)
        for folder in folders
        for path in Path(folder).rglob("*.py")
    )
    if not folders:
        paths = [(module, Path(str(spec.origin)))]
    digest = hashlib.sha256()
    for name, path in paths:
        digest.update(f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()
