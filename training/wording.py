"""What a parser says of a mistake, in one line that says what was meant."""

from __future__ import annotations

import difflib
import re
from argparse import Action
from collections.abc import Iterable, Sequence

# What other packages call our settings: spelling does not lead from one to the other.
CALLED = {
    "learning_rate": "optim.lr", "iterations": "optim.steps",
    "output": "out", "checkpoint": "encoder", "pretrained": "encoder", "lambda": "sal.lambda_",
    "weights": "encoder", "gpu": "device", "amp": "precision", "num_workers": "workers",
}  # fmt: skip
MOST_WORDS = 300  # characters of a message

_KEY = re.compile(r'Parser key "([\w.]+)":\s*(?:Expected an? )?(.*)', re.DOTALL)
_LITERAL = re.compile(r"Literal\[(.*?)\]")
_GOT = re.compile(r"Got value: (.*)")
_CHOICE = re.compile(r"argument (\w+): invalid choice: '?(.*?)'? \(choose from (.*)\)", re.DOTALL)
_REQUIRED = re.compile(r"the following arguments are required: (.*)")
_UNKNOWN = re.compile(r"unrecognized arguments: (.*)", re.DOTALL)
_FLAG = re.compile(r"--[\w.-]+")
_NAMED = re.compile(r"(?:[Kk]eys?|option) ['\"]([\w.]+)['\"]")
_TYPES = {"int": "a whole number", "float": "a number", "bool": "true or false", "Path": "a path"}


def in_one_line(message: str, actions: Iterable[Action]) -> str:
    """The message of a parser with these actions, with what may have been meant."""
    actions = list(actions)
    flags = [flag for action in actions for flag in action.option_strings if flag[:2] == "--"]
    for reworded in (_choice(message), _value(message), _required(message, actions)):
        if reworded:
            return reworded
    text = _unknown(message) or message
    text = " ".join(text.split())[:MOST_WORDS]
    meant = _flags_meant(message, flags)
    return text + (f"; did you mean {' or '.join(meant)}?" if meant else "")


def closest(word: str, known: Iterable[str], most: int = 1) -> list[str]:
    """Which of the known words may have been meant."""
    return difflib.get_close_matches(word, list(known), n=most, cutoff=0.6)


def _choice(message: str) -> str | None:
    """Of a word that is none of those to choose from."""
    if not (found := _CHOICE.search(message)):
        return None
    known = re.findall(r"[\w-]+", found[3])
    what = "experiment" if found[1] == "name" else found[1]
    if close := closest(found[2], known):
        return f"there is no {what} {found[2]!r}; did you mean {close[0]}?"
    return f"there is no {what} {found[2]!r}; expected one of {', '.join(known)}"


def _value(message: str) -> str | None:
    """Of a value that is not of the setting's type."""
    key, got = _KEY.search(message), _GOT.search(message)
    if not key or not got:
        return None
    value, expected = got[1].strip()[:80], key[2].partition(". Got value")[0]
    options = [w.strip("' \"") for group in _LITERAL.findall(expected) for w in group.split(",")]
    if options:
        close = closest(value, options)
        meant = f"; did you mean {close[0]}?" if close else ""
        return f"--{key[1]} must be one of {', '.join(options)}, got {value!r}{meant}"
    kinds = [text for name, text in _TYPES.items() if re.search(rf"\b{name}\b", expected)]
    if not kinds:
        return None
    return f"--{key[1]} must be {' or '.join(kinds)}, got {value!r}"


def _required(message: str, actions: Iterable[Action]) -> str | None:
    """Of what was not given."""
    if not (found := _REQUIRED.search(message)):
        return None
    flags = {action.dest: action.option_strings for action in actions}
    given = [word.strip() for word in found[1].split(",")]
    names = [name.rpartition(".")[2] for name in given]
    shown = [f"--{name}" if flags.get(name) else name.upper() for name in names]
    return f"{' and '.join(shown)} must be given"


def _unknown(message: str) -> str | None:
    """Of settings that there are not."""
    if not (found := _UNKNOWN.search(message)):
        return None
    words = [word.partition("=")[0] for word in found[1].split() if word.startswith("-")]
    if words:
        return f"there is no setting {', '.join(words)}"
    word = found[1].split()[0]
    return f"{word!r} is no setting; settings are given as --name value"


def _flags_meant(message: str, known: Sequence[str]) -> list[str]:
    """Options that are spelt like those in a message that does not know them."""
    bare = [f"--{word.partition('=')[0]}" for word in _words(message)]
    wrong = [*_FLAG.findall(message), *(f"--{key}" for key in _NAMED.findall(message)), *bare]
    for name in dict.fromkeys(wrong):
        tail = name.removeprefix("--")
        if name in known:
            if name in bare:
                return [name]
            continue
        last = tail.rpartition(".")[2]
        if (called := f"--{CALLED.get(last, '')}") in known:
            return [called]
        ends = [option for option in known if option.endswith(f".{tail}")]
        close = difflib.get_close_matches(name, known, n=2, cutoff=0.75)
        parts = {option.rpartition(".")[2]: option for option in known}
        if not ends and not close:
            similar = difflib.get_close_matches(last, parts, n=2, cutoff=0.7)
            close = [parts[part] for part in similar]
        if found := list(dict.fromkeys([*ends, *close]))[:3]:
            return [option if option.startswith("--") else f"--{option}" for option in found]
    return []


def _words(message: str) -> list[str]:
    """What was given without dashes where a setting was meant."""
    found = _UNKNOWN.search(message)
    return [word for word in found[1].split() if not word.startswith("-")][:1] if found else []
