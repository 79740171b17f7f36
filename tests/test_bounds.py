"""Kernels touch nothing beyond their arrays: memory before and after every array is forbidden."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.process

PROGRAM = """
import ctypes, json, math, mmap, sys
import ml_dtypes
import numpy as np
import racecore

libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
PAGE, FAR = mmap.PAGESIZE, 16 * mmap.PAGESIZE
kept = []

def guarded(shape, dtype, at_end):
    dtype = np.dtype(dtype)
    n = math.prod(shape) * dtype.itemsize
    inner = -(-max(n, 1) // PAGE) * PAGE
    memory = mmap.mmap(-1, inner + 2 * FAR)
    kept.append(memory)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for forbidden in (start, start + FAR + inner):
        assert libc.mprotect(forbidden, FAR, 0) == 0
    offset = FAR + (inner - n if at_end else 0)
    return np.frombuffer(memory, np.uint8, n, offset).view(dtype).reshape(shape)

rng = np.random.default_rng(0)
for case in json.loads(sys.argv[1]):
    print(*case, flush=True)
    tokens, dim, value_dim, heads, kv_heads, tables, planes, dtype, causal, readout = case
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    rows = ((heads, dim), (kv_heads, dim), (kv_heads, value_dim), (heads, value_dim))
    shapes = [(1, tokens, *row) for row in rows]
    lsh = racecore.SoftLSH.random(dim, tables, planes, beta=1.0, rng=0)
    for at_end in (True, False):
        inputs = [guarded(shape, dtype, at_end) for shape in shapes]
        for x in inputs:
            x[...] = rng.standard_normal(x.shape).astype(dtype)
        outputs = [guarded(shapes[i], dtype, at_end) for i in (3, 0, 1, 2)]
        wrt = ("query", "key", "value", "beta") + (("planes",) if tokens % 2 else ())
        options = {"is_causal": causal, "readout": readout, "wrt": wrt}
        _, saved = racecore.attention_forward(*inputs[:3], lsh, out=outputs[0], **options)
        racecore.attention_backward(inputs[3], saved, out=racecore.Gradients(*outputs[1:]))
        state = racecore.RaceState.zeros(lsh, 1, kv_heads, value_dim)
        state.append(inputs[1], inputs[2])
        state.attend(inputs[0], readout=readout)
        for number in ("float64", "float32"):
            state = racecore.RaceState.zeros(lsh, 1, kv_heads, value_dim, dtype=number)
            state.sketch.flat = guarded(state.sketch.flat.shape, number, at_end)
            token = [guarded((1, 1, *x.shape[2:]), dtype, at_end) for x in inputs[:3]]
            for part, x in zip(token, inputs):
                part[...] = x[:, :1]
            target = guarded((1, 1, *outputs[0].shape[2:]), dtype, at_end)
            state.step(*token, readout=readout, out=target)
            state.step(*inputs[:3], readout=readout, out=outputs[0])
        del inputs, outputs, saved, x, token, target
    kept.clear()
print("done")
"""
SHAPES = [(64, 64, 2, 2), (128, 128, 4, 4), (128, 128, 4, 2), (24, 40, 2, 1)]  # D, V, H, G
HASHES = [(1, 1), (2, 2), (3, 3), (4, 4), (2, 4)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_nothing_beyond_an_array_is_read_or_written(dtype, causal):
    cases = [
        (
            tokens,
            dim,
            value_dim,
            heads,
            kv_heads,
            tables,
            planes,
            dtype,
            causal,
            "bucket_mean" if tokens == 33 else "ratio",
        )
        for tokens, (dim, value_dim, heads, kv_heads), (tables, planes) in itertools.product(
            (1, 3, 20, 33, 63, 1100), SHAPES, HASHES
        )
    ]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(cases)],
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, (
        f"exit code {done.returncode} at: {lines[-1:]} {done.stderr[-2000:]}"
    )
    assert lines[-1] == "done"
