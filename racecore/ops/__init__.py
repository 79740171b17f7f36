"""The mathematics: one folder per operation, and what their kernels share.

    soft_hash/      rows to probabilities of buckets
    bidirectional/  every query sees every key
    causal/         every query sees the keys up to its own: a scan over tokens
    decoding/       one token per sequence of a batch
    socket/         sparse decoding: score keys, select, attend exactly

Each has `reference.py`, plain NumPy that reads like the formulas, with `cpu.py` (Numba) and
`cuda.py` (CuPy), which have functions of the same names and arguments.

    reference_rows  what the references share: rows of tokens, weights of the readouts
    simd/           vectors, elementary functions, register tiles, products of a block: Numba, LLVM
    cpu/            what CPU kernels share: rows in and out, calls, states, scratch
    cuda/           what CUDA kernels share: launches and headers

Read `soft_hash/reference.py` and `bidirectional/reference.py` first, then `bidirectional/cpu.py`;
`cpu/call.py` and `cpu/scratch.py` explain its arguments, `simd/products.py` its products. `causal/`
follows: `cpu.py`, then `segment.py`. `simd/tiles.py` and `causal/scan_tiles.py` come last.
"""
