"""Kernels of our own for CPUs, in C++: attention, norms and GELU's gradient in fp32 without a copy in memory."""
