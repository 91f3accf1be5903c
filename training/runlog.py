"""The run folder: what was run, with what, and how it went."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.utils.tensorboard import SummaryWriter

import salkernels

from .checkpoint import LAST, RunError
from .config import Precision, RunConfig
from .distributed import first, is_main, world
from .files import write_atomically

ENVIRONMENT = "environment.json"
PACKAGES = ("torch", "triton", "numpy", "nibabel", "monai", "safetensors")
# Settings that may differ between a run and its continuation: they do not change the result, but
# for the last bits where `threads` or `compile` differs. How many processes times accumulated
# batches make a step is compared apart.
FREE = {
    "resume", "out", "cache", "data", "threads", "workers", "log_every", "checkpoint_every",
    "compile", "optim.accumulate",
}  # fmt: skip


class RunLog:
    """Opens a run folder for a new run or for its continuation, and appends metrics to it.

    Of many processes only the first does; the others wait until the folder is open.
    """

    def __init__(self, config: RunConfig, kind: str, chosen: Mapping[str, str]) -> None:
        """kind: "pretrain" or "finetune". chosen: device and precision, where they were auto."""
        self.out = config.out
        self._metrics = self.out / "metrics.jsonl"
        self._writer: SummaryWriter | None = None
        first(lambda: self._open(config, kind, chosen))

    def _open(self, config: RunConfig, kind: str, chosen: Mapping[str, str]) -> None:
        settings = to_plain(config)
        description = self.out / "config.yaml"
        started = description.exists() or (self.out / LAST).exists()
        if started and not config.resume:
            raise RunError(
                f"{self.out} already holds a run; pass --resume to go on with it, or another "
                f"--out to start a new one"
            )
        if started:
            require_same_settings(self.out, config)
        else:
            write_atomically(description, yaml.safe_dump(settings, sort_keys=False))
        about = {"kind": kind, **chosen, **_batches(config), **environment()}
        write_atomically(self.out / ENVIRONMENT, json.dumps(about, indent=2) + "\n")

    def start_at(self, step: int) -> None:
        """Drops metrics of steps that will be run again, and opens the event file."""
        if not is_main():
            return
        if self._metrics.exists():
            kept = [row for row in read_metrics(self.out) if row["step"] <= step]
            write_atomically(self._metrics, "".join(json.dumps(row) + "\n" for row in kept))
        self._writer = SummaryWriter(str(self.out / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Appends one line to metrics.jsonl and to the TensorBoard events."""
        if not is_main():
            return
        with self._metrics.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def precision_before(out: Path) -> Precision:
    """The precision in which a run was begun; "auto" where there is none."""
    path = out / ENVIRONMENT
    about = json.loads(path.read_text()) if path.exists() else {}
    before: Precision = about.get("precision", "auto")
    return before


def read_metrics(out: Path) -> list[dict[str, float]]:
    """The rows of metrics.jsonl; a last line cut short by a kill is left out."""
    rows = []
    path = out / "metrics.jsonl"
    if not path.exists():
        return []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def to_plain(config: RunConfig) -> dict[str, Any]:
    """The configuration as JSON-like values."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(config), default=str))
    return plain


def environment() -> dict[str, Any]:
    """Versions, machine, command and commit."""
    return {
        "command": shlex.join(sys.argv),
        "salkernels": salkernels.__version__,
        "commit": _commit(),
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


def _commit() -> str | None:
    """Commit of the source tree that runs, '+' if it was changed; None for an installed wheel."""
    here = Path(__file__).parent
    try:
        head = _git(here, "rev-parse", "--short", "HEAD")
        return head + ("+" if _git(here, "status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(where: Path, *arguments: str) -> str:
    command = ["git", "-C", str(where), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=10
    ).stdout.strip()


def require_same_settings(out: Path, config: RunConfig) -> None:
    """Raises a RunError that names what differs between a run's settings and these."""
    before = yaml.safe_load((out / "config.yaml").read_text())
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
    path = out / ENVIRONMENT
    about = json.loads(path.read_text()) if path.exists() else {}
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
