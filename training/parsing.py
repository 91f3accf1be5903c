"""A parser for settings of strangers: nothing is imported, and a mistake takes a few lines."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, get_loader, set_loader, set_parsing_settings

from .data.text import printable
from .settings import check_yaml, require_settings_file

MODE = "bounded yaml"
MOST_LINES = 6  # of a message
_OPTION = re.compile(r"--[\w.-]+")
_KEY = re.compile(r"(?:[Kk]eys?|option) ['\"]([\w.]+)['\"]")


class Parser(ArgumentParser):
    """An ArgumentParser whose errors name what is wrong and what may have been meant."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        # A `class_path` would be imported before anything is checked: no name is.
        set_parsing_settings(import_path_denylist=["*"])
        set_loader(MODE, _load, exceptions=(yaml.YAMLError,))
        super().__init__(*args, parser_mode=MODE, **settings)
        self.commands: dict[str, Parser] = {}
        self.words: Sequence[str] = ()  # the command line, for messages

    def parse_args(self, *args: Any, **settings: Any) -> Any:
        try:
            return super().parse_args(*args, **settings)
        except ImportError as error:  # which the parser does not explain where it is in a file
            self.error(f"a setting names a class, which is not taken: {error}")

    def add_command(self, name: str, parser: Parser, help: str) -> None:
        """A subcommand, whose options are known to messages."""
        self.commands[name] = parser
        self.add_subcommands_once().add_subcommand(name, parser, help=help)

    def add_subcommands_once(self) -> Any:
        if not hasattr(self, "_all_commands"):
            self._all_commands = self.add_subcommands(dest="command")
        return self._all_commands

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            super().error(message, ex)
        command = next((word for word in self.words if word in self.commands), "")
        parser = getattr(ex, "subcommand_parser", None) or self.commands.get(command, self)
        lines = [printable(line.strip()[:300]) for line in message.splitlines() if line.strip()][
            :MOST_LINES
        ]
        meant = _meant(message, parser)
        hint = f"; did you mean {' or '.join(meant)}?" if meant else ""
        name = parser.prog.replace(" [options]", "")
        print(f"{name}: error: " + "\n  ".join(lines) + hint, file=sys.stderr)
        print(f"all settings: {name} --help", file=sys.stderr)
        self.exit(2)
        raise AssertionError("exit returned")


def require_settings_files(arguments: Sequence[str]) -> None:
    """Refuses a --config that could not be read to its end."""
    for place, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == "--config":
            following = arguments[place + 1] if place + 1 < len(arguments) else ""
            require_settings_file(Path(value if equals else following))


def _load(text: str) -> Any:
    check_yaml(text)
    return get_loader("yaml")(text)


def _meant(message: str, parser: ArgumentParser) -> list[str]:
    """Options that are spelt like those in a message that does not know them."""
    known = [option for option in parser._option_string_actions if option.startswith("--")]
    wrong = [*_OPTION.findall(message), *(f"--{key}" for key in _KEY.findall(message))]
    for name in dict.fromkeys(wrong):
        if name in known:
            continue
        tail = name.removeprefix("--")
        ends = [option for option in known if option.endswith(f".{tail}")]
        close = difflib.get_close_matches(name, known, n=2, cutoff=0.75)
        parts = {option.rpartition(".")[2]: option for option in known}
        if not ends and not close:
            last = difflib.get_close_matches(tail.rpartition(".")[2], parts, n=2, cutoff=0.7)
            close = [parts[part] for part in last]
        if found := list(dict.fromkeys([*ends, *close]))[:3]:
            return [option if option.startswith("--") else f"--{option}" for option in found]
    return []
