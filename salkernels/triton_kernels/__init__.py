"""The kernels in Triton, behind `salkernels.backends.triton`.

launch.py     from tensors to launches
plan.py       pair numbers and the order of nodes
match.py      forward: cosine similarities, row-max, arg-max, MAE
gradient.py   backward
geometry.py   which samples, pixels and pairs a program works on
config.py     tile sizes by device and shape
tune.py       times tiles on a machine with a GPU
"""
