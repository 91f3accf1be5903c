"""Command line: `python training/run.py COMMAND`, or `python -m salkernels.training.run`."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    if not __package__ and not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):
        # Started as a file, Python puts this folder first on the path, where our `data` or `config`
        # would hide other packages of these names.
        sys.path.pop(0)
    from salkernels.training.startup import leave_current_folder

    leave_current_folder()

from salkernels.training.cli import main

if __name__ == "__main__":
    sys.exit(main())
