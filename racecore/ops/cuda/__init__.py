"""What the CUDA kernels of all operations share: launches, and the headers that kernels include."""
