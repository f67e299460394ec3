"""C++ kernels for CPUs behind a few functions that the layers call."""
