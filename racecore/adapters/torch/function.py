"""race_attention and race_sdpa: attention on tensors, with gradients through autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

from racecore.adapters.torch.operator import WANTED, attend, no_second_derivative
from racecore.adapters.torch.tensors import (
    array_options,
    as_hash,
    as_like,
    as_tensor,
    autocast,
    check_tensors,
    target,
    to_array,
    torch_threads_or_stream,
)
from racecore.gradients import Gradients
from racecore.race_attention import attention, attention_backward, attention_forward
from racecore.soft_lsh import SoftLSH

__all__ = ["race_attention", "race_sdpa"]


def race_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    planes: torch.Tensor,
    beta: torch.Tensor | float,
    *,
    is_causal: bool = False,
    readout: str = "ratio",
    key_mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute RACE attention of tensors; gradients flow to query, key, value, planes and beta.

    Parameters
    ----------
    query : Tensor, shape [B, Tq, H, D]
    key : Tensor, shape [B, Tk, G, D]
    value : Tensor, shape [B, Tk, G, V]
        Tokens come before heads. On the CPU or on one GPU, of one dtype: float16, bfloat16, float32
        or float64; any strides. Without a batch axis, [T, heads, dim]. Under autocast they are cast
        to its dtype, as for PyTorch's own attention.
    planes : Tensor, shape [L, P, D] or [H, L, P, D]
        Hyperplanes of the hash, such as ``torch.from_numpy(lsh.planes.copy())``.
    beta : Tensor, shape [] or [H], or float
        Sharpness of the hash.
    is_causal, readout
        See `racecore.attention`.
    key_mask : bool Tensor, shape [B, Tk], optional
        True = the key takes part.
    cu_seqlens : integer Tensor, shape [n + 1], optional
        Boundaries of sequences packed along the token axis.

    Returns
    -------
    Tensor, shape [B, Tq, H, V]
        Contiguous, in the dtype of the query.

    Raises
    ------
    ValueError, TypeError
        As `racecore.attention` raises them.
    racecore.errors.BackendUnavailableError
        The tensors are on a GPU, and CUDA kernels cannot run: the message says why.
    NotImplementedError
        Inside a transform of `torch.func`, or when a second derivative is taken.

    Notes
    -----
    Between forward and backward the inputs are kept, and states of at most 32 MiB (1 GiB on a GPU).
    A second derivative raises. Planes and beta on a GPU are copied to the host in every call, which
    waits for the GPU; they may stay on the CPU while query, key and value are on the GPU.

    Source: RACE Attention (arXiv 2510.04008), Algorithms 1 and 2.
    """
    check_tensors(query=query, key=key, value=value, key_mask=key_mask, cu_seqlens=cu_seqlens)
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            "race_attention does not go through the transforms of torch.func (vmap, grad, jvp, "
            "...): give the tensors a "
            "batch axis in place of vmap, and take gradients with torch.autograd"
        )
    query, key, value = autocast(query, key, value)
    if not isinstance(planes, torch.Tensor):
        planes = torch.as_tensor(planes)
    if _is_traced(query):
        if not isinstance(beta, torch.Tensor):
            beta = torch.tensor(float(beta), dtype=torch.float64)
        return attend(query, key, value, planes, beta, key_mask, cu_seqlens, is_causal, readout)
    if forward_ad._current_level >= 0:
        _refuse_tangents(query, key, value)
    options = (is_causal, readout, key_mask, cu_seqlens)
    if torch.is_grad_enabled() and _need_gradient(query, key, value, planes, beta):
        return _Attention.apply(query, key, value, planes, beta, *options)
    return _without_gradient(query, key, value, as_hash(planes, beta), options)


def race_sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    lsh: Any,
    readout: str = "ratio",
) -> torch.Tensor:
    """Compute RACE attention with the arguments of
    `torch.nn.functional.scaled_dot_product_attention`.

    Parameters
    ----------
    query : Tensor, shape [B, H, Tq, D]
    key : Tensor, shape [B, G, Tk, D]
    value : Tensor, shape [B, G, Tk, V]
        Heads come before tokens, as in PyTorch; [H, T, D] without a batch axis.
    attn_mask : None
    dropout_p : 0
        There are no scores that could be masked or dropped.
    is_causal : bool
        Query i sees keys 0 ... i only; needs Tq == Tk.
    scale : None
        Nor that could be scaled.
    enable_gqa : bool
        Allow fewer key/value heads than query heads.
    lsh : SoftLSH, or a module
        The hash. A module has tensors `planes` and `beta`, as `RaceAttention` does; gradients flow
        to them, and ``torch.compile(fullgraph=True)`` can go through.
    readout : {"ratio", "bucket_mean"}
        See `racecore.attention`.

    Returns
    -------
    Tensor, shape [B, H, Tq, V]
        A view whose tokens come before heads in memory.

    Raises
    ------
    ValueError, TypeError
        As `racecore.attention` raises them, and for masks, dropout or a scale.
    """
    _refuse_scores(attn_mask, dropout_p, scale)
    if not isinstance(lsh, SoftLSH) and not (hasattr(lsh, "planes") and hasattr(lsh, "beta")):
        raise TypeError(
            "lsh must be a racecore.SoftLSH, such as SoftLSH.random(head_dim=64), got "
            f"{type(lsh).__qualname__}"
        )
    shapes = [tuple(x.shape) for x in (query, key, value)]
    if (
        any(len(shape) not in (3, 4) for shape in shapes)
        or len({len(shape) for shape in shapes}) > 1
    ):
        raise ValueError(
            "query, key and value must all be [B, heads, T, dim] or all [heads, T, dim], got "
            f"{shapes}"
        )
    if shapes[0][-3] != shapes[1][-3] and not enable_gqa:
        raise ValueError(
            f"the query has {shapes[0][-3]} heads and the key {shapes[1][-3]}: pass "
            "enable_gqa=True for grouped queries"
        )
    q, k, v = (x.transpose(-3, -2) for x in (query, key, value))
    planes, beta = _tensors_of(lsh) if isinstance(lsh, SoftLSH) else (lsh.planes, lsh.beta)
    return race_attention(q, k, v, planes, beta, is_causal=is_causal, readout=readout).transpose(
        -3, -2
    )


@torch.compiler.disable(
    reason="a SoftLSH is not made of tensors: give race_sdpa a module with planes and beta to "
    "compile it"
)
def _tensors_of(lsh: SoftLSH) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(lsh.planes, dtype=torch.float64), torch.tensor(
        lsh.beta, dtype=torch.float64
    )


def _refuse_scores(attn_mask: Any, dropout_p: float, scale: float | None) -> None:
    if attn_mask is not None:
        raise ValueError(
            "attn_mask must be None: keys are summed before they are queried, so no single pair "
            "can be masked; race_attention takes key_mask (padding) and cu_seqlens (packed "
            "sequences), and is_causal=True is the causal mask"
        )
    if dropout_p:
        raise ValueError(
            f"dropout_p must be 0, got {dropout_p}: there are no weights of single pairs to drop"
        )
    if scale is not None:
        raise ValueError(
            f"scale must be None, got {scale}: rows are hashed unscaled; multiply the query "
            "and the key, or choose beta"
        )


def _refuse_tangents(*tensors: torch.Tensor) -> None:
    """Raise if a tensor takes part in forward-mode differentiation."""
    if any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError(
            "race_attention has no forward-mode derivative; take gradients with torch.autograd"
        )


def _is_traced(query: torch.Tensor) -> bool:
    """Return whether a call is recorded, or its tensors have no data: both need `operator`."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or _get_current_dispatch_mode() is not None
        or type(query) not in (torch.Tensor, torch.nn.Parameter)
        or query.device.type == "meta"
    )


def _need_gradient(*tensors: Any) -> bool:
    return any(isinstance(x, torch.Tensor) and x.requires_grad for x in tensors)


def _arrays(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[Any, Any, Any]:
    return to_array(query), to_array(key), to_array(value)


def _without_gradient(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lsh: SoftLSH,
    options: tuple[Any, ...],
) -> torch.Tensor:
    with torch_threads_or_stream(query):
        out = target((*query.shape[:-1], value.shape[-1]), query)
        result = attention(*_arrays(query, key, value), lsh, out=out, **array_options(*options))
    return as_tensor(result)


class _Attention(torch.autograd.Function):
    """Forward and backward of racecore; autograd keeps all tensors, so that checkpointing works."""

    @staticmethod
    def forward(ctx, query, key, value, planes, beta, is_causal, readout, key_mask, cu_seqlens):
        """Compute the output, and save the tensors of backward with autograd."""
        wrt = [
            name for name, needed in zip(WANTED, ctx.needs_input_grad[:5], strict=True) if needed
        ]
        with torch_threads_or_stream(query):
            out = target((*query.shape[:-1], value.shape[-1]), query)
            result, saved = attention_forward(
                *_arrays(query, key, value),
                as_hash(planes, beta),
                out=out,
                wrt=wrt,
                **array_options(is_causal, readout, key_mask, cu_seqlens),
            )
            states = [
                as_tensor(state)
                for states in saved.states
                if states is not None
                for state in states
            ]
        ctx.counts = [None if states is None else len(states) for states in saved.states]
        ctx.saved = saved.without_inputs()
        # a number needs no gradient
        kept_beta = beta if isinstance(beta, torch.Tensor) else None
        ctx.save_for_backward(query, key, value, planes, kept_beta, key_mask, *states)
        return as_tensor(result)

    @staticmethod
    def backward(ctx, d_out):
        """Return the gradients of the first five arguments; the others have none."""
        query, key, value, planes, beta, key_mask, *flat = ctx.saved_tensors
        with torch.no_grad():
            grads = _backward(ctx, d_out, (query, key, value), planes, beta, key_mask, iter(flat))
        if torch.is_grad_enabled():  # create_graph=True
            grads = _NotTwice.apply(d_out, query, key, value, planes, beta, *grads)
        return (*grads, None, None, None, None)


def _backward(ctx, d_out, tensors, planes, beta, key_mask, flat) -> tuple[torch.Tensor | None, ...]:
    """Rebuild the `Saved` of forward and compute the wanted gradients."""
    wrt = ctx.saved.wrt
    with torch_threads_or_stream(tensors[0]):
        out = [
            target(tuple(x.shape), x) if name in wrt else None
            for name, x in zip(WANTED, tensors, strict=False)
        ]
        states = tuple(
            n if n is None else [to_array(next(flat)) for _ in range(n)] for n in ctx.counts
        )
        mask = None if key_mask is None else to_array(key_mask)
        saved = ctx.saved.with_inputs(*_arrays(*tensors), mask, states)
        grads = attention_backward(to_array(d_out), saved, out=Gradients(*out))
        d_rows = [None if grad is None else as_tensor(grad) for grad in grads[:3]]
        d_planes = as_like(grads.planes, planes)
        d_beta = None if beta is None else as_like(grads.beta, beta)
    return (*d_rows, d_planes, d_beta)


class _NotTwice(torch.autograd.Function):
    """The identity on gradients; differentiating them raises."""

    @staticmethod
    def forward(ctx, d_out, query, key, value, planes, beta, *grads):
        """Return the gradients unchanged."""
        return tuple(grad if grad is None else grad.view_as(grad) for grad in grads)

    backward = staticmethod(no_second_derivative)
