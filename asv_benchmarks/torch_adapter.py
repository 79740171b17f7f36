"""Measure the overhead of the PyTorch adapter, in a minute or two. Needs torch.

    python asv_benchmarks/torch_adapter.py

Measures the overhead over racecore on NumPy arrays, the peak memory of training a layer, and
whether the threads of PyTorch and racecore disturb each other. Compared calls are measured
alternately.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import machine
import numpy as np
import torch

import racecore
from racecore.adapters.torch import RaceAttention, race_attention

ROUNDS = 15
LAYER = {"embed_dim": 256, "num_heads": 4}
PER_TOKEN = 4 + 2 + 4  # arrays of [T, E]: see `layer_memory`


def in_turns(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Return the median time of every call in seconds, measured alternately."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(ROUNDS):
        for name, call in calls.items():
            started = time.perf_counter()
            for _ in range(repeats):
                call()
            times[name].append((time.perf_counter() - started) / repeats)
    return {name: statistics.median(found) for name, found in times.items()}


def overhead(n_tokens: int, repeats: int) -> None:
    """Print what calls on tensors take more than calls on NumPy arrays: 8 heads of 64, causal,
    float32, (L, P) = (4, 4).
    """
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((1, n_tokens, 8, 64), dtype=np.float32) for _ in range(4)]
    lsh = racecore.SoftLSH.random(64, 4, 4, rng=0)
    planes, beta = torch.tensor(lsh.planes, dtype=torch.float32), torch.tensor(1.0)
    tensors = [torch.from_numpy(x) for x in arrays]
    watched = [x.clone().requires_grad_() for x in tensors[:3]]

    def numpy_both() -> None:
        _, saved = racecore.attention_forward(
            *arrays[:3], lsh, is_causal=True, wrt=("query", "key", "value")
        )
        racecore.attention_backward(arrays[3], saved)

    def torch_both() -> None:
        torch.autograd.grad(
            race_attention(*watched, planes, beta, is_causal=True), watched, tensors[3]
        )

    def multiply() -> None:  # the overhead of autograd for any function
        torch.autograd.grad(watched[0] * watched[1] * watched[2], watched, tensors[3])

    times = in_turns(
        {
            "NumPy": lambda: racecore.attention(*arrays[:3], lsh, is_causal=True),
            "torch": lambda: race_attention(*tensors[:3], planes, beta, is_causal=True),
            "NumPy, both": numpy_both,
            "torch, both": torch_both,
            "autograd": multiply,
        },
        repeats,
    )
    for what, a, b in (
        ("forward", "NumPy", "torch"),
        ("forward + backward", "NumPy, both", "torch, both"),
    ):
        more = times[b] - times[a]
        print(
            f"| {n_tokens:,} | {what} | {times[a] * 1e6:,.0f} us | {times[b] * 1e6:,.0f} us | "
            f"{more * 1e6:+,.0f} us | "
            f"{more / times[a]:+.1%} |"
        )
    if n_tokens == 1:
        print(f"(two multiplications, forward + backward: {times['autograd'] * 1e6:,.0f} us)")


def layer_memory(n_tokens: int) -> None:
    """Print the peak of one training step. For child processes.

    During the backward of attention there are x, queries, keys and values (4), the layer's output
    and its gradient (2), and the gradients of attention's output, queries, keys and values (4);
    attention's output is freed by then.
    """
    layer = RaceAttention(**LAYER)

    def step(n: int) -> None:
        x = torch.ones(1, n, LAYER["embed_dim"]).requires_grad_()
        out = layer(x)
        out.backward(torch.ones_like(out))

    step(3000)  # kernels and threads
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step(n_tokens)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)


def threads() -> None:
    """Print the times of a matrix product and of attention, apart and one after the other."""
    a, b = torch.randn(1500, 1500), torch.randn(1500, 1500)
    x = torch.randn(1, 16384, 8, 64)
    planes = torch.tensor(racecore.SoftLSH.random(64, 4, 4, rng=0).planes, dtype=torch.float32)
    calls = {
        "product": lambda: a @ b,
        "attention": lambda: race_attention(x, x, x, planes, 1.0),
        "both": lambda: (
            a @ b,
            race_attention(x, x, x, planes, 1.0),
            a @ b,
            race_attention(x, x, x, planes, 1.0),
        ),
    }
    times = in_turns(calls, 3)
    alone = 2 * (times["product"] + times["attention"])
    print(
        f"product {times['product'] * 1e3:.1f} ms, attention {times['attention'] * 1e3:.1f} ms; "
        "two of each in alternation "
        f"{times['both'] * 1e3:.1f} ms, {times['both'] / alone:.2f} times their sum"
    )


def main() -> None:
    """Measure everything and print it."""
    found = machine.describe()
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    print(
        f"{found['processor']} ({found['wide_vectors']}), {found['processors']} processors; "
        f"{versions}\n"
    )
    print("| tokens | | NumPy | torch | more | |\n| ---: | --- | ---: | ---: | ---: | ---: |")
    overhead(1, 200)
    overhead(1 << 14, 1)
    print("\nPeak memory of a training step of RaceAttention(256, 4):")
    for n in (1 << 16, 1 << 17, 1 << 18):
        command = [sys.executable, __file__, "--layer-memory", str(n)]
        peak = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        arrays = PER_TOKEN * n * LAYER["embed_dim"] * 4
        print(
            f"{n:,} tokens: {peak / 1e6:,.0f} MB, {peak / arrays:.2f} times the {PER_TOKEN} "
            "arrays that are needed at least"
        )
    print("\nPyTorch's threads and racecore's:")
    threads()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--layer-memory"]:
        layer_memory(int(sys.argv[2]))
    else:
        main()
