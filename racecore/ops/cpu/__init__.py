"""What the CPU kernels of all operations share: the call, rows in and out, states, scratch,
readouts.
"""
