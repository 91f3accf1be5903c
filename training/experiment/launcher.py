"""Hands the runs of an experiment to an engine that exists: Slurm, or processes, by submitit."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import yaml
from tqdm import tqdm

from salkernels._shared.files import write_atomically

from ..errors import RunError
from ..settings import read_record
from . import job
from .cells import Cell
from .command import command_of, environment_of, log_of

LauncherName = Literal["processes", "slurm", "local"]
DAY = 24 * 60  # minutes
# Of submitit: 2 minutes for local jobs, 5 for Slurm's, unless it is told.
TIMEOUT_MIN = {"local": 30 * DAY, "slurm": DAY}
REQUEUES = 100  # after a time limit; a run goes on from its checkpoint
UNKNOWN = "UNKNOWN"  # state of a job that Slurm does not know, or not yet
SETTLED = 300.0  # seconds after which Slurm knows a job that it took
SEEN = 60.0  # seconds until what a node wrote is seen here


class Running(Protocol):
    """A run in progress: a process, or a job that stands for one."""

    @property
    def returncode(self) -> int | None:
        """The exit status; None while it runs."""

    def poll(self) -> int | None:
        """Looks, and gives the exit status; None while it runs."""

    def send_signal(self, number: int, /) -> None:
        """Asks it to save and end."""

    def wait(self) -> int:
        """Waits for its end."""


class Launcher:
    """Jobs of submitit, one a run.

    Args:
        cluster: "slurm", or "local" for processes of this machine.
        out: folder of all runs; `jobs` in it has what submitit writes.
        settings: NAME=VALUE of submitit: timeout_min=600, slurm_partition=gpu, gpus_per_node=1, ...

    Raises:
        RunError: submitit is not installed, there is no such cluster, or a setting is none.
    """

    def __init__(self, cluster: str, out: Path, settings: Sequence[str] = ()) -> None:
        try:
            import cloudpickle
            import submitit
        except ImportError as error:
            raise RunError(
                f"--launcher {cluster} needs submitit: pip install -e '.[cluster]' in the clone"
            ) from error
        cloudpickle.register_pickle_by_value(job)
        self.cluster = cluster
        self.leaves_jobs = cluster == "slurm"  # they go on without this process
        self.interval = 5.0 if self.leaves_jobs else 0.2  # seconds between two looks
        chosen = {"timeout_min": TIMEOUT_MIN[cluster]} | _parsed(settings)
        if cluster == "local":  # which otherwise sees no GPU
            chosen.setdefault("gpus_per_node", torch.cuda.device_count())
        try:
            self.executor = submitit.AutoExecutor(
                folder=(out / "jobs").absolute(),
                cluster=cluster,
                **{f"{cluster}_max_num_timeout": REQUEUES},
            )
            self.executor.update_parameters(name="salkernels", **chosen)
        except (NameError, ValueError, TypeError, RuntimeError, AssertionError) as error:
            reason = " ".join(str(error).split())[:300]
            raise RunError(f"--launcher {cluster}: {reason}") from error

    def start(self, cell: Cell, out: Path) -> Running:
        """Submits the run, or finds its job of an experiment that ended before it did."""
        record = log_of(cell, out).with_suffix(".job.json")
        found = self._going_on(record)
        if found is None:
            command = command_of(cell, out)
            log = str(log_of(cell, out).absolute())
            with _safe_path():
                found = self.executor.submit(job.Job(command, log, environment_of(cell)))
            about = {"cluster": self.cluster, "job": found.job_id, "time": time.time()}
            write_atomically(record, json.dumps(about) + "\n")
        return Submitted(found, cell, record, self.leaves_jobs)

    def _going_on(self, record: Path) -> Any:
        """The job of a record, where it still waits or runs."""
        if not self.leaves_jobs or not record.exists():
            return None
        about = read_record(record)
        if about.get("cluster") != self.cluster:
            return None
        folder = (record.parents[1] / "jobs").absolute()
        found = self.executor._executor.job_class(folder=folder, job_id=str(about["job"]))
        state = found.watcher.get_state(found.job_id, mode="force")
        forgotten = state == UNKNOWN and time.time() - float(about["time"]) > SETTLED
        return None if forgotten or found.done() else found


class Submitted:
    """A job of submitit, as a process."""

    def __init__(self, found: Any, cell: Cell, record: Path, leave: bool) -> None:
        self.job, self.cell, self.record, self.leave = found, cell, record, leave
        self.returncode: int | None = None
        self.ended = self.preempted = 0.0

    def poll(self) -> int | None:
        if self.returncode is None and (self._preempted() or self.job.done()):
            status = self._status()
            self.ended = self.ended or time.monotonic()
            # What a node wrote may be seen here a while later.
            late = time.monotonic() - self.ended > SEEN
            if status or self.cell.path.exists() or late:
                self.returncode = status
                self.record.unlink(missing_ok=True)
        return self.returncode

    def _preempted(self) -> bool:
        """Whether Slurm took the node away and did not queue the job again by itself.

        submitit counts such a job as one that will go on.
        """
        if not self.leave or self.job.state.upper().partition(" ")[0] != "PREEMPTED":
            self.preempted = 0.0
            return False
        self.preempted = self.preempted or time.monotonic()
        return time.monotonic() - self.preempted > SETTLED

    def _status(self) -> int:
        """That of the run; -1 where the job was lost, preempted or cancelled."""
        if self.preempted:
            self.job.cancel(check=False)  # or it may come back beside the next one
            return -1
        try:
            return int(self.job.result())
        except Exception:  # submitit's own, and whatever the job raised
            return -1

    def send_signal(self, number: int, /) -> None:
        """Ends a job of this machine; one of a cluster goes on."""
        del number
        if not self.leave:
            self.job.cancel(check=False)

    def wait(self) -> int:
        while not self.leave and not self.job.done():
            time.sleep(0.2)
        return self.returncode or 0


def add_options(parser: Any) -> None:
    """The options of `experiment` that say who starts the runs."""
    parser.add_argument(
        "--launcher", type=LauncherName, default="processes",
        help="who starts the runs: this process, or submitit as jobs of Slurm or of this machine",
    )  # fmt: skip
    parser.add_argument(
        "--launch_with", type=str, nargs="+", default=[],
        help="settings of submitit: timeout_min=600 gpus_per_node=1 slurm_partition=gpu ...",
    )  # fmt: skip
    parser.add_argument(
        "--retries", type=int, default=2,
        help="of --launcher: how often a run that failed or was lost is started again",
    )  # fmt: skip


def launch_settings(namespace: Any) -> dict[str, Any]:
    """What these options say, as fields of ExperimentConfig."""
    by_itself = namespace.launcher == "processes"
    return {
        "launcher": namespace.launcher,
        "launch_with": tuple(namespace.launch_with),
        "retries": 0 if by_itself and namespace.retries > 0 else namespace.retries,
    }


def _parsed(settings: Sequence[str]) -> dict[str, Any]:
    """NAME=VALUE; numbers as numbers."""
    found: dict[str, Any] = {}
    for text in settings:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise RunError(
                f"--launch_with: expected NAME=VALUE, such as timeout_min=600, got {text!r}"
            )
        found[name] = yaml.safe_load(value) if value.replace(".", "", 1).isdigit() else value
    return found


@contextmanager
def _safe_path() -> Iterator[None]:
    """Jobs are started by `python -m`: they must not import from the current folder."""
    before: Mapping[str, str] = dict(os.environ)
    os.environ["PYTHONSAFEPATH"] = "1"  # from Python 3.11 on
    try:
        yield
    finally:
        if "PYTHONSAFEPATH" not in before:
            del os.environ["PYTHONSAFEPATH"]


def tell(text: str) -> None:
    """A line beside the progress bar."""
    tqdm.write(text, file=sys.stderr)
