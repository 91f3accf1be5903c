"""Shows `.. math::` of the docstrings as an equation: an extension of griffe, which reads them."""

from __future__ import annotations

import re
from typing import Any

import griffe

_MATH = re.compile(r"^\.\. math:: ?(.*?)(?=\n\s*\n|\Z)", re.DOTALL | re.MULTILINE)


class Equations(griffe.Extension):
    """Replaces the directive, up to the next empty line, by what arithmatex understands."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            text = obj.docstring.value
            obj.docstring.value = _MATH.sub(lambda math: f"$$\n{math[1].strip()}\n$$", text)
