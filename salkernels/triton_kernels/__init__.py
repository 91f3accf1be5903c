"""The kernels in Triton, behind `salkernels.backends.triton`.

launch.py     from tensors to launches; what is worked out once for each signature of a call
lists.py      the same for the backward of windows of more rows than two tiles hold
launcher.py   launches: what is compiled is kept
layout.py     how a call is cut into tiles
plan.py       pair numbers, the order of nodes, the partners of each
match.py      forward: cosine similarities, row-max, arg-max, MAE
gradient.py   backward, where two tiles at most hold a window of a group
terms.py      backward beyond them: the terms of each row as a list
sum.py        and their sum
geometry.py   which samples, pixels and pairs a program works on
config.py     tile sizes by device and shape
tune.py       times tiles on a machine with a GPU
offline.py    compiles kernels in other processes, without a GPU
"""
