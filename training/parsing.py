"""A parser for settings of strangers: nothing is imported, and a mistake takes a few lines."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, get_loader, set_loader, set_parsing_settings

from .data.text import printable
from .settings import check_yaml, require_settings_file
from .wording import in_one_line

MODE = "bounded yaml"
HELP_ALL = "--help-all"


class Parser(ArgumentParser):
    """An ArgumentParser whose errors name what is wrong and what may have been meant."""

    def __init__(
        self, *args: Any, first: Sequence[str] = (), needed: str = "", **settings: Any
    ) -> None:
        """first: the settings that matter most, as `--name VALUE`. needed: those that must be
        given, for the line on usage."""
        # A `class_path` would be imported before anything is checked: no name is.
        set_parsing_settings(import_path_denylist=["*"])
        set_loader(MODE, _load, exceptions=(yaml.YAMLError,))
        super().__init__(*args, parser_mode=MODE, allow_abbrev=False, **settings)
        self.commands: dict[str, Parser] = {}
        self.words: Sequence[str] = ()  # what is to be parsed, for messages
        self.first, self.needed, self.whole = tuple(first), needed, False

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
        name = parser.prog.replace(" [options]", "")
        said = printable(in_one_line(message, parser._actions))
        more = HELP_ALL if getattr(parser, "first", ()) else "--help"
        print(f"{name}: error: {said} ({name} {more} lists all)", file=sys.stderr)
        self.exit(2)
        raise AssertionError("exit returned")

    def format_help(self, *args: Any, **settings: Any) -> str:
        """For a parser with settings that matter most: these, and how to see the others."""
        if not self.first or self.whole:
            return super().format_help(*args, **settings)
        name = self.prog.replace(" [options]", "")
        actions = {option: a for a in self._actions for option in a.option_strings or (a.dest,)}
        rows = [(option, actions[option.partition(" ")[0]]) for option in self.first]
        width = max(len(option) for option in self.first) + 2
        lines = [f"usage: {name} {self.needed} [--SETTING VALUE ...]"]
        lines += ["", self.description or "", ""]
        lines += ["what matters first:"]
        for option, action in rows:
            default = "" if action.default in (None, "", []) else f" (default: {action.default})"
            filled = textwrap.wrap(f"{action.help or ''}{default}", 96 - width)
            lines += [f"  {option:{width}}{filled[0] if filled else ''}"]
            lines += [" " * (width + 2) + line for line in filled[1:]]
        others = sum(bool(a.option_strings) for a in self._actions) - len(rows)
        lines += ["", f"{name} {HELP_ALL} lists {others} more settings", ""]
        return "\n".join(lines)

    def ask_for_help(self, arguments: Sequence[str]) -> bool:
        """Prints all settings of a command where that is asked for."""
        if HELP_ALL not in arguments:
            return False
        parser = self.commands.get(arguments[0], self)
        parser.whole = True
        parser.print_help()
        return True


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
