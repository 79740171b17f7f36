// Exact softmax attention over a run of tokens or a list of them, in shares of up to 1,024 tokens.
//
// A tile is up to MAX_ROWS rows: the queries of some heads that see the same keys, so keys and values are read once for all
// of them. Of every row a share keeps the largest logit (its peak), the sum of weights relative to that, and the weighted
// sum of values; `join_shares` adds shares up in float64.
#pragma once

#include "cuda/warp.cuh"

constexpr int MAX_ROWS = 16;
constexpr int TILES = MAX_ROWS / ROWS;

// Eight bytes each: racecore.ops.socket.cuda builds the same structure.
struct Attention {
    Array query, key, value, out;
    const i64* lengths;   // [B]: tokens of a sequence, or places in its lists
    const i64* sizes;     // [B]: tokens of a share, at most
    const i64* selected;  // [B, n_owners, width]; null: all tokens
    Real* partial;        // [n_batch, n_owners, n_rows, n_shares, 2 + V]: peak, weight, weighted values
    Real* workspace;      // scratch of all blocks where shared memory is too small, else null
    i64 scratch_numbers;  // of a block
    i64 first_batch, n_batch, n_owners;  // of lists, or key/value heads
    i64 first_row, n_rows;               // of the Tq * sharing rows of an owner
    i64 sharing;                         // query heads of an owner
    i64 group;                           // query heads of a key/value head
    i64 tile_rows, n_shares, n_queries, width, head_dim, value_dim;
};

// Rows of an owner, of which row r is query r / sharing, head r % sharing; and a share of the tokens that they see.
struct Tile {
    i64 b, first_row, begin, end;
    i64 seen;         // by the first row, which sees the fewest
    const i64* list;  // null: all tokens
    int owner, g, n_rows, wide_rows;
};

__device__ inline i64 seen_by(const Attention& call, i64 b, i64 row) {
    i64 length = call.lengths[b];
    return call.selected != nullptr ? length : length - call.n_queries + row / call.sharing + 1;
}

__device__ inline Tile tile_of(const Attention& call, i64 owner_of_batch, i64 number, i64 share) {
    Tile tile;
    tile.b = call.first_batch + owner_of_batch / call.n_owners;
    tile.owner = (int)(owner_of_batch % call.n_owners);
    tile.g = (int)(tile.owner * call.sharing / call.group);
    tile.first_row = call.first_row + number * call.tile_rows;
    i64 left = call.n_rows - number * call.tile_rows;
    tile.n_rows = (int)(left < call.tile_rows ? left : call.tile_rows);
    tile.wide_rows = round_up(tile.n_rows, ROWS);
    tile.seen = seen_by(call, tile.b, tile.first_row);
    tile.list = call.selected == nullptr ? nullptr : call.selected + (tile.b * call.n_owners + tile.owner) * call.width;
    i64 end = seen_by(call, tile.b, tile.first_row + tile.n_rows - 1), size = call.sizes[tile.b];
    tile.begin = share * size;
    tile.end = tile.begin + size < end ? tile.begin + size : end;
    return tile;
}

__device__ inline Rows query_row(const Attention& call, const Array& array, const Tile& tile, int r, int width) {
    i64 row = tile.first_row + r;
    int head = (int)(tile.owner * call.sharing + row % call.sharing);
    return rows_of(array, Group{tile.b, row / call.sharing, 1, 1}, head, width);
}

// Queries of a tile times 1/sqrt(D); a lane reads the columns that are its own in every product.
__device__ inline void load_queries(const Attention& call, const Tile& tile, const Matrix& q) {
    Real scale = (Real)(1 / sqrt((double)call.head_dim));
    for (int r = 0; r < q.n_rows; ++r) {
        for (int column = lane_id() * COLUMNS; column < q.width; column += SLAB) {
            Real x[COLUMNS] = {};
            if (r < tile.n_rows) load_row(query_row(call, call.query, tile, r, (int)call.head_dim), 0, column, x);
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c) q.data[(i64)r * q.width + column + c] = x[c] * scale;
        }
    }
}

// Tokens t ... t + 7 of a tile's run, or those at these places of its list.
struct Tokens {
    i64 b, t, token[TOKENS];
    int g;
    unsigned kept;  // bit i: there is an i-th one
};

__device__ inline Tokens tokens_at(const Tile& tile, i64 t) {
    Tokens tokens = {tile.b, t, {}, tile.g, 0};
#pragma unroll
    for (int i = 0; i < TOKENS; ++i) {
        tokens.token[i] = t + i >= tile.end ? -1 : tile.list != nullptr ? tile.list[t + i] : t + i;
        if (tokens.token[i] >= 0) tokens.kept |= 1u << i;
    }
    return tokens;
}

__device__ inline void load_tokens(
    const Array& array, const Tokens& tokens, int width, int column, Real (&x)[TOKENS][COLUMNS]) {
#pragma unroll
    for (int i = 0; i < TOKENS; ++i)
        load_row(rows_of(array, Group{tokens.b, tokens.token[i], 1, tokens.kept >> i & 1}, tokens.g, width), 0, column, x[i]);
}

// c[token][row] = <query of the row, key of the token>; every lane writes its own numbers of it, see `add_own`.
__device__ inline void dot_keys(const Attention& call, const Tokens& tokens, const Matrix& q, Real* c) {
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

// What a lane knows of the rows whose numbers it owns: row lane % 4 of every tile of four.
struct Own {
    Real peak[TILES], weight[TILES];  // the weight is that of the lane's own tokens
    i64 seen[TILES];
};

__device__ inline Own nothing_yet(const Attention& call, const Tile& tile) {
    Own own;
#pragma unroll
    for (int k = 0; k < TILES; ++k) {
        own.peak[k] = minus_infinity();
        own.weight[k] = 0;
        own.seen[k] = seen_by(call, tile.b, tile.first_row + k * ROWS + lane_id() % ROWS);
    }
    return own;
}

// Turn logits c[token][row] into weights relative to the peak so far; factors[row] is what earlier sums are worth now.
__device__ inline void weigh(const Tile& tile, const Tokens& tokens, Real* c, Real* factors, Own& own) {
    int i = lane_id() / ROWS;
#pragma unroll
    for (int k = 0; k < TILES; ++k) {
        if (k * ROWS >= tile.wide_rows) continue;
        int row = k * ROWS + lane_id() % ROWS;
        Real* place = c + i * tile.wide_rows + row;
        bool sees = (tokens.kept >> i & 1) && tokens.t + i < own.seen[k];
        Real logit = sees ? *place : minus_infinity(), top = logit > own.peak[k] ? logit : own.peak[k];
#pragma unroll
        for (int step = ROWS; step < LANES; step *= 2) {
            Real other = __shfl_xor_sync(~0u, top, step);
            top = other > top ? other : top;
        }
        Real factor = top == own.peak[k] ? 1 : power_of_e(own.peak[k] - top);
        Real weight = sees ? power_of_e(logit - top) : 0;
        own.weight[k] = own.weight[k] * factor + weight;
        own.peak[k] = top;
        *place = weight;
        if (i == 0) factors[row] = factor;
    }
}

// row of sums = row * factor + sum over tokens of c[token][row] * value of the token. A row must not touch the values of
// tokens that it does not see: they may be NaN.
__device__ inline void add_values(
    const Attention& call, const Tile& tile, const Tokens& tokens, const Real* c, const Real* factors, const Matrix& sums) {
    bool is_whole = call.n_queries == 1 || tokens.t + TOKENS <= tile.seen;
    for (int slab = 0; slab < sums.width; slab += SLAB) {
        int column = slab + lane_id() * COLUMNS;
        Real values[TOKENS][COLUMNS];
        load_tokens(call.value, tokens, (int)call.value_dim, column, values);
        for (int row = 0; row < sums.n_rows; row += ROWS) {
            Real a[ROWS][COLUMNS];
            i64 n_seen[ROWS];
            load_tile(sums, row, column, a);
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                n_seen[r] = is_whole ? TOKENS : seen_by(call, tile.b, tile.first_row + row + r) - tokens.t;
#pragma unroll
                for (int d = 0; d < COLUMNS; ++d) a[r][d] *= factors[row + r];
            }
#pragma unroll
            for (int i = 0; i < TOKENS; ++i) {
                Four weights = coefficients(c, sums.n_rows, i, row);
#pragma unroll
                for (int r = 0; r < ROWS; ++r)
                    if (i < n_seen[r]) add_multiple(weights.x[r], values[i], a[r]);
            }
            store_tile(sums, row, column, a);
        }
    }
}
