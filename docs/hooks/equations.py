"""Turns the equations of a page into MathML while the site is built.

Browsers draw MathML by themselves: pages need no script, and nothing from another server.
"""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

# As pymdownx.arithmatex leaves them in its generic mode.
_EQUATION = re.compile(
    r'<(span|div) class="arithmatex">\\(?:\(|\[)(.*?)\\(?:\)|\])</\1>', re.DOTALL
)


def on_page_content(content: str, **_: Any) -> str:
    """MkDocs calls this with the HTML of each page."""

    def mathml(match: re.Match[str]) -> str:
        block = match[1] == "div"
        equation = convert(html.unescape(match[2]).strip(), display="block" if block else "inline")
        return f'<div class="equation">{equation}</div>' if block else equation

    return _EQUATION.sub(mathml, content)
