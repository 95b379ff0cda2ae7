"""CuPy kernels: CUDA C++ compiled by CuPy, on torch's tensors and torch's current stream."""
