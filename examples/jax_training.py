"""Train a causal model in JAX with RACE attention and with softmax, same seed and budget.

    python examples/jax_training.py

The task is associative recall: most tokens state that a key has a value, some query the value of a
key stated before, and the model has to output it. This needs attention to one token out of many, a
weakness of RACE, whose tables have 2**P corners.
"""

from __future__ import annotations

import argparse
import time
from functools import partial

import jax
import numpy as np
from jax import numpy as jnp
from tqdm import tqdm

import racecore
from racecore.adapters.jax import race_attention

N_KEYS, N_VALUES, HEADS, DIM, LAYERS = 32, 8, 4, 16, 2
WIDTH = HEADS * DIM


def sequences(
    rng: np.random.Generator, batch: int, length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return key and value of every token, int [B, T] (value N_VALUES means "which?"), and the
    answers, -1 where none.
    """
    table = rng.integers(
        N_VALUES, size=(batch, N_KEYS)
    )  # the value of each key, drawn anew for every sequence
    keys = rng.integers(N_KEYS, size=(batch, length))
    truth = np.take_along_axis(table, keys, 1)
    first = (keys[:, :, None] == np.arange(N_KEYS)).argmax(
        axis=1
    )  # [B, N_KEYS], position at which each key is first stated
    seen = np.arange(length) > np.take_along_axis(first, keys, 1)
    queried = seen & (rng.random(keys.shape) < 0.5)
    return keys, np.where(queried, N_VALUES, truth), np.where(queried, truth, -1)


def new_parameters(rng: np.random.Generator) -> dict[str, jax.Array]:
    """Draw all parameters; planes and beta belong to RACE and are unused by softmax."""
    shapes = {
        "keys": (N_KEYS, WIDTH),
        "values": (N_VALUES + 1, WIDTH),
        "qkv": (LAYERS, 3, WIDTH, WIDTH),
        "mix": (LAYERS, WIDTH, WIDTH),
        "up": (LAYERS, WIDTH, 2 * WIDTH),
        "down": (LAYERS, 2 * WIDTH, WIDTH),
        "answer": (WIDTH, N_VALUES),
    }
    drawn = {
        name: rng.standard_normal(shape) / np.sqrt(shape[-2]) for name, shape in shapes.items()
    }
    drawn["planes"] = np.stack(
        [racecore.SoftLSH.random(DIM, 4, 4, rng=layer).planes for layer in range(LAYERS)]
    )
    drawn["beta"] = np.ones(LAYERS)
    return {name: jnp.asarray(array, jnp.float32) for name, array in drawn.items()}


def attend(kind: str, rows: jax.Array, planes: jax.Array, beta: jax.Array) -> jax.Array:
    """Attend causally; rows [3, B, T, H, D] are queries, keys and values."""
    if kind == "softmax":
        return jax.nn.dot_product_attention(*rows, is_causal=True)
    return race_attention(*rows, planes, beta, is_causal=True)


def logits(kind: str, p: dict[str, jax.Array], keys: jax.Array, values: jax.Array) -> jax.Array:
    """Return a score of every value at every token, [B, T, N_VALUES]."""
    x = (p["keys"][keys] + p["values"][values]) * jnp.sqrt(WIDTH / 2)
    for layer in range(LAYERS):
        rows = jnp.einsum("bte,nef->nbtf", norm(x), p["qkv"][layer]).reshape(
            3, *x.shape[:2], HEADS, DIM
        )
        x = (
            x
            + attend(kind, rows, p["planes"][layer], p["beta"][layer]).reshape(x.shape)
            @ p["mix"][layer]
        )
        x = x + jax.nn.gelu(norm(x) @ p["up"][layer]) @ p["down"][layer]
    return norm(x) @ p["answer"]


def norm(x: jax.Array) -> jax.Array:
    return x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)


def loss(
    kind: str, p: dict[str, jax.Array], keys: jax.Array, values: jax.Array, answers: jax.Array
) -> tuple:
    """Return the mean cross-entropy over the query tokens, and the fraction of correct answers."""
    queried, scores = answers >= 0, logits(kind, p, keys, values)
    right = jnp.take_along_axis(jax.nn.log_softmax(scores), answers[..., None], -1)[..., 0]
    return -(right * queried).sum() / queried.sum(), (
        (scores.argmax(-1) == answers) & queried
    ).sum() / queried.sum()


@partial(jax.jit, static_argnums=0)
def train_step(
    kind: str, p: dict, moments: tuple, step: jax.Array, rate: float, *batch: jax.Array
) -> tuple:
    """Take one step of Adam."""
    (value, share), grads = jax.value_and_grad(partial(loss, kind), has_aux=True)(p, *batch)
    first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, moments[0], grads)
    second = jax.tree.map(lambda m, g: 0.99 * m + 0.01 * g * g, moments[1], grads)
    unbiased = rate * jnp.sqrt(1 - 0.99**step) / (1 - 0.9**step)
    p = jax.tree.map(lambda x, m, s: x - unbiased * m / (jnp.sqrt(s) + 1e-8), p, first, second)
    return p, (first, second), value, share


def train(
    kind: str, steps: int, batch: int, length: int, seed: int
) -> tuple[dict[str, jax.Array], list[float]]:
    """Return the trained parameters and the loss of every step."""
    rng, p = np.random.default_rng(seed), new_parameters(np.random.default_rng(seed))
    moments = (jax.tree.map(jnp.zeros_like, p),) * 2
    losses = []
    with tqdm(range(1, steps + 1), desc=f"{kind:>7}", unit="step") as bar:
        for step in bar:
            data = sequences(rng, batch, length)
            p, moments, value, _ = train_step(kind, p, moments, jnp.float32(step), 3e-3, *data)
            losses.append(float(value))
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
    return p, losses


def milliseconds_per_step(kind: str, n_tokens: int, length: int) -> float:
    """Return the median time of a step over sequences of a length, `n_tokens` in all."""
    p = new_parameters(np.random.default_rng(0))
    moments = (jax.tree.map(jnp.zeros_like, p),) * 2
    data, seconds = sequences(np.random.default_rng(0), n_tokens // length, length), []
    for _ in range(8):
        started = time.perf_counter()
        jax.block_until_ready(train_step(kind, p, moments, jnp.float32(1), 3e-3, *data))
        seconds.append(time.perf_counter() - started)
    return 1e3 * float(np.median(seconds[1:]))  # the first one compiles


def draw(
    path: str, losses: dict[str, list[float]], times: dict[str, list[float]], lengths: list[int]
) -> None:
    """Draw loss against step, and time against length."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for kind, color in (("softmax", "#c8442c"), ("race", "#1f5fbf")):
        width = max(1, len(losses[kind]) // 40)
        smooth = np.convolve(losses[kind], np.ones(width) / width, "valid")
        left.plot(np.arange(len(smooth)) + width, smooth, color=color, label=kind)
        right.loglog(lengths, times[kind], "o-", color=color, label=kind, base=2)
    left.set(xlabel="step", ylabel=f"training loss (mean of {width} steps)")
    right.set(xlabel="tokens per sequence", ylabel="ms per step, same number of tokens")
    left.legend(frameon=False)
    figure.savefig(path, dpi=100)


def main(
    steps: int, batch: int, length: int, seed: int, lengths: list[int], plot: str | None
) -> None:
    """Train both, test them on the same fresh sequences, and time them at several lengths."""
    test = [jnp.asarray(x) for x in sequences(np.random.default_rng(seed + 1), 64, length)]
    losses, times = {}, {}
    print(
        f"JAX {jax.__version__}, {N_KEYS} keys, {N_VALUES} values, {steps} steps of {batch} "
        f"sequences of {length} tokens"
    )
    for kind in ("softmax", "race"):
        p, losses[kind] = train(kind, steps, batch, length, seed)
        value, share = loss(kind, p, *test)
        print(
            f"{kind:>7}: loss {value:.3f}, {share:.1%} right on fresh sequences "
            f"({1 / N_VALUES:.1%} by chance)"
        )
    print(f"   race: beta went from 1 to {', '.join(f'{b:.2f}' for b in p['beta'].tolist())}")
    for kind in losses:
        times[kind] = [milliseconds_per_step(kind, max(lengths), n) for n in lengths]
        text = ", ".join(f"{ms:.0f} at {n}" for n, ms in zip(lengths, times[kind], strict=True))
        print(f"{kind:>7}: ms per step of {max(lengths)} tokens, by length of sequence: {text}")
    if plot is not None:
        draw(plot, losses, times, lengths)
        print(f"drawn to {plot}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=128, help="tokens per sequence")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few steps, as a smoke test")
    parser.add_argument(
        "--plot", help="file of the picture, such as jax_training.png; needs matplotlib"
    )
    options = parser.parse_args()
    if options.quick:
        main(4, 4, 64, options.seed, [64, 128], options.plot)
    else:
        main(
            options.steps,
            options.batch,
            options.length,
            options.seed,
            [128, 512, 2048, 4096],
            options.plot,
        )
