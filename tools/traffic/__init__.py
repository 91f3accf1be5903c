"""Counts of what compiled kernels do: `python -m tools.traffic`; see table.py."""
