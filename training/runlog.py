"""The run folder: what was run, with what, and how it went."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shlex
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

import salkernels
from salkernels._shared.files import write_atomically
from salkernels._shared.revision import commit

from .checkpoint import LAST, has_checkpoint
from .config import Precision, RunConfig
from .distributed import first, is_main, world
from .errors import RunError
from .identity import Identity, read_identity, require_same, write_identity
from .methods import FILES, METHODS
from .models.weights import ENCODER, MODEL
from .settings import damaged, read_record, read_settings

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
WARNINGS = "warnings.txt"
ENVIRONMENT = "environment.json"
PACKAGES = ("torch", "triton", "numpy", "nibabel", "monai", "safetensors")
# Settings that may differ between a run and its continuation: they do not change the result, but
# for the last bits where `threads` or `compile` differs. Whom data and splits give is compared by
# the identity, and how many processes times accumulated batches make a step apart.
FREE = {
    "resume", "out", "cache", "data", "splits", "threads", "workers", "log_every",
    "checkpoint_every", "compile", "loader_warning", "allow_mismatch", "optim.accumulate",
    "cache_on",
}  # fmt: skip


class RunLog:
    """Opens a run folder for a new run or for its continuation, and appends metrics to it.

    Of many processes only the first does; the others wait until the folder is open.
    """

    def __init__(
        self, config: RunConfig, kind: str, chosen: Mapping[str, str], identity: Identity
    ) -> None:
        """kind: the subcommand. chosen: device and precision, where they were auto.

        Whoever calls holds the folder (`locks.sole_use`).
        """
        self.out = config.out
        self.kind, self.identity, self._allow = kind, identity, config.allow_mismatch
        self.fresh = True  # nothing was trained here before
        self._metrics = self.out / METRICS
        self._writer: SummaryWriter | None = None
        first(lambda: self._open(config, kind, chosen))

    def _open(self, config: RunConfig, kind: str, chosen: Mapping[str, str]) -> None:
        settings = to_plain(config)
        self.fresh = not holds_run(self.out)
        if not self.fresh and not config.resume:
            raise RunError(
                f"{self.out} already holds a run; pass --resume to go on with it, or another "
                f"--out to start a new one"
            )
        if self.fresh:
            # A start that failed before its first step may have left these.
            shutil.rmtree(self.out / LAST.parent, ignore_errors=True)
            (self.out / WARNINGS).unlink(missing_ok=True)
            write_atomically(self.out / CONFIG, yaml.safe_dump(settings, sort_keys=False))
        else:
            require_same_settings(self.out, config)
            self.require_same(read_identity(self.out))
        write_identity(self.out, self.identity)
        about = {"kind": kind, **chosen, **_batches(config), **environment()}
        write_atomically(self.out / ENVIRONMENT, json.dumps(about, indent=2) + "\n")

    def require_same(self, before: Identity | None) -> None:
        """Raises a RunError that names how an earlier part of the run had other data, split or
        encoder; where that is allowed, marks the run."""
        known = before.mismatches if before else ()
        found = require_same(
            before,
            self.identity,
            self.out,
            labels=self.kind != "pretrain",
            allow=self._allow,
        )
        marks = dict.fromkeys((*known, *self.identity.mismatches, *found))
        self.identity = replace(self.identity, mismatches=tuple(marks))

    def start_at(self, step: int) -> None:
        """Drops metrics of steps that will be run again, and opens the event file."""
        if not is_main():
            return
        if self._metrics.exists():
            kept = [row for row in read_metrics(self.out) if row["step"] <= step]
            write_atomically(self._metrics, "".join(json.dumps(row) + "\n" for row in kept))
        from torch.utils.tensorboard import SummaryWriter  # which takes a second, when it is used

        self._writer = SummaryWriter(str(self.out / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Appends one line to metrics.jsonl and to the TensorBoard events."""
        if not is_main():
            return
        try:
            with self._metrics.open("a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
            if self._writer is not None:
                for name, value in values.items():
                    self._writer.add_scalar(name, value, step)
        except OSError as error:
            raise RunError(
                f"{self._metrics} or the events beside it cannot be written: {error}; the last "
                f"checkpoint is intact: make room and pass --resume"
            ) from error

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def holds_run(out: Path) -> bool:
    """Whether anything was trained or scored there that could be lost."""
    products = (ENCODER, MODEL, "results.json")
    return (
        has_checkpoint(out)
        or any((out / name).exists() for name in products)
        or ((out / METRICS).is_file() and (out / METRICS).stat().st_size > 0)
    )


def require_free(out: Path, overwrite: bool) -> None:
    """Refuses to write scores where others lie.

    Raises:
        RunError: the folder is that of a run, or has scores that are not to be replaced.
    """
    if holds_run(out) and ((out / CONFIG).exists() or has_checkpoint(out)):
        raise RunError(f"{out} is the folder of a run, whose results would be lost; choose another")
    if (out / "results.json").exists() and not overwrite:
        raise RunError(f"{out} holds scores already; choose another --out, or pass --overwrite")


def precision_before(out: Path) -> Precision:
    """The precision in which a run was begun; "auto" where there is none."""
    before: Precision = _environment_before(out).get("precision", "auto")
    return before


def _environment_before(out: Path) -> dict[str, Any]:
    path = out / ENVIRONMENT
    return read_record(path) if holds_run(out) and path.exists() else {}


def read_metrics(out: Path) -> list[dict[str, float]]:
    """The rows of metrics.jsonl; a last line cut short by a kill is left out.

    Raises:
        RunError: another line is damaged; it is named.
    """
    path = out / METRICS
    if not path.is_file():
        return []
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise damaged(path, error) from error
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line) if line else None
            if row is not None and not isinstance(row["step"], int):
                raise TypeError(f"its step is {row['step']!r}")
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            if number == len(lines):
                break  # without its end of line
            raise damaged(path, f"line {number} is no row of metrics ({error!r})") from error
        if row is not None:
            rows.append(row)
    return rows


def to_plain(config: RunConfig) -> dict[str, Any]:
    """The configuration as JSON-like values."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(config), default=str))
    # Of plug-ins' methods that a run does not use it does not depend.
    method = plain.get("method")
    others = [name for name in METHODS if name not in FILES and name != method]
    return {name: value for name, value in plain.items() if name not in others}


def environment() -> dict[str, Any]:
    """Versions, machine, command and commit."""
    return {
        "command": shlex.join(sys.argv),
        "salkernels": salkernels.__version__,
        "commit": commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def require_same_settings(out: Path, config: RunConfig) -> None:
    """Raises a RunError that names what differs between a run's settings and these."""
    path = out / CONFIG
    if not path.is_file():
        raise RunError(
            f"{out} holds results but no {CONFIG}, so it is not known of which run; choose "
            f"another --out"
        )
    before = read_settings(path)
    now = to_plain(config)
    # A setting that came with a later version was at its default then.
    before = _filled(before, to_plain(type(config)()))
    changed = [
        f"{key}: {old!r} then, {new!r} now"
        for key, (old, new) in _differences(before, now).items()
        if key not in FREE
    ]
    if changed:
        raise RunError(
            f"the run in {out} was started with other settings and cannot go on with these: "
            + "; ".join(changed)
            + "; start a new one with another --out"
        )
    _require_same_batches(out, config)


def _filled(settings: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """The settings, with the defaults of those that are missing."""
    filled = {**defaults, **settings}
    for name, value in defaults.items():
        if isinstance(value, dict) and isinstance(settings.get(name), dict):
            filled[name] = _filled(settings[name], value)
    return filled


def _require_same_batches(out: Path, config: RunConfig) -> None:
    """Raises a RunError where a step would no longer take the batches that it took before."""
    about = _environment_before(out)
    before = {"processes": about.get("processes", 1), "batches": about.get("batches", 1)}
    now = _batches(config)
    if before["batches"] != now["batches"]:
        raise RunError(
            f"the run in {out} takes {before['batches']} batches per step, which "
            f"{now['processes']} processes times optim.accumulate {config.optim.accumulate} do not "
            f"give; start as many processes as before, or choose optim.accumulate accordingly"
        )
    if config.sync_batchnorm and before["processes"] != now["processes"]:
        raise RunError(
            f"the run in {out} has batch norms over {before['processes']} processes, got "
            f"{now['processes']}; start as many as before"
        )


def _batches(config: RunConfig) -> dict[str, int]:
    """Processes, and batches per step on all of them."""
    return {"processes": world(), "batches": world() * config.optim.accumulate}


def _differences(
    before: dict[str, Any], now: dict[str, Any], prefix: str = ""
) -> dict[str, tuple[Any, Any]]:
    found: dict[str, tuple[Any, Any]] = {}
    for key in {**before, **now}:
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found.update(_differences(old, new, f"{prefix}{key}."))
        elif old != new:
            found[prefix + key] = (old, new)
    return found
