"""Numba kernels: the elementwise ops in plain Python, compiled for the CPU and for CUDA."""
