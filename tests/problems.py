"""Random attention problems, drawn over everything that a caller may do, reproducible from one
number.

A `Problem` is a short description that reads well in a failure; `Problem.arrays` makes its numbers.
The library and the oracle both get them through `run_library` and `run_oracle`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import ml_dtypes
import numpy as np
import oracle
from devices import fetch, put
from layouts import LAYOUTS, arrange

import racecore

__all__ = [
    "DTYPES",
    "PROBLEMS",
    "Arrays",
    "Problem",
    "draw",
    "make_state",
    "relative_error",
    "run_library",
    "run_oracle",
]

DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}
GRADIENTS = ("query", "key", "value", "planes", "beta", "mass", "value_sum")
_LENGTHS = (1, 2, 3, 31, 32, 33, 63, 64, 65, 131, 0, 7, 100, 2051, 33, 65, 1023, 1024, 1025, 67)
_HEADS = ((1, 1), (2, 2), (2, 1), (4, 2), (6, 2), (4, 1), (3, 3), (8, 2))  # H, G
# Not broadcast_tokens: gradients that should be zero consist of rounding errors, which have no
# relative error.
_LAYOUTS = [layout for layout in LAYOUTS if layout != "broadcast_tokens"]
_TABLES = ((2, 2), (3, 3), (4, 4), (1, 1), (5, 2), (1, 5), (3, 1))  # L, P


@dataclass(frozen=True)
class Problem:
    """One attention problem: what to compute, and how the numbers are drawn."""

    seed: int
    batch: int | None  # None: arrays without a batch axis
    n_queries: int
    n_keys: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    value_dim: int
    n_tables: int
    n_planes: int
    beta: float
    spread: float  # standard deviation of a projection on a plane
    planes_per_head: bool = False
    beta_per_head: bool = False
    readout: str = "ratio"
    is_causal: bool = False
    mask: str | None = None  # "random", or "whole": one sequence has no key at all
    bounds: tuple[int, ...] | None = None  # cu_seqlens
    has_initial_state: bool = False
    has_d_state: bool = False
    layouts: tuple[str, str, str, str] = ("contiguous",) * 4  # of query, key, value, d_out

    @property
    def n_sequences(self) -> int:
        return len(self.bounds) - 1 if self.bounds is not None else (self.batch or 1)

    @property
    def state_shape(self) -> tuple[int, int, int, int]:
        """Of `mass`: [B, G, L, R], with H in place of G where something is per head."""
        heads = self.n_heads if self.planes_per_head or self.beta_per_head else self.n_kv_heads
        return (self.n_sequences, heads, self.n_tables, 2**self.n_planes)

    def arrays(self, dtype: str) -> Arrays:
        """Draw the numbers. The values are those of `dtype`, in any layout."""
        rng = np.random.default_rng([self.seed, 1])
        batch = () if self.batch is None else (self.batch,)
        scale = self.spread / np.sqrt(self.head_dim)
        shapes = {
            "query": ((*batch, self.n_queries, self.n_heads, self.head_dim), scale),
            "key": ((*batch, self.n_keys, self.n_kv_heads, self.head_dim), scale),
            "value": ((*batch, self.n_keys, self.n_kv_heads, self.value_dim), 1.0),
            "d_out": ((*batch, self.n_queries, self.n_heads, self.value_dim), 1.0),
        }
        rows = {
            name: arrange((factor * rng.standard_normal(shape)).astype(DTYPES[dtype]), layout)
            for (name, (shape, factor)), layout in zip(shapes.items(), self.layouts, strict=True)
        }
        plane_shape = (self.n_heads,) * self.planes_per_head + (
            self.n_tables,
            self.n_planes,
            self.head_dim,
        )
        planes = (
            rng.standard_normal(plane_shape).astype(np.float32).astype(np.float64)
        )  # float32 has these values too
        beta = self.beta * rng.uniform(0.5, 1.0, self.n_heads) if self.beta_per_head else self.beta
        key_mask = None if self.mask is None else rng.random((self.batch or 1, self.n_keys)) < 0.7
        if self.mask == "whole" and key_mask is not None:
            key_mask[0] = False
        initial = d_state = None
        if self.has_initial_state:
            mass = rng.uniform(0.1, 2.0, self.state_shape)
            initial = (
                mass,
                mass[..., None] * rng.standard_normal((*self.state_shape, self.value_dim)),
            )
        if self.has_d_state:
            shapes_of_state = (self.state_shape, (*self.state_shape, self.value_dim))
            d_state = tuple(rng.standard_normal(shape) for shape in shapes_of_state)
        cu_seqlens = None if self.bounds is None else np.array(self.bounds)
        return Arrays(
            **rows,
            planes=planes,
            beta=beta,
            key_mask=key_mask,
            cu_seqlens=cu_seqlens,
            initial=initial,
            d_state=d_state,
        )


@dataclass(frozen=True, eq=False)
class Arrays:
    """The numbers of a problem. States are pairs (mass, value_sum)."""

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    d_out: np.ndarray
    planes: np.ndarray
    beta: Any
    key_mask: np.ndarray | None
    cu_seqlens: np.ndarray | None
    initial: tuple[np.ndarray, np.ndarray] | None
    d_state: tuple[np.ndarray, np.ndarray] | None


def draw(seed: int) -> Problem:
    """Draw the problem with this number. Lengths go round in turn, so that few numbers reach all of
    them.
    """
    rng = np.random.default_rng([seed, 0])
    n_keys = _LENGTHS[seed % len(_LENGTHS)]
    is_causal = bool(rng.random() < 0.5)
    is_long = n_keys > 1000
    batch = None if is_long or rng.random() < 0.25 else int(rng.integers(1, 4))
    kind = rng.choice(["plain", "mask", "packed"], p=[0.4, 0.3, 0.3])
    bounds: tuple[int, ...] | None = None
    if kind == "packed":
        batch = None if batch is None else 1
        cuts = np.sort(rng.integers(0, n_keys + 1, rng.integers(1, 5)))
        cuts = np.append(cuts, rng.choice(cuts))  # one boundary twice: an empty sequence
        bounds = (0, *sorted(int(cut) for cut in cuts), n_keys)
    n_queries = n_keys
    if not is_causal and kind != "packed" and rng.random() < 0.6:
        n_queries = int(rng.choice([1, 5, 32, 50, 129]))
    n_heads, n_kv_heads = _HEADS[rng.integers(3 if is_long else len(_HEADS))]
    n_tables, n_planes = _TABLES[rng.integers(len(_TABLES))]
    head_dim = int(rng.choice([1, 4, 16, 60, 96, 130]))
    beta = float(rng.choice([0.0, 0.3, 1.0, 1.0, 2.5, 7.0, 20.0]))
    # Rows of unit variance (spread sqrt(D)) under a large beta make an all but hard hash, whose
    # gradient is a matter of rounding in any implementation.
    spread = float(rng.choice([0.3, 1.0, np.sqrt(head_dim) if beta < 5 else 0.6]))
    return Problem(
        seed=seed,
        batch=batch,
        n_queries=n_queries,
        n_keys=n_keys,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        value_dim=int(rng.choice([1, 3, 16, 64, 130])),
        n_tables=n_tables,
        n_planes=n_planes,
        beta=beta,
        spread=spread,
        planes_per_head=bool(rng.random() < 0.25),
        beta_per_head=bool(rng.random() < 0.25),
        readout=str(rng.choice(["ratio", "bucket_mean"])),
        is_causal=is_causal,
        mask=str(rng.choice(["random", "whole"])) if kind == "mask" else None,
        bounds=bounds,
        has_initial_state=bool(rng.random() < 0.4) or n_keys <= 3,
        has_d_state=bool(rng.random() < 0.4),
        layouts=tuple(str(name) for name in rng.choice(_LAYOUTS, 4)),
    )


PROBLEMS = tuple(draw(seed) for seed in range(60))


def make_state(
    lsh: racecore.SoftLSH, mass: np.ndarray, value_sum: np.ndarray, n_kv_heads: int
) -> racecore.RaceState:
    """Return a state with these numbers in it."""
    state = racecore.RaceState.zeros(
        lsh, batch=len(mass), n_kv_heads=n_kv_heads, value_dim=value_sum.shape[-1]
    )
    state.mass[...] = mass
    state.value_sum[...] = value_sum
    return state


def run_library(problem: Problem, dtype: str, backend: str, **options: Any) -> dict[str, Any]:
    """Run forward and backward in racecore: out, mass and value_sum, and every gradient under "d_"
    and its name.
    """
    x = problem.arrays(dtype)
    query, key, value, d_out, key_mask = (
        put(y, backend) for y in (x.query, x.key, x.value, x.d_out, x.key_mask)
    )
    lsh = racecore.SoftLSH(x.planes, x.beta)
    initial = None if x.initial is None else make_state(lsh, *x.initial, problem.n_kv_heads)
    d_state = None if x.d_state is None else make_state(lsh, *x.d_state, problem.n_kv_heads)
    out, saved, state = racecore.attention_forward(
        query,
        key,
        value,
        lsh,
        is_causal=problem.is_causal,
        readout=problem.readout,
        key_mask=key_mask,
        cu_seqlens=x.cu_seqlens,
        initial_state=initial,
        return_state=True,
        backend=backend,
        **options,
    )
    grads = racecore.attention_backward(d_out, saved, d_state=d_state)
    results = {"out": out, "mass": state.mass, "value_sum": state.value_sum}
    for name in ("query", "key", "value", "planes", "beta"):
        results[f"d_{name}"] = getattr(grads, name)
    if initial is not None:
        results["d_mass"], results["d_value_sum"] = grads.state.mass, grads.state.value_sum
    return {name: fetch(array) for name, array in results.items()} | {"backend": saved.backend}


@lru_cache(maxsize=8)
def run_oracle(problem: Problem, dtype: str, arithmetic: str = "float64") -> dict[str, np.ndarray]:
    """Run the oracle on the same numbers; same names. `arithmetic="float32"` makes it the plain
    implementation.
    """
    x = problem.arrays(dtype)
    options: dict[str, Any] = {
        "is_causal": problem.is_causal,
        "readout": problem.readout,
        "key_mask": x.key_mask,
        "cu_seqlens": x.cu_seqlens,
        "dtype": DTYPES[arithmetic],
    }
    if x.initial is not None:
        options |= {"initial_mass": x.initial[0], "initial_value_sum": x.initial[1]}
    out, mass, value_sum = oracle.attention(x.query, x.key, x.value, x.planes, x.beta, **options)
    seeds = {} if x.d_state is None else {"d_mass": x.d_state[0], "d_value_sum": x.d_state[1]}
    grads = oracle.gradients(x.query, x.key, x.value, x.planes, x.beta, x.d_out, **seeds, **options)
    return {"out": out, "mass": mass, "value_sum": value_sum} | {
        f"d_{name}": grad for name, grad in grads.items()
    }


def relative_error(found: Any, expected: Any, floor: float = 0.0) -> float:
    """Return |found - expected| / |expected| in the root-mean-square sense; `floor` is the least
    denominator.
    """
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    if found.shape != expected.shape:
        raise AssertionError(f"shape {found.shape} in place of {expected.shape}")
    difference, scale = np.linalg.norm((found - expected).ravel()), np.linalg.norm(expected.ravel())
    return (
        0.0 if difference == 0 else float(difference / max(scale, floor, np.finfo(np.float64).tiny))
    )
