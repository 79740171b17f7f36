"""RaceCache: the states of a stack of attention layers while a model generates; constant size."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch

from racecore.adapters.torch.tensors import (
    as_hash,
    as_tensor,
    autocast,
    check_tensors,
    target,
    to_array,
    torch_threads_or_stream,
)
from racecore.state import RaceState

__all__ = ["RaceCache"]


class RaceCache:
    """The decoding state of a stack of layers: one `racecore.RaceState` for each, in the order in
    which they first attended.

    Pass the same cache to every layer, first with the prompt and then with token after token.
    However long the past is, a layer keeps ``8 * B * G * L * R * (1 + V)`` bytes. States have no
    gradients: decode under ``torch.no_grad()``.

    Layers are distinguished by identity, or by a hashable passed for them: a layer that a model
    uses twice needs a name for each use (`attend`), a copy of a layer starts with an empty past.
    One thread at a time may use a cache.

    For models of Hugging Face transformers, `racecore.adapters.transformers.new_cache` makes one.

    Examples
    --------
    >>> from racecore.adapters.torch import RaceAttention
    >>> cache, layer = RaceCache(), RaceAttention(64, 4)
    >>> prompt, token = torch.randn(1, 100, 64), torch.randn(1, 1, 64)
    >>> with torch.no_grad():
    ...     _ = layer(prompt, cache=cache)
    ...     layer(token, cache=cache).shape
    torch.Size([1, 1, 64])
    """

    def __init__(self) -> None:
        self._states: dict[Hashable, RaceState] = {}
        self._seen: dict[Hashable, int] = {}

    @property
    def states(self) -> tuple[RaceState, ...]:
        """The states, layer after layer."""
        return tuple(self._states.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all states."""
        return sum(state.sketch.flat.nbytes for state in self.states)

    def __len__(self) -> int:
        """Return the number of layers that have attended."""
        return len(self._states)

    def n_seen(self, layer: Hashable) -> int:
        """Return the tokens of a layer, padding included: the position of the next one."""
        return self._seen.get(layer, 0)

    @torch.compiler.disable(
        reason="a RaceCache changes in place: compile the layers without it, or let the graph "
        "break here"
    )
    def attend(
        self,
        layer: Hashable,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        planes: torch.Tensor,
        beta: torch.Tensor | float,
        *,
        readout: str = "ratio",
        key_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Add tokens to a layer's past; each sees that past, the tokens before it, and itself.

        Parameters
        ----------
        layer : hashable
            The layer: a module, or a number.
        query, key, value : Tensor, shapes [B, T, H, D], [B, T, G, D] and [B, T, G, V]
        planes, beta : Tensor
            The layer's hash, which must not change while it decodes.
        readout, key_mask
            See `racecore.adapters.torch.race_attention`.

        Returns
        -------
        Tensor, shape [B, T, H, V]

        Raises
        ------
        RuntimeError
            A gradient is wanted.
        ValueError, TypeError
            Shapes, dtypes or a hash that do not fit the past; the past is then unchanged.
        """
        check_tensors(query=query, key=key, value=value, key_mask=key_mask)
        query, key, value = autocast(query, key, value)
        watched = [
            x
            for x in (query, key, value, planes, beta)
            if isinstance(x, torch.Tensor) and x.requires_grad
        ]
        if torch.is_grad_enabled() and watched:
            raise RuntimeError(
                "a RaceCache keeps no gradients: decode under torch.no_grad() or "
                "torch.inference_mode()"
            )
        lsh = as_hash(planes, beta)
        state = self._states.get(layer)
        if state is None:
            state = RaceState.zeros(lsh, len(key), key.shape[2], value.shape[3])
        state.check_same_hash(lsh)
        with torch_threads_or_stream(query):
            q, k, v = to_array(query), to_array(key), to_array(value)
            out = target((*query.shape[:-1], value.shape[-1]), query)
            mask = None if key_mask is None else to_array(key_mask)
            result = state.step(q, k, v, readout=readout, key_mask=mask, out=out)
        self._states[layer] = state
        self._seen[layer] = self.n_seen(layer) + key.shape[1]
        return as_tensor(result)

    def select(self, batch_indices: Any) -> None:
        """Keep the sequences at `batch_indices`, in that order, in place; repeats are legal (beam
        search).
        """
        indices = (
            batch_indices.tolist() if isinstance(batch_indices, torch.Tensor) else batch_indices
        )
        self._states = {layer: state.select(indices) for layer, state in self._states.items()}

    def copy(self) -> RaceCache:
        """Return an independent copy, to go back to."""
        other = RaceCache()
        other._states = {layer: state.copy() for layer, state in self._states.items()}
        other._seen = dict(self._seen)
        return other

    def __deepcopy__(self, memo: Any) -> RaceCache:
        # layers are keys by identity: copies of them would find nothing here
        return self.copy()

    def __reduce__(self) -> Any:
        raise TypeError(
            "a RaceCache is not pickled, as it knows layers by identity; save its `states`, each "
            "by RaceState.save"
        )

    def reset(self) -> None:
        """Forget everything."""
        self._states, self._seen = {}, {}
