"""The kernels in Triton. `salkernels.backends.triton` launches them; nothing else imports them.

geometry.py   which samples, pixels and pairs a program works on
match.py      forward: cosine similarities, row-max, arg-max, MAE
gradient.py   backward
config.py     tile sizes by device and shape
"""
