"""RACE attention for JAX: `race_attention`, with gradients, under jit, vmap, scan, checkpoint and
shard_map.

How it works. The kernels run on the host, on NumPy views of XLA's own buffers: nothing is copied
(`adapters.xla_call`). Where XLA computes elsewhere, or no longer takes such calls,
`jax.pure_callback` does the same with copies. `jax.custom_vjp` joins forward and backward. While a
function is traced, shapes and dtypes are checked with stand-ins that take no memory, so that
mistakes are reported by the call that makes them.

Between forward and backward only the inputs are kept. The `Saved` of racecore also holds states at
chunk boundaries: their number depends on the chunks of the call, they are float64, which JAX
without x64 does not have, and under vmap the chunks are known only when the batch is. Backward sums
the keys again instead.

No function of JAX is called inside a call from XLA: on a machine with few cores it could wait for a
thread that waits for it.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

import racecore
from racecore import inputs
from racecore.adapters import task as host
from racecore.adapters import xla_call
from racecore.adapters.task import HASH, ROWS, HostTask
from racecore.runtime import arrays

__all__ = ["race_attention"]

_DIFFERENTIABLE = (*ROWS, *HASH)
_TARGET = "racecore_race_attention"  # the name in compiled programs


def race_attention(
    query: Any,
    key: Any,
    value: Any,
    planes: Any,
    beta: Any,
    *,
    is_causal: bool = False,
    readout: str = "ratio",
    key_mask: Any = None,
    cu_seqlens: Any = None,
) -> jax.Array:
    """Compute RACE attention of JAX arrays; differentiable in query, key, value, planes and beta.

    Parameters
    ----------
    query : array, shape [B, T, H, D]
    key : array, shape [B, Tk, G, D]
    value : array, shape [B, Tk, G, V]
        As for `racecore.attention`: tokens before heads, 3-D without a batch axis, H a multiple of
        G; all of one dtype: float16, bfloat16, float32, or float64 where x64 is on.
    planes : array, shape [L, P, D] or [H, L, P, D]
        Hyperplanes, such as ``SoftLSH.random(...).planes``. Of any supported dtype, which need not
        be that of the query.
    beta : float or array, shape [] or [H]
        Sharpness. A Python number counts as float32 unless x64 is on, as everywhere in JAX.
    is_causal : bool
        Query i sees keys 0 ... i only.
    readout : {"ratio", "bucket_mean"}
        As for `racecore.attention`.
    key_mask : bool array, shape [B, Tk], optional
        True = the key takes part. May be traced; has no gradient.
    cu_seqlens : integer array, shape [n + 1], optional
        Boundaries of packed sequences. May be traced; has no gradient.

    Returns
    -------
    jax.Array, shape [B, T, H, V]
        In the query's dtype. A gradient has the dtype of its argument.

    Raises
    ------
    ValueError, TypeError
        While tracing; the message says what was expected, what came and what to do. Also for a
        float64 array where x64 is off: JAX would silently make it float32.
    NotImplementedError
        A second derivative is taken.

    Notes
    -----
    Source: RACE Attention (arXiv 2510.04008), Algorithms 1 and 2. The bits are those of
    `racecore.attention` on NumPy arrays.

    Under `jax.vmap` mapped axes become one batch. Where planes, beta or cu_seqlens are mapped, or a
    mapped function's gradient of planes or beta is wanted, the examples are computed one after the
    other, as JAX needs the gradient of each: a batch axis of the arrays themselves is then faster.

    Values that only become known when the compiled program runs cannot raise while tracing: planes
    or beta that are not finite make the result NaN, and so all gradients; a traced cu_seqlens that
    decreases or does not end at T stops the program with racecore's message inside JAX's error.

    Computation is in host memory, whatever device the arrays are on. An array sharded over devices
    is gathered for the call, unless it is made inside `jax.shard_map`: then every shard is computed
    by itself.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> rows = (rng.standard_normal((100, 2, 16), dtype=np.float32) for _ in range(3))
    >>> q, k, v = (jnp.asarray(x) for x in rows)
    >>> planes = jnp.asarray(rng.standard_normal((4, 2, 16), dtype=np.float32))
    >>> loss = lambda q: race_attention(q, k, v, planes, 1.0, is_causal=True).sum()
    >>> jax.grad(loss)(q).shape
    (100, 2, 16)
    """
    given = {"query": query, "key": key, "value": value, "planes": planes, "beta": beta}
    given |= {"key_mask": key_mask, "cu_seqlens": cu_seqlens}
    _check(given, is_causal, readout)
    traced = {name: _as_jax(array, name) for name, array in given.items() if array is not None}
    task = HostTask(
        bool(is_causal), readout, tuple((name, array.ndim) for name, array in traced.items())
    )
    return _compiled(task, _varying_alike(traced))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(task: HostTask, given: dict[str, jax.Array]) -> jax.Array:
    """Call racecore's forward on arrays that have been checked."""
    query, value = given["query"], given["value"]
    (out,) = _call(
        task, [jax.ShapeDtypeStruct((*query.shape[:-1], value.shape[-1]), query.dtype)], given
    )
    return _placed_like(out, query)


def _forward(
    task: HostTask, given: dict[str, Any]
) -> tuple[jax.Array, tuple[dict[str, jax.Array], jax.Array]]:
    """Return the output; keep the inputs and the names of the gradients to compute."""
    values = {name: argument.value for name, argument in given.items()}
    code = sum(1 << bit for bit, name in enumerate(_DIFFERENTIABLE) if given[name].perturbed)
    # As a length: known while tracing, and part of the array. The structure of the kept values is
    # not safe, since JAX traces this function once for every set of wanted gradients and may then
    # take one's structure for another's.
    return _attention(task, values), (values, jnp.zeros((code, 0), bool))


def _backward(
    task: HostTask, kept: tuple[dict[str, jax.Array], jax.Array], d_out: Any
) -> tuple[dict[str, Any]]:
    values, wanted = kept
    wrt = tuple(name for bit, name in enumerate(_DIFFERENTIABLE) if wanted.shape[0] >> bit & 1)
    gradients: dict[str, Any] = dict.fromkeys(values)
    if not isinstance(d_out, jax.custom_derivatives.SymbolicZero):
        gradients |= _gradients(replace(task, wrt=wrt), values, d_out)
    return (gradients,)


_attention.defvjp(_forward, _backward, symbolic_zeros=True)
# Compiled, because shard_map outside a jit does not know what is differentiated.
_compiled = jax.jit(_attention, static_argnums=0, inline=True)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _gradients(
    task: HostTask, given: dict[str, jax.Array], d_out: jax.Array
) -> dict[str, jax.Array]:
    """Call racecore's backward; gradients by name."""
    names = task.wrt or ()
    shapes = [jax.ShapeDtypeStruct(given[name].shape, given[name].dtype) for name in names]
    task = replace(task, ndims=(*task.ndims, ("d_out", d_out.ndim)))
    results = zip(names, _call(task, shapes, given | {"d_out": d_out}), strict=True)
    return {name: _placed_like(result, given[name]) for name, result in results}


@_gradients.defjvp
def _no_second_derivative(task: HostTask, primals: Any, tangents: Any) -> Any:
    raise NotImplementedError(
        "race_attention has first derivatives only: the gradient of a gradient (as in "
        "jax.hessian, or grad of grad) is not "
        "implemented; wrap the inner gradient in jax.lax.stop_gradient if it is meant as a constant"
    )


def _call(
    task: HostTask, shapes: list[jax.ShapeDtypeStruct], given: dict[str, jax.Array]
) -> list[jax.Array]:
    """Call a task on the host. Inside shard_map there is one call for every shard."""
    text = task.text

    def in_place(*arguments: jax.Array) -> list[jax.Array]:
        """Let XLA call the task on its own buffers."""
        return jax.ffi.ffi_call(_TARGET, shapes, vmap_method="expand_dims")(*arguments, task=text)

    def with_copies(*arguments: jax.Array) -> list[jax.Array]:
        """Let Python call the task on copies: for other devices, or if XLA cannot call it."""
        results = jax.pure_callback(
            _WithCopies(text, tuple(shapes)), shapes, *arguments, vmap_method="expand_dims"
        )
        # Without the barrier, the result of a call for all shards, if a jit returns nothing else,
        # has a sharding that no operation takes.
        return jax.lax.optimization_barrier(results)

    cpu = in_place if _is_registered() else with_copies
    arguments = [given[name] for name, _ in task.ndims]
    results = jax.lax.platform_dependent(*arguments, cpu=cpu, default=with_copies)
    axes = _varying_axes(given["query"])
    return [
        jax.lax.pcast(result, tuple(axes - _varying_axes(result)), to="varying")
        for result in results
    ]


@cache
def _is_registered() -> bool:
    """Register `racecore.adapters.task.run` with XLA; return whether XLA has accepted it."""
    try:
        # a CPU backend that is created after the registration would fail
        jax.local_devices(backend="cpu")
        xla_call.register(_TARGET, host.run)
    except Exception as error:
        warnings.warn(
            f"arrays are copied between JAX and racecore, which takes time: {error}", stacklevel=2
        )
        return False
    return True


@dataclass(frozen=True)
class _WithCopies:
    """A callback that equals another one for the same task, so that JAX compiles the call once."""

    text: str
    types: tuple[jax.ShapeDtypeStruct, ...]  # of the results of one example

    def __call__(self, *arguments: Any) -> list[np.ndarray]:
        given = [np.asarray(array) for array in arguments]
        mapped = host.mapped_axes(self.text, given)
        results = [arrays.empty((*mapped, *kind.shape), kind.dtype) for kind in self.types]
        host.run(self.text, given, results)
        return results


def _varying_alike(given: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Inside shard_map, mark all arguments as varying along the axes of any of them."""
    # the gradient of an argument that shards share is then their sum
    varying = {name: _varying_axes(array) for name, array in given.items()}
    axes = frozenset().union(*varying.values())
    return {
        name: jax.lax.pcast(array, tuple(axes - varying[name]), to="varying")
        for name, array in given.items()
    }


def _varying_axes(array: jax.Array) -> frozenset[str]:
    """Return the mesh axes along which an array varies; none outside shard_map(check_vma=True)."""
    kind = jax.typeof(array)
    # the name before JAX 0.10, and the one since
    return kind.vma if hasattr(kind, "vma") else kind.mat.varying


def _placed_like(result: jax.Array, like: jax.Array) -> jax.Array:
    """Give a result the sharding of an argument, under a mesh of explicit axes.

    The last axis is never sharded in an output, whose last axis may be another one.
    """
    sharding = jax.typeof(like).sharding
    if not any(kind == jax.sharding.AxisType.Explicit for kind in sharding.mesh.axis_types):
        return result
    spec = sharding.spec if result.shape == like.shape else (*sharding.spec[:-1], None)
    return jax.sharding.reshard(
        result, jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*spec))
    )


def _as_jax(array: Any, name: str) -> jax.Array:
    """Make a JAX array; a dtype that JAX would make narrower raises."""
    if isinstance(array, jax.Array):  # tracers too
        narrow = jax.dtypes.canonicalize_dtype(array.dtype)
        if array.dtype.kind == "f" and narrow != array.dtype:
            raise TypeError(_narrowing(array.dtype, narrow, name))
        # under jax.grad a Python number is a tracer with that number inside
        return jnp.asarray(array)
    if isinstance(array, (int, float)) and not isinstance(array, np.generic):
        return jnp.asarray(array)
    numbers = _as_numpy(array, name)
    narrow = jax.dtypes.canonicalize_dtype(numbers.dtype)
    if narrow != numbers.dtype and (
        name in ROWS or not np.array_equal(numbers.astype(narrow), numbers)
    ):
        raise TypeError(_narrowing(numbers.dtype, narrow, name))
    return jnp.asarray(numbers, narrow)


def _narrowing(dtype: Any, narrow: Any, name: str) -> str:
    return (
        f"{name} is {dtype}, and JAX would silently make it {narrow}: turn x64 on with "
        f'jax.config.update("jax_enable_x64", True), or convert it with .astype({narrow})'
    )


def _as_numpy(array: Any, name: str) -> np.ndarray:
    if name in (*HASH, "cu_seqlens") and not hasattr(array, "__dlpack__"):
        array = np.asarray(array)
    return arrays.as_numpy(array, name)


def _check(given: dict[str, Any], is_causal: bool, readout: str) -> None:
    """Let racecore check the arguments, with stand-ins of the same shapes and dtypes in place of
    their values.
    """
    standing: dict[str, Any] = {
        n: None if array is None else _stand_in(array, n) for n, array in given.items()
    }
    bounds = standing["cu_seqlens"]
    if isinstance(given["cu_seqlens"], jax.core.Tracer):
        n_tokens = given["key"].shape[-3] if np.ndim(given["key"]) in (3, 4) else 0
        if bounds.ndim == 1 and len(bounds) > 1 and bounds.dtype.kind in "iu":
            bounds = np.array(
                [0] * (len(bounds) - 1) + [n_tokens]
            )  # values come when the program runs
    elif bounds is not None:
        bounds = np.asarray(given["cu_seqlens"])
    lsh = racecore.SoftLSH(standing["planes"], standing["beta"])
    inputs.check_attention(
        inputs.Passed.resolve(*(standing[name] for name in ROWS)),
        lsh,
        is_causal=is_causal,
        readout=readout,
        key_mask=standing["key_mask"],
        cu_seqlens=bounds,
    )


def _stand_in(array: Any, name: str) -> np.ndarray:
    """Return zeros of an array's shape and dtype that take no memory."""
    if not isinstance(array, jax.Array):
        array = _as_numpy(array, name)
    return np.broadcast_to(np.zeros((), array.dtype), array.shape)
