// What all kernels are made of: rows in registers, sums over columns, products of a few rows with a few tokens.
//
// A block works on groups of TOKENS tokens. It is one warp, or WARPS of them where tensor cores do the products: those are
// in tensor_cores.cuh. Else every lane owns COLUMNS neighbouring columns of a row (of D or V; a longer row is cut into slabs
// of 32 * COLUMNS), so rows are read and written in whole cache lines, straight between memory and registers. Products
// come in tiles of ROWS rows (planes, or buckets of a state) by TOKENS tokens:
//   project      <row, token>: sums over columns, which `own_total` folds so that every lane ends with one of the 32
//   expand       sum over rows of c[token][row] * row
//   accumulate   row += sum over tokens of c[token][row] * token
// Numbers that threads exchange (hash, weights, states) lie in *scratch*: shared memory, or global memory where a state is
// too large for that. Between writing and reading what is another thread's stands __syncthreads(). Every group begins with a
// hash and its barriers, so what a task prepares, and sums that move on to float64, need none of their own: their numbers are
// written and cleared by the same threads, column by column.
//
// Set from outside: STORAGE (Half, Bfloat, float or double), REAL (float or double), COLUMNS (1, 2 or 4), and TENSOR_CORES
// (1, with Bfloat, float and 4; else 0).
#pragma once

#include "cuda/types.cuh"

#ifndef TENSOR_CORES
#define TENSOR_CORES 0
#endif

typedef long long i64;
typedef STORAGE Stored;
typedef REAL Real;

constexpr int LANES = 32;
constexpr int WARPS = TENSOR_CORES ? 4 : 1;
constexpr int THREADS = LANES * WARPS;
constexpr int TOKENS = TENSOR_CORES ? 16 : 8;  // of a group
constexpr int ROWS = 4;                        // of a tile: ROWS * TOKENS == LANES, one number of a tile for every lane
constexpr int SHARE = THREADS / TOKENS;        // threads that share the numbers of a token, where it is one by one
constexpr int SLAB = TENSOR_CORES ? 32 : LANES * COLUMNS;
// Rows of scratch are a bit longer than what they hold where tensor cores read several of them at once: other banks then.
constexpr int PAD = TENSOR_CORES ? 4 : 0;
constexpr int ROW_STEP = TENSOR_CORES ? 8 : ROWS;
// Blocks that shall fit a multiprocessor at once, which bounds the registers of a thread: 128, 168, or 255 in float64.
constexpr int MANY = TENSOR_CORES ? 4 : sizeof(Real) == 8 ? 8 : 16;
constexpr int SOME = TENSOR_CORES ? 3 : sizeof(Real) == 8 ? 8 : 12;
constexpr int FLUSH = 256;  // tokens whose sums are of type Real before they are added to float64

extern __shared__ __align__(16) double shared_memory[];

// An array [B, T, heads, dim] of any strides, counted in elements. `is_wide`: COLUMNS columns can be read at once.
struct Array {
    Stored* data;  // null: not wanted
    i64 batch, token, head, dim, is_wide;
};

__device__ inline int thread_id() { return (int)threadIdx.x; }
__device__ inline int lane_id() { return thread_id() % LANES; }
__device__ inline int warp_id() { return thread_id() / LANES; }

__device__ inline int round_up(int n, int step) { return (n + step - 1) / step * step; }

__device__ inline Real widen(Stored x) { return to_real(x); }

// The tokens of a group: t ... t + n - 1 of a sequence of the batch.
struct Group {
    i64 b, t;
    int n;
    unsigned kept;  // bit i: token i exists and takes part
};

// The rows of a group and a head. Those that do not take part are read as zeros, so that NaN under a mask stays there.
struct Rows {
    const Array* array;
    Stored* first;
    int width;  // D or V
    Group group;
};

__device__ inline Rows rows_of(const Array& array, Group group, int head, int width) {
    return Rows{&array, array.data + group.b * array.batch + group.t * array.token + head * array.head, width, group};
}

struct alignas(sizeof(Stored) * COLUMNS < 16 ? sizeof(Stored) * COLUMNS : 16) Pack {
    Stored x[COLUMNS];
};

__device__ inline void load_row(const Rows& rows, int i, int column, Real (&x)[COLUMNS]) {
    const Array& a = *rows.array;
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) x[c] = 0;
    if (!(rows.group.kept >> i & 1) || column >= rows.width) return;
    const Stored* place = rows.first + i * a.token + column * a.dim;
    if (a.is_wide) {
        Pack pack = *reinterpret_cast<const Pack*>(place);
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) x[c] = widen(pack.x[c]);
        return;
    }
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c)
        if (column + c < rows.width) x[c] = widen(place[c * a.dim]);
}

__device__ inline void load_rows(const Rows& rows, int column, Real (&x)[TOKENS][COLUMNS]) {
#pragma unroll
    for (int i = 0; i < TOKENS; ++i) load_row(rows, i, column, x[i]);
}

// Write a row, or add to what stands there: heads of a state that share a key go one after another.
__device__ inline void store_row(const Rows& rows, int i, int column, const Real (&x)[COLUMNS], bool adds) {
    const Array& a = *rows.array;
    if (i >= rows.group.n || column >= rows.width) return;
    Stored* place = rows.first + i * a.token + column * a.dim;
    if (a.is_wide && !adds) {
        Pack pack;
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) pack.x[c] = to_stored(x[c], Stored());
        *reinterpret_cast<Pack*>(place) = pack;
        return;
    }
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) {
        if (column + c >= rows.width) continue;
        Stored* cell = place + c * a.dim;
        *cell = to_stored(adds ? widen(*cell) + x[c] : x[c], Stored());
    }
}

__device__ inline void store_rows(const Rows& rows, int column, const Real (&x)[TOKENS][COLUMNS], bool adds) {
#pragma unroll
    for (int i = 0; i < TOKENS; ++i) store_row(rows, i, column, x[i], adds);
}

// A matrix in scratch, or planes: n_rows - PAD rows, padded with zeros to whole slabs and PAD more; their number is padded to
// a multiple of ROW_STEP. Coefficients for its rows stand n_rows apart from token to token.
struct Matrix {
    Real* data;
    int n_rows, width;
};

__device__ inline int wide(int n_rows) { return round_up(n_rows, ROW_STEP) + PAD; }
__device__ inline int row_width(int n_columns) { return round_up(n_columns, SLAB) + PAD; }

struct alignas(sizeof(Real) * COLUMNS < 16 ? sizeof(Real) * COLUMNS : 16) Wide {
    Real x[COLUMNS];
};

__device__ inline void load_tile(const Matrix& m, int row, int column, Real (&a)[ROWS][COLUMNS]) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        Wide wide = *reinterpret_cast<const Wide*>(m.data + (i64)(row + r) * m.width + column);
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) a[r][c] = wide.x[c];
    }
}

__device__ inline void store_tile(const Matrix& m, int row, int column, const Real (&a)[ROWS][COLUMNS]) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        Wide wide;
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) wide.x[c] = a[r][c];
        *reinterpret_cast<Wide*>(m.data + (i64)(row + r) * m.width + column) = wide;
    }
}

#if TENSOR_CORES
#include "cuda/tensor_cores.cuh"
#else

// Coefficients of a token for the ROWS rows of a tile.
struct alignas(16) Four {
    Real x[ROWS];
};

__device__ inline Four coefficients(const Real* c, int width, int i, int row) {
    return *reinterpret_cast<const Four*>(c + i * width + row);
}

__device__ inline Real dot(const Real (&x)[COLUMNS], const Real (&y)[COLUMNS]) {
    Real sum = x[0] * y[0];
#pragma unroll
    for (int c = 1; c < COLUMNS; ++c) sum += x[c] * y[c];
    return sum;
}

__device__ inline void add_multiple(Real factor, const Real (&x)[COLUMNS], Real (&y)[COLUMNS]) {
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) y[c] += factor * x[c];
}

// Lanes exchange halves of x[2 * WIDTH], then quarters, ...
template <int WIDTH>
__device__ inline void fold(Real (&x)[LANES]) {
    bool upper = lane_id() & WIDTH;
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) {
        Real kept = upper ? x[j + WIDTH] : x[j];
        Real given = upper ? x[j] : x[j + WIDTH];
        x[j] = kept + __shfl_xor_sync(~0u, given, WIDTH);
    }
    if constexpr (WIDTH > 1) fold<WIDTH / 2>(x);
}

// The sum of x[lane] over all lanes: 32 sums in 31 shuffles, always in the same order.
__device__ inline Real own_total(Real (&x)[LANES]) {
    fold<LANES / 2>(x);
    return x[0];
}

// The place of a lane's own number of a tile: token lane / ROWS, row lane % ROWS, in c[TOKENS][width].
__device__ inline void add_own(Real total, Real* c, int width, int row, bool is_first) {
    Real* place = c + lane_id() / ROWS * width + row + lane_id() % ROWS;
    *place = is_first ? total : *place + total;
}

// What `project` leaves in c is where the lane is that goes on with it.
__device__ inline void hand_over() {}

// c[token][row] = <row of m, token> over the slab of columns from a lane's `column` on, added to those of slabs before.
__device__ inline void project_slab(
    const Matrix& m, const Real (&rows)[TOKENS][COLUMNS], int column, bool is_first, Real* c) {
    for (int row = 0; row < m.n_rows; row += ROWS) {
        Real a[ROWS][COLUMNS], sums[LANES];
        load_tile(m, row, column, a);
#pragma unroll
        for (int i = 0; i < TOKENS; ++i)
#pragma unroll
            for (int r = 0; r < ROWS; ++r) sums[i * ROWS + r] = dot(a[r], rows[i]);
        add_own(own_total(sums), c, m.n_rows, row, is_first);
    }
}

// c[token][row] = <row of m, token>
__device__ inline void project(const Matrix& m, const Rows& x, Real* c) {
    for (int slab = 0; slab < x.width; slab += SLAB) {
        int column = slab + lane_id() * COLUMNS;
        Real rows[TOKENS][COLUMNS];
        load_rows(x, column, rows);
        project_slab(m, rows, column, slab == 0, c);
    }
}

// token of x = sum over rows of c[token][row] * row of m
__device__ inline void expand(const Real* c, const Matrix& m, const Rows& x, bool adds) {
    for (int slab = 0; slab < x.width; slab += SLAB) {
        int column = slab + lane_id() * COLUMNS;
        Real sums[TOKENS][COLUMNS] = {};
        for (int row = 0; row < m.n_rows; row += ROWS) {
            Real a[ROWS][COLUMNS];
            load_tile(m, row, column, a);
#pragma unroll
            for (int i = 0; i < TOKENS; ++i) {
                Four f = coefficients(c, m.n_rows, i, row);
#pragma unroll
                for (int r = 0; r < ROWS; ++r) add_multiple(f.x[r], a[r], sums[i]);
            }
        }
        store_rows(x, column, sums, adds);
    }
}

// row of m += sum over tokens of c[token][row] * token of x
__device__ inline void accumulate(const Real* c, const Matrix& m, const Rows& x) {
    for (int slab = 0; slab < x.width; slab += SLAB) {
        int column = slab + lane_id() * COLUMNS;
        Real rows[TOKENS][COLUMNS];
        load_rows(x, column, rows);
        for (int row = 0; row < m.n_rows; row += ROWS) {
            Real a[ROWS][COLUMNS];
            load_tile(m, row, column, a);
#pragma unroll
            for (int i = 0; i < TOKENS; ++i) {
                Four f = coefficients(c, m.n_rows, i, row);
#pragma unroll
                for (int r = 0; r < ROWS; ++r) add_multiple(f.x[r], rows[i], a[r]);
            }
            store_tile(m, row, column, a);
        }
    }
}

#endif

// Scratch, handed out piece by piece; the host counts the same pieces.
struct Scratch {
    Real* next;

    __device__ Real* take(i64 n) {
        Real* piece = next;
        next += n;
        return piece;
    }

    __device__ double* take_doubles(i64 n) { return reinterpret_cast<double*>(take(n * (sizeof(double) / sizeof(Real)))); }
};

__device__ inline void clear(Real* x, i64 n) {
    for (i64 i = thread_id(); i < n; i += THREADS) x[i] = 0;
}

__device__ inline void clear_matrix(const Matrix& m) {
    for (int row = 0; row < m.n_rows - PAD; ++row)
        for (int column = thread_id(); column < m.width; column += THREADS) m.data[(i64)row * m.width + column] = 0;
}

// A matrix of sums in float32 moves on to float64: target[row][column] of n_rows by n_columns.
__device__ inline void flush_matrix(const Matrix& m, int n_rows, int n_columns, double* target, bool is_first) {
    for (int row = 0; row < n_rows; ++row) {
        for (int column = thread_id(); column < n_columns; column += THREADS) {
            Real* place = m.data + (i64)row * m.width + column;
            double* total = target + (i64)row * n_columns + column;
            *total = is_first ? (double)*place : *total + *place;
            *place = 0;
        }
    }
}
