"""Benchmarks of the alignment loss: every provider side by side, verified before it is timed.

python -m benchmarks                 all suites -> results/<label>.csv, tables and figures
python -m benchmarks overhead        what one small call costs, in microseconds
python -m benchmarks training        the loss's share of a pre-training step
pytest benchmarks --benchmark-only   the same providers under pytest-benchmark
"""
