"""Forward and backward for every choice of kernels: causal or not, readout, dtype."""

from __future__ import annotations

import racecore

from .common import HEAD_DIM, HEADS, TOKENS, hash_of, inputs

DTYPES = ["float16", "bfloat16", "float32", "float64"]


class Reference:
    """The process with its inputs and nothing computed: subtract it from the peak memory of the
    others.
    """

    params = (["float32", "float64"],)
    param_names = ("dtype",)

    def peakmem_reference(self, dtype):
        inputs(TOKENS, HEADS, HEAD_DIM, dtype=dtype, n=4)


class Forward:
    params = ([False, True], ["ratio", "bucket_mean"], DTYPES)
    param_names = ("causal", "readout", "dtype")

    def setup(self, causal, readout, dtype):
        self.arrays = inputs(TOKENS, HEADS, HEAD_DIM, dtype=dtype)
        self.lsh = hash_of()
        self.options = {"is_causal": causal, "readout": readout}
        racecore.attention(*self.arrays, self.lsh, **self.options)

    def time_forward(self, causal, readout, dtype):
        racecore.attention(*self.arrays, self.lsh, **self.options)

    def peakmem_forward(self, causal, readout, dtype):
        racecore.attention(*self.arrays, self.lsh, **self.options)


class Backward:
    params = Forward.params
    param_names = Forward.param_names
    timeout = 120

    def setup(self, causal, readout, dtype):
        *arrays, self.d_out = inputs(TOKENS, HEADS, HEAD_DIM, dtype=dtype, n=4)
        _, self.saved = racecore.attention_forward(
            *arrays, hash_of(), is_causal=causal, readout=readout
        )
        racecore.attention_backward(self.d_out, self.saved)

    def time_backward(self, causal, readout, dtype):
        racecore.attention_backward(self.d_out, self.saved)

    def peakmem_backward(self, causal, readout, dtype):
        racecore.attention_backward(self.d_out, self.saved)


class BackwardWithoutHash:
    """Gradients of query, key and value only: the saving if the hash is not trained."""

    params = ([False, True],)
    param_names = ("causal",)

    def setup(self, causal):
        *arrays, self.d_out = inputs(TOKENS, HEADS, HEAD_DIM, n=4)
        wrt = ("query", "key", "value")
        _, self.saved = racecore.attention_forward(*arrays, hash_of(), is_causal=causal, wrt=wrt)
        racecore.attention_backward(self.d_out, self.saved)

    def time_backward(self, causal):
        racecore.attention_backward(self.d_out, self.saved)
