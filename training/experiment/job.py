"""A run as a job of a cluster: what submitit carries to the node and calls there.

Only modules of Python itself are imported at the top: the class travels by value, and the node
starts the very package that the experiment runs, by `child.py`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import Any

POLL = 0.5  # seconds


class Job:
    """Runs a command, its output appended to a log; called once more, the run goes on.

    command: of the run. log: path. environment: variables that are set for it.
    """

    def __init__(self, command: Sequence[str], log: str, environment: Mapping[str, str]) -> None:
        self.command, self.log = list(command), log
        self.environment = dict(environment)
        self.pid = 0

    def __call__(self) -> int:
        """The exit status of the command."""
        # Slurm warns all processes of a job by the signal that is for submitit: the run would not
        # outlive it.
        before = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        with open(self.log, "ab") as file:
            process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,  # it ends with this process
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.environment},
                start_new_session=True,
            )
        signal.signal(signal.SIGUSR2, before)
        self.pid = process.pid
        try:
            # No wait(): a signal's handler could not wait for the same process.
            while process.poll() is None:
                time.sleep(POLL)
        finally:
            if process.poll() is None:  # the job was cancelled: the run saves and ends by itself
                process.terminate()
        return process.returncode

    def checkpoint(self) -> Any:
        """Called on the warning before preemption or the time limit: save, and be queued again."""
        from submitit.helpers import DelayedSubmission

        if self.pid:
            try:
                os.kill(self.pid, signal.SIGTERM)
                os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
            except (ProcessLookupError, ChildProcessError):  # it has just ended
                pass
        return DelayedSubmission(type(self)(self.command, self.log, self.environment))
