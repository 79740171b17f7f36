"""The mathematics: one folder per operation, with `reference.py` (plain NumPy) and `cpu.py` (Numba,
same functions).

The modules right here are rooms that the kernels share. From the bottom up: `vectors` (the vector
as a value), `tiles` (register tiles of the small products), `products` and `walks` (products of a
block, running sums over its tokens), `elementary` (exp, tanh, sigmoids), `is_bfloat16` and `blocks`
(16-bit formats, rows in and out), `states` and `readout` (what the formulas call so), `memory`,
`scratch` and `cpu_call` (arrays of a block, arguments and launches).
"""
