"""Compare every gradient with central differences in float64.

python examples/gradient_check.py
"""

from __future__ import annotations

import argparse

import numpy as np

import racecore

# central differences have an error of about 1e-10: the square of the step, and rounding / step
STEP = 1e-5


def numerical(loss, x: np.ndarray, direction: np.ndarray) -> float:
    """Return the derivative of `loss` at x along a direction."""
    return (loss(x + STEP * direction) - loss(x - STEP * direction)) / (2 * STEP)


def check(readout: str, is_causal: bool, n_tokens: int) -> float:
    """Compare all gradients along random directions; return the largest relative error."""
    rng = np.random.default_rng(1)
    query = rng.standard_normal((1, n_tokens, 4, 6))
    key, value = rng.standard_normal((1, n_tokens, 2, 6)), rng.standard_normal((1, n_tokens, 2, 5))
    d_out = rng.standard_normal((1, n_tokens, 4, 5))
    lsh = racecore.SoftLSH.random(head_dim=6, n_tables=3, n_planes=3, beta=1.3, rng=2)
    inputs = {
        "query": query,
        "key": key,
        "value": value,
        "planes": lsh.planes,
        "beta": np.array(lsh.beta),
    }
    options = {"readout": readout, "is_causal": is_causal}

    def loss(**changed: np.ndarray) -> float:
        x = {**inputs, **changed}
        hashed = racecore.SoftLSH(x["planes"], x["beta"])
        return float(
            (racecore.attention(x["query"], x["key"], x["value"], hashed, **options) * d_out).sum()
        )

    _, saved = racecore.attention_forward(query, key, value, lsh, **options)
    grads = racecore.attention_backward(d_out, saved)
    worst = 0.0
    for name, x in inputs.items():
        direction = rng.standard_normal(x.shape)
        expected = numerical(lambda moved, name=name: loss(**{name: moved}), x, direction)
        found = float((getattr(grads, name) * direction).sum())
        error = abs(found - expected) / max(
            abs(expected), 0.01
        )  # below this the differences are rounding
        worst = max(worst, error)
        print(
            f"  d_{name:<7} {found:+15.9f}   differences {expected:+15.9f}   relative error "
            f"{error:.1e}"
        )
    return worst


def main(n_tokens: int = 200) -> None:
    """Check both readouts, causal and not."""
    worst = 0.0
    for readout in ("ratio", "bucket_mean"):
        for is_causal in (False, True):
            print(
                f"{readout}, {'causal' if is_causal else 'bidirectional'}: derivative along a "
                "random direction"
            )
            worst = max(worst, check(readout, is_causal, n_tokens))
    print(f"worst relative error {worst:.1e}")
    if worst > 1e-6:
        raise SystemExit("a gradient is wrong")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=200)
    main(parser.parse_args().tokens)
