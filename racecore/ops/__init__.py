"""The mathematics, one folder per operation, its implementations side by side.

Every folder has `reference.py`, plain NumPy that reads like the formulas, and `cpu.py`, Numba kernels with the same
function names and arguments. The rooms that the kernels share: `blocks` (rows in and out of any layout and dtype),
`products` (the three small matrix products), `elementary` (exp and tanh), `cpu_call` (arguments and launches).
"""
