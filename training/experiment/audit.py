"""Whether runs that are done are of this experiment: its data, its split, its encoders."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from salkernels._shared.files import write_atomically

from ..config import LabelledConfig, PretrainConfig
from ..data.cache import VolumeCache
from ..errors import RunError
from ..finetune import identity as finetune_identity
from ..identity import OPTION, Identity, differences, read_identity
from ..models import load_encoder
from ..pretrain import identity as pretrain_identity
from ..settings import read_record
from .cells import Cell

OWN = "experiment.json"  # in the folder of all runs: who may overwrite a table


class Audit:
    """Compares runs that are done with what they would be made of now.

    caches: the data of each command, "pretrain" and that which scores. allow: mark what does not
    fit, and go on.
    """

    def __init__(self, caches: Mapping[str, VolumeCache], allow: bool) -> None:
        self.caches, self.allow = caches, allow
        self._encoders: dict[tuple[str, int, int], dict[str, Any]] = {}

    def __call__(self, cell: Cell) -> list[str]:
        """What does not fit, where that is allowed.

        Raises:
            RunError: something does not fit and is not allowed; subjects are named.
        """
        before = read_identity(cell.config.out)
        try:
            found = differences(before, self._now(cell), labels=cell.scored)
        except FileNotFoundError:
            found = [f"its encoder, {cell.needs}, is no longer there"]
        if found and not self.allow:
            raise RunError(
                f"{cell.config.out} was made of something else than this experiment: "
                f"{'; '.join(found)}. Choose another --out or delete that folder to have it made "
                f"again; or go on all the same with {OPTION}, which marks the table"
            )
        return [f"{cell.name}: {text}" for text in found]

    def _now(self, cell: Cell) -> Identity:
        cache = self.caches[cell.command]
        if isinstance(cell.config, PretrainConfig):
            return pretrain_identity(cell.config, cache)
        assert isinstance(cell.config, LabelledConfig)
        return finetune_identity(cell.config, cache, self._about(cell.needs))

    def _about(self, encoder: Path | None) -> dict[str, Any] | None:
        if encoder is None:
            return None
        state = encoder.stat()
        key = str(encoder), state.st_mtime_ns, state.st_ino
        if key not in self._encoders:
            self._encoders[key] = load_encoder(encoder)[1]
        return self._encoders[key]


def own_name(out: Path) -> str:
    """A name of this experiment's folder that no other has, wherever it is moved."""
    path = out / OWN
    if not path.exists():
        write_atomically(path, json.dumps({"id": uuid.uuid4().hex}) + "\n")
    return str(read_record(path).get("id"))


def require_own_table(document: Path, name: str) -> None:
    """Refuses to overwrite the table of another experiment.

    Raises:
        RunError: it was written from another folder of runs, or it is not known from which.
    """
    if document.exists() and read_record(document).get("id") != name:
        raise RunError(
            f"{document} is of another experiment, or of an earlier version; choose another "
            f"--results, or move that folder away"
        )
