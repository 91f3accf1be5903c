"""What compiled kernels do, counted on an emulator: the tables benchmarks/results/traffic.md.

table          sectors of memory on small maps of many kinds
instructions   executed instructions at the shapes of shapes.py, with the floors of time they set
cuda, triton, peers   what is counted
"""
