"""Launches and headers common to the CUDA kernels of all operations."""
