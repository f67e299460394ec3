"""Kernels of our own for CPUs, in C++: attention, norms, linear maps and MLPs in fp32, without a copy in memory."""
