"""Shows a notebook as a page: `<!-- notebook: FILE -->` becomes its cells and links to it.

The badge that opens it in Colab goes by `repo_url` of mkdocs.yml, where the sources are published.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
NOTEBOOKS = ROOT / "docs" / "notebooks"
COLAB = "https://colab.research.google.com"
_PLACE = re.compile(r"^<!-- notebook: ([\w./-]+) -->$", re.MULTILINE)


def on_files(files: Files, *, config: Any) -> Files:
    """MkDocs calls this with the files of the site: notebooks are there for download."""
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        place = f"notebooks/{path.name}"
        if files.get_file_from_path(place) is None:
            files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, *, config: Any, **_: Any) -> str:
    """MkDocs calls this with the text of each page."""
    return _PLACE.sub(lambda match: page(match[1], config.repo_url), markdown)


def page(name: str, repository: str | None) -> str:
    """Markdown of a notebook, its links below the title."""
    cells = json.loads((ROOT / name).read_text(encoding="utf-8"))["cells"]
    parts = [shown(cell["cell_type"], "".join(cell["source"])) for cell in cells]
    return "\n\n".join([parts[0], links(name, repository), *parts[1:]])


def shown(kind: str, text: str) -> str:
    return f"```python\n{text}\n```" if kind == "code" else text


def links(name: str, repository: str | None) -> str:
    """To Colab and to the file itself."""
    place = name.removeprefix("docs/")
    download = f"[the notebook]({place}){{ download }}"
    if repository and "//github.com/" in repository:
        path = repository.rstrip("/").partition("//github.com/")[2]
        url = f"{COLAB}/github/{path}/blob/main/{name}"
        return f"[**Open in Colab**]({url}){{ .md-button }} or download {download}."
    return (
        f"Download {download}, and open it in Jupyter or, by *File, Upload notebook*, in "
        f"[Colab]({COLAB}/#create=true)."
    )
