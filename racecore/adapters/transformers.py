"""RACE attention in models of Hugging Face transformers.

>>> import racecore.adapters.transformers as race
>>> race.register()
>>> model = LlamaForCausalLM(LlamaConfig(..., attn_implementation="race"))

trains and generates; every layer has the same fixed hash. `convert` gives some or all layers of a
model a separate hash, with a learned beta, in the model's state dict. For decoding in constant
memory pass ``cache=race.new_cache(model)`` to ``model.generate`` or to the model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from racecore.adapters.torch.cache import RaceCache
from racecore.adapters.torch.function import race_attention
from racecore.adapters.torch.module import add_hash
from racecore.soft_lsh import SoftLSH

__all__ = ["RaceHash", "RaceLayer", "convert", "new_cache", "register"]

NAME = "race"
_names: set[str] = set()  # registered for configurations
# attribute of a tensor of keys: the layer of the cache that `update` was called on
_LAYER_OF_KEY = "_race_layer"


class RaceHash(nn.Module):
    """The hash of one layer: `planes` and `beta`, in the model's state dict."""

    planes: torch.Tensor
    beta: torch.Tensor

    def __init__(self, lsh: SoftLSH, readout: str, learn_beta: bool, learn_planes: bool) -> None:
        super().__init__()
        self.readout = readout
        add_hash(
            self,
            lsh,
            learn_beta=learn_beta,
            learn_planes=learn_planes,
            device=torch.device("cpu"),
            dtype=torch.float32,
        )


def register(
    name: str = NAME,
    *,
    n_tables: int = 4,
    n_planes: int = 4,
    beta: float = 1.0,
    readout: str = "ratio",
    rng: Any = 0,
) -> None:
    """Make ``attn_implementation=name`` mean RACE attention.

    Parameters
    ----------
    name : str
        Its name in configurations.
    n_tables, n_planes, beta
        Of the fixed hash of layers that `convert` has not given one; see
        `racecore.SoftLSH.random`.
    readout : {"ratio", "bucket_mean"}
        See `racecore.attention`.
    rng : int, or as for `numpy.random.default_rng`
        Draws its planes.
    """

    @torch.compiler.disable(
        reason="layers of one fixed hash are not compiled: convert the model, then compile it"
    )
    @lru_cache
    def default_hash(head_dim: int) -> RaceHash:
        """Return the hash of all layers of this width that `convert` has not given one."""
        lsh = SoftLSH.random(head_dim, n_tables, n_planes, beta, rng)
        # the first call may be under inference mode, and the hash is kept for all calls
        with torch.inference_mode(False):
            return RaceHash(lsh, readout, learn_beta=False, learn_planes=False)

    def attend(
        module: Any, query: torch.Tensor, *others: Any, **options: Any
    ) -> tuple[torch.Tensor, None]:
        """Attend with the hash of the layer, or the one of its width."""
        layer_hash = getattr(module, "race", None)
        return _attend(
            layer_hash or default_hash(query.shape[-1]), module, query, *others, **options
        )

    _names.add(name)
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, _mask)


def convert(
    model: nn.Module,
    layers: Iterable[int] | None = None,
    *,
    n_tables: int = 4,
    n_planes: int = 4,
    beta: float = 1.0,
    learn_beta: bool = True,
    learn_planes: bool = False,
    readout: str = "ratio",
    rng: int = 0,
) -> list[int]:
    """Give layers of a model RACE attention, each with a separate hash, in place.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Its other weights stay. Convert before loading a state dict that was saved after converting.
    layers : iterable of int, optional
        Numbers of the layers; None means all.
    n_tables, n_planes, beta, learn_beta, learn_planes, readout
        See `racecore.adapters.torch.RaceAttention`.
    rng : int
        Layer i draws its planes from the seed (rng, i).

    Returns
    -------
    list of int
        The layers that were converted.

    Raises
    ------
    ValueError
        The model has no attention layers that transformers can switch, or not the named ones, or
        they have been converted already; or several have one number, as in models of an encoder and
        a decoder.
    """
    if NAME not in _names:
        register()
    found = _attention_layers(model)
    wanted = sorted(found) if layers is None else sorted(set(layers))
    if not found or not set(wanted) <= set(found):
        raise ValueError(
            f"the model has attention layers {sorted(found)} that can be switched, got layers = "
            f"{wanted}"
        )
    if already := [index for index in wanted if hasattr(found[index], "race")]:
        raise ValueError(
            f"layers {already} have RACE attention already; converting again would lose their hash"
        )
    for index in wanted:
        module = found[index]
        weight = next(module.parameters())
        lsh = SoftLSH.random(module.head_dim, n_tables, n_planes, beta, [rng, index])
        module.race = RaceHash(lsh, readout, learn_beta, learn_planes).to(weight.device)
        module.config = copy.copy(module.config)
        module.config._attn_implementation = NAME
    return wanted


def new_cache(model: nn.Module) -> Cache:
    """Make a cache for decoding: states for layers of RACE attention, keys and values for others.

    Pass it as `cache` to ``model.generate``, or to the model step by step.
    """
    layers = _attention_layers(model)
    return Cache(
        [RaceLayer() if _is_race(layers[index]) else DynamicLayer() for index in sorted(layers)]
    )


class RaceLayer(CacheLayerMixin):
    """A layer of a transformers cache for RACE attention: a `RaceCache` of one layer.

    `update` cannot add to it, since queries must see the past before the update. It marks the
    tensor of keys instead, and the layer's attention function finds the mark.
    """

    is_sliding = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.race = RaceCache()
        self._waits = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Do nothing: the first tokens make the state."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return new keys and values [B, G, T, dim] unchanged."""
        if self._waits:
            raise RuntimeError(
                "a layer took keys to another attention than RACE's, which does not know the "
                "past: make the cache with "
                "racecore.adapters.transformers.new_cache after the layers have got their attention"
            )
        self._waits = self.is_initialized = True
        # a separate tensor object, to set the attribute on
        key_states = key_states.view_as(key_states)
        setattr(key_states, _LAYER_OF_KEY, self)
        return key_states, value_states

    def attend(
        self, *tensors: torch.Tensor, readout: str, key_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Do `RaceCache.attend` for query, key, value, planes and beta."""
        self._waits = False
        return self.race.attend(0, *tensors, readout=readout, key_mask=key_mask)

    def get_seq_length(self) -> int:
        """Return the tokens seen, padding included."""
        return self.race.n_seen(0)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of tokens of a mask, and the first of them."""
        return self.race.n_seen(0) + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: there is none."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.race.reset()
        self._waits = self.is_initialized = False

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Keep the sequences at these indices."""
        self.race.select(beam_idx)

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        for state in self.race.states:
            self.race.select(torch.arange(state.batch).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse: tokens cannot be taken out of a sum."""
        if tokens_to_remove:
            raise NotImplementedError(
                "tokens cannot be taken out of a state of RACE attention; copy.deepcopy the cache "
                "before tokens that may have to "
                "be taken back, and go on from there"
            )


def _is_race(module: Any) -> bool:
    return hasattr(module, "race") or module.config._attn_implementation in _names


def _attention_layers(model: nn.Module) -> dict[int, Any]:
    """Return the modules with an attention function of transformers, by layer number."""
    needed = ("layer_idx", "config", "head_dim", "is_causal")
    modules: list[Any] = [
        module for module in model.modules() if all(hasattr(module, name) for name in needed)
    ]
    numbers = [module.layer_idx for module in modules]
    if None in numbers or len(set(numbers)) < len(numbers):
        raise ValueError(
            f"layers need different numbers, and those of this model are {numbers}: "
            "models of an encoder and a decoder are not supported"
        )
    return dict(zip(numbers, modules, strict=True))


def _attend(
    hash_of_layer: RaceHash,
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Return attention as transformers expects it: [B, Tq, H, dim], and no weights.

    The query is [B, H, Tq, D], key and value are [B, G, Tk, dim]. `scaling` is ignored, among
    others: rows are hashed unscaled.
    """
    if dropout:
        raise ValueError(
            f"attention_dropout must be 0 with RACE attention, got {dropout}: there are no "
            "weights to drop"
        )
    causal = module.is_causal if is_causal is None else is_causal
    n_queries, n_keys = query.shape[-2], key.shape[-2]
    past: RaceLayer | None = getattr(key, _LAYER_OF_KEY, None)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    mask = _key_mask(attention_mask, n_queries, causal)
    n_seen = n_keys if past is None else past.get_seq_length() + n_keys
    if sliding_window is not None and n_seen > sliding_window:
        raise ValueError(
            f"RACE attention has no sliding window: this layer's is {sliding_window}, and there "
            f"are {n_seen} tokens by now"
        )
    if mask is None and causal and 1 < n_queries < n_keys:
        raise ValueError(
            f"{n_queries} queries came with {n_keys} keys and no mask, as from a static cache, "
            "which has capacity for more tokens: use "
            "racecore.adapters.transformers.new_cache(model), or transformers' dynamic cache"
        )
    planes, beta, readout = hash_of_layer.planes, hash_of_layer.beta, hash_of_layer.readout
    if cu_seq_lens_q is not None and (past is not None or mask is not None or n_queries != n_keys):
        raise ValueError(
            "packed sequences (cu_seq_lens_q) go without cache and padding, with as many queries "
            "as keys"
        )
    if past is not None:
        mask = None if mask is None or bool(mask[:, -n_keys:].all()) else mask[:, -n_keys:]
        return past.attend(q, k, v, planes, beta, readout=readout, key_mask=mask), None
    if causal and 1 < n_queries < n_keys:
        # new tokens after keys that the model keeps: query all of them, with zeros for the old ones
        q = torch.cat([q.new_zeros(len(q), n_keys - n_queries, *q.shape[2:]), q], dim=1)
    # a single query is the last token, which sees all keys
    causal = causal and n_queries > 1
    out = race_attention(
        q,
        k,
        v,
        planes,
        beta,
        is_causal=causal,
        readout=readout,
        key_mask=mask,
        cu_seqlens=cu_seq_lens_q,
    )
    return out[:, -n_queries:], None


def _mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any,
    attention_mask: torch.Tensor | None = None,
    device: Any = None,
    **others: Any,
) -> torch.Tensor | None:
    """Return which keys take part, bool [B, Tk], for transformers to pass on as the attention mask.

    None means all, and a query for every key.
    """
    if mask_function not in (causal_mask_function, bidirectional_mask_function):
        raise ValueError(
            "RACE attention knows causal and padding masks only; this model asks for another, "
            "such as a sliding window, "
            "several sequences in one row, or a prefix that sees itself: no single pair of tokens "
            "can be masked in a sum"
        )
    if mask_function is causal_mask_function and int(q_offset) + q_length != kv_offset + kv_length:
        raise ValueError(
            f"queries end at token {int(q_offset) + q_length} and keys at "
            f"{kv_offset + kv_length}, as in a static cache, "
            "which has capacity for more tokens: use "
            "racecore.adapters.transformers.new_cache(model), or the dynamic cache"
        )
    if attention_mask is None and q_length != kv_length:
        return torch.ones(batch_size, kv_length, dtype=torch.bool, device=device)
    if attention_mask is None or (q_length == kv_length and bool(attention_mask.all())):
        return None
    return attention_mask[:, kv_offset : kv_offset + kv_length].bool()


def _key_mask(mask: torch.Tensor | None, n_queries: int, is_causal: bool) -> torch.Tensor | None:
    """Return which keys take part, [B, Tk], from the result of `_mask` or a mask of pairs."""
    if mask is None or mask.ndim == 2:
        return mask
    # [B, Tq, Tk]; eager attention adds 0 or -inf
    pairs = (mask if mask.dtype == torch.bool else mask == 0)[:, 0]
    keys = pairs[:, -1]
    expected = keys[:, None, :].expand_as(pairs)
    if is_causal:
        n_keys = pairs.shape[-1]
        expected = expected & torch.ones_like(pairs).tril(n_keys - n_queries)
    # Versions differ in what a padding token may see, and its output is not used.
    agree = (pairs == expected).all(dim=-1) | ~keys[:, -n_queries:]
    if not bool(agree.all()):
        raise ValueError(
            "RACE attention knows causal and padding masks only, got a mask of single pairs of "
            "tokens"
        )
    return None if bool(keys.all()) else keys
