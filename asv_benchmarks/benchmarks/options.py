"""Time of forward + backward with each option, as a multiple of the plain call, alternating."""

from __future__ import annotations

import time

import numpy as np

import racecore

from .common import HEAD_DIM, HEADS, TOKENS, hash_of, inputs

ROUNDS = 5
OPTIONS = [
    "planes gradient",
    "bucket_mean",
    "key_mask",
    "cu_seqlens",
    "initial_state",
    "grouped queries",
    "strided input",
]


def arguments(option: str) -> tuple[list[np.ndarray], dict[str, object]]:
    """Return query, key, value, and the keywords that an option adds to the plain call."""
    arrays = inputs(TOKENS, HEADS, HEAD_DIM)
    if option == "planes gradient":
        return arrays, {"wrt": ("query", "key", "value", "beta", "planes")}
    if option == "bucket_mean":
        return arrays, {"readout": "bucket_mean"}
    if option == "key_mask":
        return arrays, {"key_mask": np.arange(TOKENS) % 8 != 0}  # an eighth is padding
    if option == "cu_seqlens":
        return arrays, {"cu_seqlens": np.linspace(0, TOKENS, 9).astype(np.int64)}
    if option == "initial_state":
        state = racecore.RaceState.zeros(hash_of(), 1, HEADS, HEAD_DIM)
        state.append(*(x[None, :1024] for x in arrays[1:]))
        return arrays, {"initial_state": state}
    if option == "grouped queries":
        query, key, value = arrays
        return [query, key[:, :1].copy(), value[:, :1].copy()], {}
    if option == "strided input":  # as a [heads, tokens, dim] array looks from here
        return [x.transpose(1, 0, 2).copy().transpose(1, 0, 2) for x in arrays], {}
    raise ValueError(f"an option is one of {', '.join(OPTIONS)}, got {option!r}")


class Options:
    params = ([False, True], OPTIONS)
    param_names = ("causal", "option")
    timeout = 120

    def setup(self, causal, option):
        self.lsh = hash_of()
        (self.d_out,) = inputs(TOKENS, HEADS, HEAD_DIM, n=1)
        plain = {"is_causal": causal, "wrt": ("query", "key", "value", "beta")}
        arrays, extra = arguments(option)
        self.calls = [(inputs(TOKENS, HEADS, HEAD_DIM), plain), (arrays, plain | extra)]
        for call in self.calls:
            self.seconds(*call)

    def seconds(self, arrays, options):
        started = time.perf_counter()
        _, saved = racecore.attention_forward(*arrays, self.lsh, **options)
        racecore.attention_backward(self.d_out, saved)
        return time.perf_counter() - started

    def track_times_plain(self, causal, option):
        plain, changed = np.array(
            [[self.seconds(*call) for call in self.calls] for _ in range(ROUNDS)]
        ).min(0)
        return float(changed / plain)

    track_times_plain.unit = "x"
