"""Addresses of the keys and values that decode attention reads, and how they lie in memory.

Every tile has slots of 64 key addresses and 64 value addresses, int64 [tiles, SLOTS, 2, 64]::

    |<------------------------ tile 0 ------------------------>|<--------- tile 1 ...
    |   FIRST_BLOCK    |  PARTIAL_BLOCK   |     PREFETCH       |   FIRST_BLOCK    |
    |  keys  | values  |  keys  | values  |  keys   | values   |  keys  | values  |
      64 x 8   64 x 8 bytes

    all tokens of the cache; the tiles are neighbouring heads:
      FIRST_BLOCK     rows of tokens 0 ... 63. Every block looks alike: the block that begins with
                      token t adds t * (bytes from a token to the next) to these addresses
      PARTIAL_BLOCK   rows of the last block if it has less than 64 tokens
      PREFETCH        rows in the order of memory, token by token those of all heads: tile j
                      prefetches the j-th part of it, moved on to the next block

    selected tokens; there is one tile:
      EVEN_BLOCK      the first two slots: one holds the rows of this block, the other those of the
      ODD_BLOCK       next one, which are prefetched, in turns

Addresses are int64. In one expression with an unsigned number, as the address of an array is,
Numba would make them float64.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from racecore.ops.cpu.row_io import (
    KEY,
    VALUE,
    first_row,
    is_bfloat16,
    prefetch_row,
    row_bytes,
    write_row_addresses,
)
from racecore.ops.simd.vectors import load_number
from racecore.runtime.jit import helper

__all__ = [
    "GATHER_BLOCK",
    "SLOTS",
    "AddressSlot",
    "CacheRows",
    "cache_rows",
    "fill_dense_slots",
    "fill_partial_block",
    "fill_selected",
    "first_block",
    "prefetch_order",
    "prefetch_slot",
    "selected_block",
    "signed_address",
]

# Tokens of a block: twice those of other kernels, as nothing is copied and every block has a cost
# beside its products. At 32 that took a seventh of dense attention, at 64 half as much.
GATHER_BLOCK = np.int64(64)
SLOTS = 3  # of a tile
# Not literals: Numba would compile functions once for each.
_FIRST_BLOCK, _PARTIAL_BLOCK, _PREFETCH = np.int64(0), np.int64(1), np.int64(2)
_EVEN_BLOCK = _FIRST_BLOCK  # and the odd one behind it
_ADDRESS_BYTES = 8
_KEY_SLOT_BYTES = _ADDRESS_BYTES * int(GATHER_BLOCK)  # the values follow
_SLOT_BYTES = 2 * _KEY_SLOT_BYTES
_TILE_0 = np.int64(0)
_NO_OFFSET = np.int64(0)
_CONSECUTIVE = np.int64(0)  # in place of the address of selected tokens


class CacheRows(NamedTuple):
    """Addresses of keys and values in the cache; where tiles differ, those of the first tile."""

    slots: int  # address of row addresses [tiles, SLOTS, 2, 64]
    selected: int  # address of the selected tokens, int64; 0: all tokens
    first_key: int  # address of token 0
    first_value: int
    key_step: int  # bytes from a token to the next
    value_step: int
    key_bytes: int  # of a row
    value_bytes: int
    is_bfloat16: bool


class AddressSlot(NamedTuple):
    """One slot of row addresses: the keys and values of a block."""

    keys: int  # address of 64 addresses
    key_offset: int  # bytes to add to each of them
    values: int
    value_offset: int


@helper
def cache_rows(
    table: np.ndarray,
    tile_heads: np.ndarray,
    selected: np.ndarray,
    widths: tuple[int, int],
    row_addresses: np.ndarray,
) -> CacheRows:
    """Return the addresses of keys and values for the first tile.

    tile_heads [tiles, 3] holds the sequence, row of `selected` and key/value head of each tile;
    selected [B, ., W] has W = 0 for all tokens; widths = (D, V).
    """
    b, row, g = tile_heads[0]
    size = 2 if is_bfloat16(table, KEY) else 4
    return CacheRows(
        slots=signed_address(row_addresses),
        selected=signed_address(selected[b, row]) if selected.shape[2] > 0 else 0,
        first_key=first_row(table, KEY, b, g),
        first_value=first_row(table, VALUE, b, g),
        key_step=row_bytes(table, KEY),
        value_step=row_bytes(table, VALUE),
        key_bytes=size * widths[0],
        value_bytes=size * widths[1],
        is_bfloat16=is_bfloat16(table, KEY),
    )


@helper
def signed_address(x: np.ndarray) -> np.int64:
    """Return the address of an array, signed like all others."""
    return np.int64(x.ctypes.data)


@helper
def _slot(cache: CacheRows, tile: int, slot: int, token: int) -> AddressSlot:
    """Return a slot of a tile, moved on by so many tokens."""
    keys = cache.slots + (SLOTS * tile + slot) * _SLOT_BYTES
    values = keys + _KEY_SLOT_BYTES
    return AddressSlot(keys, cache.key_step * token, values, cache.value_step * token)


# All tokens of the cache
# -------------------------------------------------------------------------------------------------


@helper
def first_block(cache: CacheRows, tile: int, token: int) -> AddressSlot:
    """Return the rows of the block of 64 tokens that begins with a token."""
    return _slot(cache, tile, _FIRST_BLOCK, token)


@helper
def prefetch_order(cache: CacheRows, tile: int, token: int) -> AddressSlot:
    """Return the rows that a tile prefetches of the block that begins with a token."""
    return _slot(cache, tile, _PREFETCH, token)


@helper
def fill_dense_slots(
    table: np.ndarray, tile_heads: np.ndarray, cache: CacheRows, row_addresses: np.ndarray
) -> None:
    """Write the slots FIRST_BLOCK and PREFETCH of all tiles."""
    n_tiles = tile_heads.shape[0]
    for j in range(n_tiles):
        key = first_row(table, KEY, tile_heads[j, 0], tile_heads[j, 2])
        value = first_row(table, VALUE, tile_heads[j, 0], tile_heads[j, 2])
        _fill_consecutive(cache, key, value, GATHER_BLOCK, first_block(cache, j, _NO_OFFSET))
    # processors predict how a sequence of addresses goes on if it is that of memory
    for side in range(2):  # keys, values
        for i in range(n_tiles * GATHER_BLOCK):
            row = row_addresses[i % n_tiles, _FIRST_BLOCK, side, i // n_tiles]
            row_addresses[i // GATHER_BLOCK, _PREFETCH, side, i % GATHER_BLOCK] = row


@helper
def fill_partial_block(cache: CacheRows, tile: int, token: int, n: int) -> AddressSlot:
    """Write the rows of the last n < 64 tokens of a tile, from a token on; return the slot.

    The last row is repeated up to 64, since there may be no memory behind it.
    """
    whole = first_block(cache, tile, token)
    key = load_number(whole.keys, np.int64(0)) + whole.key_offset
    value = load_number(whole.values, np.int64(0)) + whole.value_offset
    slot = _slot(cache, tile, _PARTIAL_BLOCK, _NO_OFFSET)
    _fill_consecutive(cache, key, value, n, slot)
    return slot


@helper
def _fill_consecutive(cache: CacheRows, key: int, value: int, n: int, slot: AddressSlot) -> None:
    """Write the rows of n consecutive tokens, given the addresses of the first key and value."""
    write_row_addresses(key, cache.key_step, _CONSECUTIVE, n, GATHER_BLOCK, slot.keys)
    write_row_addresses(value, cache.value_step, _CONSECUTIVE, n, GATHER_BLOCK, slot.values)


# Selected tokens
# -------------------------------------------------------------------------------------------------


@helper
def selected_block(cache: CacheRows, index: int) -> AddressSlot:
    """Return the slot for a block of selected tokens: the even one or the odd one."""
    return _slot(cache, _TILE_0, _EVEN_BLOCK + index % 2, _NO_OFFSET)


@helper
def fill_selected(cache: CacheRows, position: int, n: int, slot: AddressSlot) -> None:
    """Write the rows of the selected tokens at positions position ... position + n - 1."""
    tokens = cache.selected + _ADDRESS_BYTES * position
    write_row_addresses(cache.first_key, cache.key_step, tokens, n, GATHER_BLOCK, slot.keys)
    write_row_addresses(cache.first_value, cache.value_step, tokens, n, GATHER_BLOCK, slot.values)


@helper
def prefetch_slot(cache: CacheRows, slot: AddressSlot) -> None:
    """Prefetch all rows of a slot at once."""
    for i in range(GATHER_BLOCK):
        offset = _ADDRESS_BYTES * i
        prefetch_row(load_number(slot.keys + offset, np.int64(0)), cache.key_bytes)
        prefetch_row(load_number(slot.values + offset, np.int64(0)), cache.value_bytes)
