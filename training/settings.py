"""Reading settings and records that anyone may have written or damaged, in bounded time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from .errors import RunError

MAX_CHARACTERS = 2**20  # settings are a few kB
MAX_NESTING = 50
CLASSES = ("class_path", "init_args")  # how jsonargparse names a class to make


def check_yaml(text: str) -> None:
    """Refuses YAML that is small to write and large to read: aliases, deep nesting, length; and
    names of classes, which a parser might import.

    Raises:
        yaml.YAMLError: such YAML, or none at all.
    """
    if len(text) > MAX_CHARACTERS:
        raise yaml.YAMLError(f"expected at most {MAX_CHARACTERS:,} characters, got {len(text):,}")
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            line = event.start_mark.line + 1 if event.start_mark else 0
            raise yaml.YAMLError(f"line {line}: aliases (*{event.anchor}) are not taken; write out")
        if isinstance(event, yaml.ScalarEvent) and event.value in CLASSES:
            raise yaml.YAMLError(f"{event.value}: settings name no class")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_NESTING:
            raise yaml.YAMLError(f"expected at most {MAX_NESTING} levels of nesting")


def require_settings_file(path: Path) -> None:
    """Refuses what cannot be read to its end: a pipe, a device, a huge file.

    Raises:
        RunError: such a file; one that does not exist is left to the parser.
    """
    try:
        if path.exists() and not path.is_file():
            raise RunError(f"{path}: expected a file of settings, which this is not")
        if path.exists() and path.stat().st_size > 4 * MAX_CHARACTERS:
            raise RunError(f"{path}: expected a file of settings, got {path.stat().st_size:,} byte")
    except (OSError, ValueError) as error:  # no permission, a NUL in the name
        raise RunError(f"{path}: cannot be read: {error}") from error


def read_settings(path: Path) -> dict[str, Any]:
    """The settings of a YAML file.

    Raises:
        RunError: in one line with the path, where it cannot be read.
    """
    require_settings_file(path)
    try:
        text = path.read_text(encoding="utf-8")
        check_yaml(text)
        found = yaml.safe_load(text)
        if not isinstance(found, dict):
            raise ValueError(f"expected settings by name, got {str(found)[:60]!r}")
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise damaged(path, error) from error
    return found


def read_record(path: Path) -> dict[str, Any]:
    """The entries of a JSON file; as read_settings."""
    require_settings_file(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"expected entries by name, got {str(found)[:60]!r}")
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, error) from error
    return found


def damaged(path: Path, error: object) -> RunError:
    """What to say of a file that cannot be read."""
    reason = " ".join(str(error).split())[:300]
    return RunError(f"{path} is damaged: {reason}; restore it, or use another folder")
