"""What proves the GPU code, mostly on a machine without a GPU; not part of the package.

host_cuda   the CUDA sources compiled as host code, one fiber for each thread of a block
ptxemu      an emulator that executes PTX, checks every memory access and counts
ptx         kernels compiled to PTX (nvcc, Triton) and run on that emulator
gpu         what scripts/gpu.sh runs on a machine that has a GPU
traffic     python -m tools.traffic: the counts of both backends and of peers, as tables
"""
