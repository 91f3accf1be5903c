"""Kernels compiled to PTX without a GPU, and run on `tools.ptxemu`."""
