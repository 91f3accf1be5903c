"""The CUDA sources compiled as host code."""
