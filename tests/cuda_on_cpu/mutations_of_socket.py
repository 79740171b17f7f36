"""Mutations of SOCKET's kernels; see `mutations`.

Not included, because they change the time only: the test of `length` in `score_block` and the run
in `hash_keys`.
"""

from __future__ import annotations

__all__ = ["SOCKET_BOUNDS", "SOCKET_TERMS"]

_ROWS, _SOFTMAX, _SELECTION = "socket/kernels.cu", "socket/softmax.cuh", "socket/selection.cu"

SOCKET_BOUNDS = (
    (_ROWS, "(int)(left < TABLES ? left : TABLES)", "TABLES"),
    (_ROWS, "if (i >= n) continue;", ""),
    (_ROWS, "if (table < n_tables)\n                    byte |=", "byte |="),
    (_ROWS, "int n = (int)(end - t < TOKENS ? end - t : TOKENS);", "int n = TOKENS;"),
    (_ROWS, "int n = (int)(left < TOKENS ? left : TOKENS);", "int n = TOKENS;"),
    (
        _ROWS,
        "if (lane_id() >= ROWS || row >= tile.n_rows) continue;",
        "if (lane_id() >= ROWS) continue;",
    ),
    (_ROWS, "d < column + COLUMNS && d < call.value_dim", "d < column + COLUMNS"),
    (_ROWS, "if (d < call.value_dim) value +=", "value +="),
    (_ROWS, "if (warp == 0 && d < call.value_dim)", "if (warp == 0)"),
    (_SOFTMAX, "(int)(left < call.tile_rows ? left : call.tile_rows)", "(int)call.tile_rows"),
    (_SOFTMAX, "tile.begin + size < end ? tile.begin + size : end", "tile.begin + size"),
    (_SOFTMAX, "tile.begin + size < end ? tile.begin + size : end", "end"),
    (_SOFTMAX, "if (r < tile.n_rows)\n                load_row", "load_row"),
    (_SOFTMAX, "t + i >= tile.end          ? -1\n                          : ", ""),
    (_SOFTMAX, "if (tokens.token[i] >= 0) tokens", "tokens"),
    (_SOFTMAX, "(tokens.kept >> i & 1) && tokens.t", "tokens.t"),
    (_SOFTMAX, " && tokens.t + i < lane.n_visible[k]", ""),
    (_SOFTMAX, "if (i < visible[r]) add_multiple", "add_multiple"),
    (
        _SELECTION,
        "            if (h >= n) continue;\n            const Real* entries",
        "            const Real* entries",
    ),
    (_SELECTION, "        if (h >= n) continue;\n        i64 out_row", "        i64 out_row"),
    (
        _SELECTION,
        "t + i < length ? product(totals[h][i], norms[i]) : -infinity.value",
        "product(totals[h][i], norms[i])",
    ),
    (
        _SELECTION,
        "first + call.blocks_per_task < n_blocks ? first + call.blocks_per_task : n_blocks",
        "first + call.blocks_per_task",
    ),
    (
        _SELECTION,
        "(int)(group - head < call.heads_at_once ? group - head : call.heads_at_once)",
        "(int)call.heads_at_once",
    ),
    (_SELECTION, "(int)(n - first < n_loaded ? n - first : n_loaded)", "n_loaded"),
    (_SELECTION, "if (position < left)\n                quads", "quads"),
    (_SELECTION, "if (j / 4 * step + (int)threadIdx.x * 4 + j % 4 >= left) continue;", ""),
    (_SELECTION, "if (i % 4 == 0 && begin + i < n)\n                quad", "if (i % 4 == 0) quad"),
    (
        _SELECTION,
        "if (begin + i < n_sink || begin + i >= end) chosen",
        "if (begin + i >= end) chosen",
    ),
    (
        _SELECTION,
        "if (begin + i < n_sink || begin + i >= end) chosen",
        "if (begin + i < n_sink) chosen",
    ),
    (
        _SELECTION,
        "call.budgets[sequence] < n ? call.budgets[sequence] : n",
        "call.budgets[sequence] + 1",
    ),
)
SOCKET_TERMS = (
    (_ROWS, "row = (planes.per_head ? g * all : 0) + chunk", "row = chunk"),
    (_ROWS, "n_planes - 1 - first - i", "first + i"),
    (_ROWS, "<< k * high", "<< k"),
    (_ROWS, "chunk * high + row - n_tables", "row - n_tables"),
    (_ROWS, "sum += __shfl_xor_sync(~0u, sum, step)", "sum += 0"),
    (_ROWS, "+ (number.bits >> 13 & 1)", ""),
    (_ROWS, "bits < 0 ? 0 : ", ""),
    (_ROWS, "if (call.weighs_keys) norm *= norm_of(k, i);", ""),
    (_ROWS, "if (call.weighs_values) norm *= norm_of(v, i);", ""),
    (_ROWS, "call.sequences[2 * b + 1] + t", "t"),
    (_ROWS, "one = y < 0 ? e * large : large;", "one = large;"),
    (_ROWS, "zero = y < 0 ? large : e * large;", "zero = large;"),
    (_ROWS, ": -u;", ": u;"),
    (
        _ROWS,
        "product = call.kind == SOFT ? product * entry : product + entry",
        "product = product * entry",
    ),
    (_ROWS, "lane.weight[k] += __shfl_xor_sync(~0u, lane.weight[k], other)", "lane.weight[k] += 0"),
    (_ROWS, "if (part[1] == 0) continue;", ""),
    (_ROWS, "double factor = power_of_e(part[0] - top);", "double factor = 1;"),
    (_ROWS, "top = other > top ? other : top;", ""),
    (_ROWS, "other < MERGE_WARPS && warp == 0", "other < MERGE_WARPS - 1 && warp == 0"),
    (_ROWS, "weight != 0 ? value / weight : 0", "value / weight"),
    (_SOFTMAX, "length - call.n_queries + row / call.heads_per_group + 1", "length"),
    (_SOFTMAX, "x[c] * scale", "x[c]"),
    (_SOFTMAX, "top = other > top ? other : top;", ""),
    (_SOFTMAX, "lane.weight[k] * factor + weight", "lane.weight[k] + weight"),
    (_SOFTMAX, "if (i == 0) factors[row] = factor;", "if (i == 0) factors[row] = 1;"),
    (_SOFTMAX, "a[r][d] *= factors[row + r];", ""),
    (_SELECTION, "code[0] |= (above & 0xff) >> bit % 8 << 8;", ""),
    (_SELECTION, "code[1] |= above >> 8 >> bit % 8 << 8;", ""),
    (_SELECTION, "MULTIPLIES ? value * entry : value + entry", "worth * entry"),
    (_SELECTION, "if (call.adds_heads && h == 0 && first_head > 0) sum = *target;", ""),
    (_SELECTION, "norm == 0 ? 0u : ", ""),
    (_SELECTION, "if (size == 0) return SIGN;", ""),
    (_SELECTION, "if (size > INFINITE) return SIGN | INFINITE;", ""),
    (_SELECTION, "number.bits & SIGN ? ~number.bits : number.bits | SIGN", "number.bits | SIGN"),
    (_SELECTION, "key >> (shift + 8) != threshold >> (shift + 8)", "false"),
    (_SELECTION, "if (lane_of_warp() & step) before += other;", "before += other;"),
    (
        _SELECTION,
        "if (warp < warp_of_block()) before += warp_sums[warp];",
        "before += warp_sums[warp];",
    ),
    (
        _SELECTION,
        "left = (unsigned)(threshold.n_equal - above);",
        "left = (unsigned)threshold.n_equal;",
    ),
    (_SELECTION, "if (budget == 0) return Threshold{~(Key)0, 0};", ""),
    (_SELECTION, "rank++ < threshold.n_equal", "true"),
    (_SELECTION, "n_equal += total;", ""),
    (_SELECTION, "n_chosen += total;", ""),
    (_SELECTION, "selected[t] = t;", ""),
    (_SELECTION, "selected[end + t] = t;", ""),
)
