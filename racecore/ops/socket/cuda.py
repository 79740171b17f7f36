"""SOCKET on a GPU: launches of the kernels in kernels.cu (rows) and selection.cu (codes and
scores); see `reference`.

Planes, lengths and counts come from host memory, everything else is on the device. Nothing here
waits for the GPU, but for the planes of a hash at their first use.
"""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import ref

import numpy as np

from racecore.chunking import SEGMENT
from racecore.ops.cuda.call import array_fields, empty
from racecore.ops.socket.layout import (
    BLOCK_TOKENS,
    DIGIT_VALUES,
    HashedKeys,
    Scorer,
    high_bits,
    n_digits,
)
from racecore.runtime import arrays, cuda

__all__ = ["attend_dense", "attend_selected", "hash_keys", "query_tables", "scores", "select"]

_ROWS, _SELECTION = "socket/kernels.cu", "socket/selection.cu"
_KINDS = {"soft": 0, "hamming": 1, "signed_jl": 2}
_TOKENS, _TILE, _TABLES = (
    8,
    4,
    8,
)  # of a group, rows of a tile, of a task that hashes; as in warp.cuh and kernels.cu
_HEADS, _BINS, _RUN = 4, 256, 8  # as in selection.cu
_MAX_ROWS, _WAYS = 16, 8  # as in softmax.cuh and kernels.cu
_SHARED_BYTES = 48 << 10  # what a block can have without asking
_MAX_BLOCKS = 1 << 20
_ENOUGH_BLOCKS = 4096  # to keep every multiprocessor busy to the end
_SCORE_BYTES = 256 << 20  # of scores in memory while the best are picked
_PARTIAL_BYTES = 256 << 20  # of sums of shares
_WORKSPACE_BYTES = 256 << 20
_MOST_SHARES = 256  # of a sequence for a tile alone
_SHORTEST_SHARE = 64  # tokens; of lists every share, as their length is not known here


def hash_keys(
    key: np.ndarray,
    value: np.ndarray,
    planes: np.ndarray,
    scorer: Scorer,
    keys: HashedKeys,
    counts: np.ndarray,
) -> None:
    """Write bits and norms of new tokens behind those that `keys` has; its lengths stay as they
    are.
    """
    longest = int(counts.max(initial=0))
    columns = _columns(key.shape[3], value.shape[3])
    n_tasks = keys.codes.shape[0] * keys.codes.shape[1] * -(-keys.n_tables // _TABLES)
    run = min(SEGMENT, max(1, longest * n_tasks // (_ENOUGH_BLOCKS * _TOKENS)) * _TOKENS)
    n_runs = -(-longest // run)
    sequences, dtype = (
        cuda.to_device(np.stack([counts, keys.lengths], axis=1)),
        arrays.compute_dtype(key.dtype),
    )
    own_planes, plane_fields = _planes(planes, dtype, columns)
    call = cuda.structure(
        [
            *array_fields("key", key, columns),
            *array_fields("value", value, columns),
            *plane_fields,
            ("sequences", sequences.data.ptr),
            ("codes", _address(keys.codes)),
            ("norms", _address(keys.norms)),
            ("n_batch", keys.codes.shape[0]),
            ("n_kv_heads", keys.codes.shape[1]),
            ("high_bits", high_bits(keys.n_planes)),
            ("room", keys.codes.shape[2]),
            ("code_rows", keys.codes.shape[3]),
            ("value_dim", value.shape[3]),
            ("weighs_keys", scorer.weighs_keys),
            ("weighs_values", scorer.weighs_values),
            ("run", run),
            ("n_runs", n_runs),
        ]
    )
    shared = _TOKENS * _whole_tiles(_TABLES * keys.n_planes) * dtype.itemsize
    _launch(_ROWS, "hash_keys", key.dtype, columns, n_tasks * n_runs, cuda.LANES, shared, call)
    del own_planes  # until here


def query_tables(query: np.ndarray, planes: np.ndarray, scorer: Scorer) -> np.ndarray:
    """Return what every digit of a key's code is worth to a query, [B, H, L, N, 16] in the dtype of
    the arithmetic.
    """
    batch, _, n_heads, head_dim = query.shape
    n_kv_heads, n_tables, n_planes, _ = planes.shape
    columns, dtype = _columns(head_dim), arrays.compute_dtype(query.dtype)
    tables = empty((batch, n_heads, n_tables, n_digits(n_planes), DIGIT_VALUES), dtype)
    own_planes, plane_fields = _planes(planes, dtype, columns)
    rows = query.reshape(
        batch, n_heads, 1, head_dim
    )  # the heads of a group are hashed together, as tokens are
    call = cuda.structure(
        [
            *array_fields("query", rows, columns),
            *plane_fields,
            ("tables", _address(tables)),
            ("n_batch", batch),
            ("n_heads", n_heads),
            ("n_kv_heads", n_kv_heads),
            ("n_digits", n_digits(n_planes)),
            ("kind", _KINDS[scorer.kind]),
        ]
    )
    group = n_heads // n_kv_heads
    n_tasks = batch * n_kv_heads * -(-group // _TOKENS) * -(-n_tables // _TABLES)
    shared = 2 * _TOKENS * _whole_tiles(_TABLES * n_planes) * dtype.itemsize
    factor = np.float64(2 / (head_dim**0.5 * scorer.tau))
    _launch(_ROWS, "fill_tables", query.dtype, columns, n_tasks, cuda.LANES, shared, call, factor)
    del own_planes
    return tables


def scores(tables: np.ndarray, keys: HashedKeys, multiplies: bool) -> np.ndarray:
    """Return what queries think of every key, [B, H, T]: (sum over tables) * norm, and -inf behind
    the end of a sequence.
    """
    batch, n_heads = tables.shape[:2]
    longest = int(keys.lengths.max(initial=0))
    result = empty((batch, n_heads, _whole_blocks(longest)), tables.dtype)
    pairs = range(batch * keys.codes.shape[1])
    _score(tables, keys, multiplies, cuda.to_device(keys.lengths), pairs, False, result)
    return result[:, :, :longest]


def _score(
    tables: np.ndarray,
    keys: HashedKeys,
    multiplies: bool,
    lengths: Any,
    pairs: range,
    adds_heads: bool,
    out: Any,
) -> None:
    """Score all keys of some (sequence, key/value head) for the heads of their groups: rows of out
    [..., whole blocks].
    """
    n_heads, n_tables, digits = tables.shape[1:4]
    group = n_heads // keys.codes.shape[1]
    bytes_of_head = n_tables * digits * DIGIT_VALUES * tables.dtype.itemsize
    copies = min(_HEADS, group, _SHARED_BYTES // bytes_of_head)
    n_blocks = out.shape[-1] // BLOCK_TOKENS
    share = min(128, max(8, n_blocks * len(pairs) // _ENOUGH_BLOCKS))
    call = cuda.structure(
        [
            ("tables", _address(tables)),
            ("codes", _address(keys.codes)),
            ("norms", _address(keys.norms)),
            ("lengths", lengths.data.ptr),
            ("out", out.data.ptr),
            ("first_pair", pairs.start),
            ("n_pairs", len(pairs)),
            ("n_heads", n_heads),
            ("n_kv_heads", keys.codes.shape[1]),
            ("n_tables", n_tables),
            ("n_digits", digits),
            ("high_bits", high_bits(keys.n_planes)),
            ("multiplies", multiplies),
            ("room", keys.codes.shape[2]),
            ("code_rows", keys.codes.shape[3]),
            ("width", out.shape[-1]),
            ("share", share),
            ("heads_at_once", copies or _HEADS),
            ("has_copies", copies > 0),
            ("adds_heads", adds_heads),
        ]
    )
    n_tasks = len(pairs) * -(-n_blocks // share)
    _launch(_SELECTION, "score_keys", tables.dtype, 1, n_tasks, 128, copies * bytes_of_head, call)


def select(
    tables: np.ndarray,
    keys: HashedKeys,
    multiplies: bool,
    budgets: np.ndarray,
    ends: tuple[int, int],
    is_shared: bool,
) -> np.ndarray:
    """Return the tokens to attend to, int64 [B, H, W]: ascending, without duplicates, padded with
    -1 at the end.

    W is what the longest sequence can need: how many tokens are chosen twice, only the GPU knows.
    """
    batch, n_kv_heads = keys.codes.shape[:2]
    rows_per_pair = 1 if is_shared else tables.shape[1] // n_kv_heads
    sink, window = ends
    width = int(
        np.minimum(keys.lengths, np.minimum(budgets, keys.lengths) + sink + window).max(initial=0)
    )
    longest = int(keys.lengths.max(initial=0))
    selected = empty((batch * n_kv_heads * rows_per_pair, width), np.int64)
    lengths, own_budgets = cuda.to_device(keys.lengths), cuda.to_device(budgets)
    at_once = max(
        1, _SCORE_BYTES // max(1, _whole_blocks(longest) * rows_per_pair * tables.dtype.itemsize)
    )
    for start in range(0, batch * n_kv_heads if width else 0, at_once):
        pairs = range(start, min(start + at_once, batch * n_kv_heads))
        score = empty((len(pairs) * rows_per_pair, _whole_blocks(longest)), tables.dtype)
        _score(tables, keys, multiplies, lengths, pairs, is_shared, score)
        _pick(
            score,
            lengths,
            own_budgets,
            ends,
            start * rows_per_pair,
            n_kv_heads * rows_per_pair,
            selected,
        )
    return selected.reshape(batch, n_kv_heads * rows_per_pair, width)


def _pick(
    score: Any,
    lengths: Any,
    budgets: Any,
    ends: tuple[int, int],
    first_row: int,
    rows_per_sequence: int,
    selected: Any,
) -> None:
    """Write the best of scores [rows, whole blocks] to rows first_row ... of selected [all rows,
    W].
    """
    n_rows, width = score.shape
    threads = min(1024, -(-width // (_RUN * cuda.LANES)) * cuda.LANES)
    call = cuda.structure(
        [
            ("scores", score.data.ptr),
            ("lengths", lengths.data.ptr),
            ("budgets", budgets.data.ptr),
            ("selected", selected.data.ptr),
            ("first_row", first_row),
            ("n_rows", n_rows),
            ("rows_per_sequence", rows_per_sequence),
            ("width", width),
            ("sink", ends[0]),
            ("window", ends[1]),
            ("n_selected", selected.shape[1]),
        ]
    )
    shared = (_BINS + threads // cuda.LANES) * 4
    _launch(_SELECTION, "select_tokens", score.dtype, 1, n_rows, threads, shared, call)


def attend_selected(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, selected: np.ndarray, out: np.ndarray
) -> None:
    """Write exact softmax attention, scale 1/sqrt(D), of one query over selected tokens; zeros
    where there are none.
    """
    if selected.shape[2] == 0:
        out[...] = 0
        return
    lengths = np.full(len(query), selected.shape[2], np.int64)
    _attend(
        (query, key, value, out),
        lengths,
        np.full_like(lengths, _SHORTEST_SHARE),
        cuda.to_device(selected),
    )


def attend_dense(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, lengths: np.ndarray, out: np.ndarray
) -> None:
    """Write exact causal softmax attention, scale 1/sqrt(D), of the last Tq tokens of every
    sequence.
    """
    n_rows = query.shape[1] * query.shape[2] // key.shape[2]
    n_splits = max(1, _MOST_SHARES * _MAX_ROWS // max(n_rows, _MAX_ROWS))
    sizes = (
        -(-lengths // (n_splits * _SHORTEST_SHARE)) * _SHORTEST_SHARE
    )  # by the length of a sequence alone
    _attend((query, key, value, out), lengths, sizes.clip(_SHORTEST_SHARE, SEGMENT), None)


class _Attention(NamedTuple):
    """What all launches of one call share."""

    tensors: tuple[Any, ...]  # query, key, value, out
    lengths: np.ndarray  # int64 [B]: tokens of a sequence, or places in its lists
    sizes: np.ndarray  # int64 [B]: tokens of a share
    selected: Any  # int64 [B, H or G, W] on the device, or None: all tokens
    n_owners: int  # of lists, or key/value heads
    tile_rows: int
    dtype: np.dtype  # of the arithmetic

    @property
    def sharing(self) -> int:
        """Query heads that see the same tokens of the same key/value head."""
        return self.tensors[0].shape[2] // self.n_owners

    @property
    def columns(self) -> int:
        return _columns(self.tensors[0].shape[3], self.tensors[2].shape[3])

    @property
    def scratch_numbers(self) -> int:
        """Count what a block takes: queries, sums, weights of a group of tokens and factors; see
        `attend_splits`.
        """
        slab = cuda.LANES * self.columns
        wide = sum(
            -(-tensor.shape[3] // slab) * slab for tensor in (self.tensors[0], self.tensors[2])
        )
        return self.tile_rows * (wide + _TOKENS + 1)

    def n_splits(self, batches: slice, row: int) -> int:
        """Return how many shares there are of what a row of an owner sees, at most."""
        later = (
            0 if self.selected is not None else self.tensors[0].shape[1] - 1 - row // self.sharing
        )
        return max(
            1, int((-(-(self.lengths[batches] - later) // self.sizes[batches])).max(initial=0))
        )


def _attend(
    tensors: tuple[Any, ...], lengths: np.ndarray, sizes: np.ndarray, selected: Any
) -> None:
    """Attend to all tokens, or to lists, in shares of `sizes` [B]; as many rows at once as the
    memory for sums allows.
    """
    query, key, value, _ = tensors
    n_owners, dtype = (
        key.shape[2] if selected is None else selected.shape[1],
        arrays.compute_dtype(query.dtype),
    )
    batch, n_rows = len(query), query.shape[1] * query.shape[2] // n_owners
    if batch * n_rows == 0:
        return
    call = _Attention(
        tensors, lengths, sizes, selected, n_owners, _whole_tiles(min(n_rows, _MAX_ROWS)), dtype
    )
    while call.tile_rows > _TILE and call.scratch_numbers * dtype.itemsize > _SHARED_BYTES:
        call = call._replace(tile_rows=_whole_tiles(call.tile_rows // 2))
    on_device = cuda.to_device(lengths), cuda.to_device(sizes)
    bytes_of_row = (
        n_owners * call.n_splits(slice(batch), n_rows - 1) * (2 + value.shape[3]) * dtype.itemsize
    )
    row_step = max(1, _PARTIAL_BYTES // (batch * bytes_of_row * call.tile_rows)) * call.tile_rows
    batch_step = max(1, _PARTIAL_BYTES // (min(row_step, n_rows) * bytes_of_row))
    for b in range(0, batch, batch_step):
        for row in range(0, n_rows, row_step):
            batches, rows = (
                slice(b, min(b + batch_step, batch)),
                range(row, min(row + row_step, n_rows)),
            )
            _attend_rows(call, batches, rows, *on_device)


def _attend_rows(call: _Attention, batches: slice, rows: range, lengths: Any, sizes: Any) -> None:
    """Attend with some rows of every owner in some sequences."""
    query, key, value, _ = call.tensors
    n_batch, n_splits, columns = (
        batches.stop - batches.start,
        call.n_splits(batches, rows[-1]),
        call.columns,
    )
    partial = empty((n_batch, call.n_owners, len(rows), n_splits, 2 + value.shape[3]), call.dtype)
    blocks = min(n_batch * call.n_owners * -(-len(rows) // call.tile_rows) * n_splits, _MAX_BLOCKS)
    numbers, workspace = call.scratch_numbers, None
    shared = numbers * call.dtype.itemsize
    if shared > _SHARED_BYTES:
        blocks, shared = min(blocks, max(1, _WORKSPACE_BYTES // shared)), 0
        workspace = empty((blocks * numbers,), call.dtype)
    named = zip(("query", "key", "value", "out"), call.tensors, strict=True)
    record = cuda.structure(
        [
            *(field for name, tensor in named for field in array_fields(name, tensor, columns)),
            ("lengths", lengths.data.ptr),
            ("sizes", sizes.data.ptr),
            ("selected", _address(call.selected)),
            ("partial", partial.data.ptr),
            ("workspace", _address(workspace)),
            ("scratch_numbers", numbers),
            ("first_batch", batches.start),
            ("n_batch", n_batch),
            ("n_owners", call.n_owners),
            ("first_row", rows.start),
            ("n_rows", len(rows)),
            ("sharing", call.sharing),
            ("group", query.shape[2] // key.shape[2]),
            ("tile_rows", call.tile_rows),
            ("n_splits", n_splits),
            ("n_queries", query.shape[1]),
            ("width", 0 if call.selected is None else call.selected.shape[2]),
            ("head_dim", query.shape[3]),
            ("value_dim", value.shape[3]),
        ]
    )
    _launch(_ROWS, "attend_splits", query.dtype, columns, blocks, cuda.LANES, shared, record)
    threads, n_tasks = cuda.LANES * _WAYS, n_batch * call.n_owners * len(rows)
    _launch(_ROWS, "merge_splits", query.dtype, columns, n_tasks, threads, threads * 16, record)


def _columns(*widths: int) -> int:
    """Return the columns of a lane: two at least, for rows of 32 are rare here, and every number
    has to be compiled.
    """
    return 2 if max(widths) <= 2 * cuda.LANES else 4


def _address(array: Any) -> int:
    return 0 if array is None else array.data.ptr


def _launch(
    file: str,
    name: str,
    dtype: np.dtype,
    columns: int,
    n_tasks: int,
    threads: int,
    shared_bytes: int,
    *arguments: Any,
) -> None:
    """Run a kernel; its blocks share the tasks among themselves."""
    if n_tasks > 0:
        function = cuda.kernel(file, name, dtype, columns)
        function((min(n_tasks, _MAX_BLOCKS),), (threads,), arguments, shared_mem=shared_bytes)


_kept_planes: dict[tuple[Any, ...], tuple[Any, Any]] = {}


def _planes(planes: np.ndarray, dtype: np.dtype, columns: int) -> tuple[Any, list[tuple[str, int]]]:
    """Return planes [G, L, P, D] on the device, and what kernels are told of them.

    A hash gives the same array every time (`SoftLSH.per_head`): what is made of it is kept for as
    long as it lives. It may be used on another stream then, so the first use waits until it is
    there.
    """
    library = cuda.cupy()
    name = id(planes), library, library.cuda.Device().id, dtype.char, columns
    kept = _kept_planes.get(name)
    if kept is None or kept[0]() is not planes:
        wide = cuda.to_device(_padded(planes, dtype, cuda.LANES * columns))
        kept = ref(planes, lambda _: _kept_planes.pop(name, None)), wide
        if not planes.flags.writeable:
            library.cuda.get_current_stream().synchronize()
            _kept_planes[name] = kept
    _, n_tables, n_planes, head_dim = planes.shape
    fields = {
        "data": kept[1].data.ptr,
        "per_head": len(kept[1]) > 1,
        "n_tables": n_tables,
        "n_planes": n_planes,
    }
    return kept[1], [
        (f"planes.{label}", value) for label, value in (fields | {"head_dim": head_dim}).items()
    ]


def _padded(planes: np.ndarray, dtype: np.dtype, slab: int) -> np.ndarray:
    """Return planes [G, L, P, D] as [G or 1, L*P, D], rows padded with zeros to whole slabs, their
    number to whole tiles.
    """
    own = planes[:1] if planes.strides[0] == 0 else planes  # heads share them
    heads, n_tables, n_planes, head_dim = own.shape
    wide = np.zeros((heads, _whole_tiles(n_tables * n_planes), -(-head_dim // slab) * slab), dtype)
    wide[:, : n_tables * n_planes, :head_dim] = own.reshape(heads, -1, head_dim)
    return wide


def _whole_tiles(n_rows: int) -> int:
    return -(-n_rows // _TILE) * _TILE


def _whole_blocks(n_tokens: int) -> int:
    return -(-n_tokens // BLOCK_TOKENS) * BLOCK_TOKENS
