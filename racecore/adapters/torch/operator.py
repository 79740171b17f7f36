"""Two operators for the compiler, which knows their shapes and does not trace into them.

`torch.compile` and `torch.export` trace a model with tensors that have no memory, so they need
operators. Backward takes only the inputs of forward and sums the keys again, because the states
that eager mode keeps (`function`) have shapes that depend on the chunks. In eager mode operators
would cost a hundred microseconds a call.
"""

from __future__ import annotations

import torch

from racecore.adapters.torch.tensors import (
    array_options,
    as_hash,
    as_like,
    as_tensor,
    target,
    to_array,
    torch_threads_or_stream,
)
from racecore.gradients import Gradients, saved_without_forward
from racecore.race_attention import attention, attention_backward

__all__ = ["WANTED", "attend", "attend_backward", "no_second_derivative"]

WANTED = ("query", "key", "value", "planes", "beta")


@torch.library.custom_op("racecore::attention", mutates_args=())
def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    planes: torch.Tensor,
    beta: torch.Tensor,
    key_mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    is_causal: bool,
    readout: str,
) -> torch.Tensor:
    """Compute attention."""
    with torch_threads_or_stream(query):
        options = array_options(is_causal, readout, key_mask, cu_seqlens)
        out = target((*query.shape[:-1], value.shape[-1]), query)
        q, k, v = to_array(query), to_array(key), to_array(value)
        return as_tensor(attention(q, k, v, as_hash(planes, beta), out=out, **options))


@attend.register_fake
def _(query, key, value, planes, beta, key_mask, cu_seqlens, is_causal, readout):
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


@torch.library.custom_op("racecore::attention_backward", mutates_args=())
def attend_backward(
    d_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    planes: torch.Tensor,
    beta: torch.Tensor,
    key_mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    is_causal: bool,
    readout: str,
    wrt: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute gradients of query, key, value, planes and beta; empty unless `wrt` names them."""
    names = wrt.split()
    tensors = {"query": query, "key": key, "value": value}
    with torch_threads_or_stream(query):
        options = array_options(is_causal, readout, key_mask, cu_seqlens)
        targets = {name: target(tuple(x.shape), x) for name, x in tensors.items() if name in names}
        saved = saved_without_forward(
            to_array(query),
            to_array(key),
            to_array(value),
            as_hash(planes, beta),
            wrt=names,
            **options,
        )
        grads = attention_backward(to_array(d_out), saved, out=Gradients(**targets))
        found = [None if grad is None else as_tensor(grad) for grad in grads[:3]]
        found += [as_like(grads.planes, planes), as_like(grads.beta, beta)]
    empty = [x.new_empty(0) for x in (query, key, value, planes, beta)]
    d_query, d_key, d_value, d_planes, d_beta = (
        y if x is None else x for x, y in zip(found, empty, strict=True)
    )
    return d_query, d_key, d_value, d_planes, d_beta


@attend_backward.register_fake
def _(d_out, query, key, value, planes, beta, key_mask, cu_seqlens, is_causal, readout, wrt):
    names = wrt.split()
    inputs = zip(WANTED, (query, key, value, planes, beta), strict=True)
    return tuple(x.new_empty(x.shape) if name in names else x.new_empty(0) for name, x in inputs)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.is_causal, ctx.readout = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, d_out):
    wrt = [name for name, needed in zip(WANTED, ctx.needs_input_grad[:5], strict=True) if needed]
    grads = attend_backward(d_out, *ctx.saved_tensors, ctx.is_causal, ctx.readout, " ".join(wrt))
    wanted = [grad if name in wrt else None for name, grad in zip(WANTED, grads, strict=True)]
    return (*wanted, None, None, None, None)


attend.register_autograd(_backward, setup_context=_setup_context)


def no_second_derivative(ctx, *d_grads):
    """Raise: for `attend_backward`, and for the gradients of eager mode."""
    raise NotImplementedError(
        "racecore has first derivatives only: the gradients of race_attention cannot be "
        "differentiated again"
    )


attend_backward.register_autograd(no_second_derivative)
