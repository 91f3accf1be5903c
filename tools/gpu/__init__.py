"""Everything that a GPU has to say about this package, in minutes: right, fast, and how.

`scripts/gpu.sh` runs it; `python -m tools.gpu --help` from the repository's root, without the
pack. Each step is a process of its own with a time limit, and what one of them does, crash or hang,
stops no other. Results are lines of JSON that are written as they come.
"""
