// Exact softmax attention (online softmax) over all tokens of a sequence or over selected ones, in
// splits of up to 1,024 tokens.
//
// A tile has up to MAX_ROWS rows: the queries of heads that see the same keys, so keys and values
// are read once for all of them. For each row a split yields the largest logit (its peak), the sum
// of the weights relative to it, and the weighted sum of values. `merge_splits` of kernels.cu adds
// the splits in float64. Thread mapping as in cuda/warp.cuh; launched by
// racecore/ops/socket/attend/cuda.py.
#pragma once

#include "cuda/warp.cuh"

constexpr int MAX_ROWS = 16;
constexpr int TILES = MAX_ROWS / ROWS;

// Every field has eight bytes: racecore/ops/socket/attend/cuda.py writes the same structure.
struct AttendCall {
    Array query, key, value, out;
    const i64* lengths;       // [B]: tokens of a sequence, or of its selection
    const i64* split_tokens;  // [B]: tokens of a split, at most
    const i64* selected;      // [B, n_head_groups, width]; null: all tokens
    // [n_batch, n_head_groups, n_rows, n_splits, 2 + V]: peak, weight, weighted values
    Real* partial;
    // Scratch of all blocks if shared memory is too small, else null.
    Real* workspace;
    i64 scratch_numbers;  // of one block
    // A head group: query heads with one selection, or all those of a key/value head.
    i64 first_batch, n_batch, n_head_groups;
    i64 first_row, n_rows;  // of the Tq * heads_per_group rows of a head group
    i64 heads_per_group;    // query heads of a head group
    i64 heads_per_key;      // query heads of a key/value head
    i64 tile_rows, n_splits, n_queries, width, head_dim, value_dim;
};

// Rows of a head group and a split of the tokens that they see. Row r is query r /
// heads_per_group, head r % heads_per_group.
struct Tile {
    i64 b, first_row, begin, end;
    i64 n_visible;        // tokens visible to the first row, which sees the fewest
    const i64* gathered;  // selected tokens; null: all tokens
    int head_group, g, n_rows, padded_rows;
};

__device__ inline i64 n_visible(const AttendCall& call, i64 b, i64 row) {
    i64 length = call.lengths[b];
    return call.selected != nullptr ? length
                                    : length - call.n_queries + row / call.heads_per_group + 1;
}

__device__ inline Tile tile_of(
    const AttendCall& call, i64 batch_head_group, i64 number, i64 split
) {
    Tile tile;
    tile.b = call.first_batch + batch_head_group / call.n_head_groups;
    tile.head_group = (int)(batch_head_group % call.n_head_groups);
    tile.g = (int)(tile.head_group * call.heads_per_group / call.heads_per_key);
    tile.first_row = call.first_row + number * call.tile_rows;
    i64 left = call.n_rows - number * call.tile_rows;
    tile.n_rows = (int)(left < call.tile_rows ? left : call.tile_rows);
    tile.padded_rows = round_up(tile.n_rows, ROWS);
    tile.n_visible = n_visible(call, tile.b, tile.first_row);
    tile.gathered =
        call.selected == nullptr
            ? nullptr
            : call.selected + (tile.b * call.n_head_groups + tile.head_group) * call.width;
    i64 end = n_visible(call, tile.b, tile.first_row + tile.n_rows - 1);
    i64 size = call.split_tokens[tile.b];
    tile.begin = split * size;
    tile.end = tile.begin + size < end ? tile.begin + size : end;
    return tile;
}

__device__ inline Rows query_row(
    const AttendCall& call, const Array& array, const Tile& tile, int r, int width
) {
    i64 row = tile.first_row + r;
    int head = (int)(tile.head_group * call.heads_per_group + row % call.heads_per_group);
    return rows_of(array, Group{tile.b, row / call.heads_per_group, 1, 1}, head, width);
}

// q [rows, D] = queries of a tile times 1/sqrt(D). A lane writes the columns that it reads in
// every product, so no barrier is needed.
__device__ inline void load_queries(const AttendCall& call, const Tile& tile, const Matrix& q) {
    Real scale = (Real)(1 / sqrt((double)call.head_dim));
    for (int r = 0; r < q.n_rows; ++r) {
        for (int column = lane_id() * COLUMNS; column < q.width; column += SLAB) {
            Real x[COLUMNS] = {};
            if (r < tile.n_rows)
                load_row(query_row(call, call.query, tile, r, (int)call.head_dim), 0, column, x);
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c) q.data[(i64)r * q.width + column + c] = x[c] * scale;
        }
    }
}

// Tokens t ... t + 7 of a sequence, or those at these positions of its selection.
struct Tokens {
    i64 b, t, token[TOKENS];
    int g;
    unsigned kept;  // bit i: the i-th one exists
};

__device__ inline Tokens tokens_at(const Tile& tile, i64 t) {
    Tokens tokens = {tile.b, t, {}, tile.g, 0};
#pragma unroll
    for (int i = 0; i < TOKENS; ++i) {
        tokens.token[i] = t + i >= tile.end          ? -1
                          : tile.gathered != nullptr ? tile.gathered[t + i]
                                                     : t + i;
        if (tokens.token[i] >= 0) tokens.kept |= 1u << i;
    }
    return tokens;
}

__device__ inline void load_tokens(
    const Array& array, const Tokens& tokens, int width, int column, Real (&x)[TOKENS][COLUMNS]
) {
#pragma unroll
    for (int i = 0; i < TOKENS; ++i)
        load_row(
            rows_of(
                array, Group{tokens.b, tokens.token[i], 1, tokens.kept >> i & 1}, tokens.g, width
            ),
            0, column, x[i]
        );
}

// c[token][row] = <query of the row, key of the token>. Each lane writes its own numbers, see
// `add_lane_total`.
__device__ inline void dot_keys(
    const AttendCall& call, const Tokens& tokens, const Matrix& q, Real* c
) {
    for (int slab = 0; slab < q.width; slab += SLAB) {
        int column = slab + lane_id() * COLUMNS;
        Real keys[TOKENS][COLUMNS];
        load_tokens(call.key, tokens, (int)call.head_dim, column, keys);
        project_slab(q, keys, column, slab == 0, c);
    }
}

__device__ inline Real minus_infinity() {
    union {
        unsigned bits;
        float value;
    } number = {0xff800000};
    return number.value;
}

// Online softmax state of a lane, for row lane % ROWS of every tile of ROWS rows.
struct LaneRows {
    Real peak[TILES], weight[TILES];  // weights of the lane's own tokens
    i64 n_visible[TILES];
};

__device__ inline LaneRows new_lane_rows(const AttendCall& call, const Tile& tile) {
    LaneRows lane;
#pragma unroll
    for (int k = 0; k < TILES; ++k) {
        lane.peak[k] = minus_infinity();
        lane.weight[k] = 0;
        lane.n_visible[k] = n_visible(call, tile.b, tile.first_row + k * ROWS + lane_id() % ROWS);
    }
    return lane;
}

// Turn logits c[token][row] into weights relative to the peak so far. factors[row] rescales the
// sums of earlier tokens to the new peak.
__device__ inline void weigh(
    const Tile& tile, const Tokens& tokens, Real* c, Real* factors, LaneRows& lane
) {
    int i = lane_id() / ROWS;
#pragma unroll
    for (int k = 0; k < TILES; ++k) {
        if (k * ROWS >= tile.padded_rows) continue;
        int row = k * ROWS + lane_id() % ROWS;
        Real* target = c + i * tile.padded_rows + row;
        bool is_visible = (tokens.kept >> i & 1) && tokens.t + i < lane.n_visible[k];
        Real logit = is_visible ? *target : minus_infinity();
        Real top = logit > lane.peak[k] ? logit : lane.peak[k];
#pragma unroll
        for (int step = ROWS; step < LANES; step *= 2) {
            Real other = __shfl_xor_sync(~0u, top, step);
            top = other > top ? other : top;
        }
        Real factor = top == lane.peak[k] ? 1 : power_of_e(lane.peak[k] - top);
        Real weight = is_visible ? power_of_e(logit - top) : 0;
        lane.weight[k] = lane.weight[k] * factor + weight;
        lane.peak[k] = top;
        *target = weight;
        if (i == 0) factors[row] = factor;
    }
}

// row of sums = row * factor + sum over tokens of c[token][row] * value of the token. Values of
// invisible tokens are skipped, not multiplied by zero: they may be NaN.
__device__ inline void add_values(
    const AttendCall& call, const Tile& tile, const Tokens& tokens, const Real* c,
    const Real* factors, const Matrix& sums
) {
    bool is_whole = call.n_queries == 1 || tokens.t + TOKENS <= tile.n_visible;
    for (int slab = 0; slab < sums.width; slab += SLAB) {
        int column = slab + lane_id() * COLUMNS;
        Real values[TOKENS][COLUMNS];
        load_tokens(call.value, tokens, (int)call.value_dim, column, values);
        for (int row = 0; row < sums.n_rows; row += ROWS) {
            Real a[ROWS][COLUMNS];
            i64 visible[ROWS];
            load_tile(sums, row, column, a);
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                visible[r] = is_whole
                                 ? TOKENS
                                 : n_visible(call, tile.b, tile.first_row + row + r) - tokens.t;
#pragma unroll
                for (int d = 0; d < COLUMNS; ++d) a[r][d] *= factors[row + r];
            }
#pragma unroll
            for (int i = 0; i < TOKENS; ++i) {
                Four weights = coefficients(c, sums.n_rows, i, row);
#pragma unroll
                for (int r = 0; r < ROWS; ++r)
                    if (i < visible[r]) add_multiple(weights.x[r], values[i], a[r]);
            }
            store_tile(sums, row, column, a);
        }
    }
}
