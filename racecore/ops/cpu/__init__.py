"""What the CPU kernels of all operations share.

`row_conversions` and `row_io` load and store rows of the caller's arrays, `read_modes` decides
which are read in place; `call` makes arguments and launches; `scratch` has the arrays of a block,
`states` and `readout` the formulas on them.
"""
