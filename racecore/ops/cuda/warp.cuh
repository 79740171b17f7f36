// The building blocks of all kernels: loading and storing rows, and three small matrix products.
//
// Thread mapping. A block works on groups of TOKENS tokens. It is one warp, or WARPS warps if
// tensor cores compute the products (tensor_cores.cuh). Without tensor cores each lane holds
// COLUMNS adjacent columns of a row of D or V numbers; longer rows are cut into slabs of 32 *
// COLUMNS columns. A warp therefore reads and writes whole cache lines between global memory and
// registers. Products are computed in tiles of ROWS rows (planes, or buckets of a state) by TOKENS
// tokens:
//   project      c[token][row] = <row, token>: sums over columns; `lane_total` leaves one of the
//                32 sums of a tile in each lane
//   expand       token = sum over rows of c[token][row] * row
//   accumulate   row += sum over tokens of c[token][row] * token
//
// Scratch (probabilities, weights, states) is shared memory, or global memory if a state is too
// large for it. A __syncthreads() separates every write from reads by other threads. Each group
// starts with a hash and its barriers, so the setup of a task and the float64 flushes need no
// barrier: the same thread writes and clears each of their columns.
//
// Defined by the compiler options (racecore/runtime/cuda.py): STORAGE (Half, Bfloat, float or
// double), REAL (float or double), COLUMNS (1, 2 or 4) and TENSOR_CORES (1 with Bfloat, float and
// 4 columns, else 0).
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
constexpr int TOKENS = TENSOR_CORES ? 16 : 8;  // tokens of a group
// Rows of a tile. ROWS * TOKENS == LANES without tensor cores: one number of a tile per lane.
constexpr int ROWS = 4;
// Threads per token in elementwise steps.
constexpr int TOKEN_THREADS = THREADS / TOKENS;
constexpr int SLAB = TENSOR_CORES ? 32 : LANES * COLUMNS;
// Padding of scratch rows if tensor cores read several rows at once: it moves them to different
// shared-memory banks.
constexpr int PAD = TENSOR_CORES ? 4 : 0;
constexpr int ROW_STEP = TENSOR_CORES ? 8 : ROWS;
// Resident blocks per multiprocessor that __launch_bounds__ asks for. They cap the registers of a
// thread: 128 (MANY_BLOCKS), 168 (FEW_BLOCKS), or 255 in float64.
constexpr int MANY_BLOCKS = TENSOR_CORES ? 4 : sizeof(Real) == 8 ? 8 : 16;
constexpr int FEW_BLOCKS = TENSOR_CORES ? 3 : sizeof(Real) == 8 ? 8 : 12;
// Tokens summed in Real before the sum is added to float64.
constexpr int FLUSH = 256;

extern __shared__ __align__(16) double shared_memory[];

// An array [B, T, heads, dim], strides in elements. `is_vectorized`: the COLUMNS columns of a lane
// are contiguous and aligned, so one load reads them.
struct Array {
    Stored* data;  // null if not wanted
    i64 batch, token, head, dim, is_vectorized;
};

__device__ inline int thread_id() { return (int)threadIdx.x; }
__device__ inline int lane_id() { return thread_id() % LANES; }
__device__ inline int warp_id() { return thread_id() / LANES; }

__device__ inline int round_up(int n, int step) { return (n + step - 1) / step * step; }

__device__ inline Real widen(Stored x) { return to_real(x); }

// The tokens of a group: t ... t + n - 1 of batch index b.
struct Group {
    i64 b, t;
    int n;
    unsigned kept;  // bit i: token i exists and is not masked
};

// The rows of one group and head, [TOKENS, width]. Masked rows are read as zeros, so NaN under a
// mask does not spread.
struct Rows {
    const Array* array;
    Stored* first;
    int width;  // D or V
    Group group;
};

__device__ inline Rows rows_of(const Array& array, Group group, int head, int width) {
    return Rows{
        &array, array.data + group.b * array.batch + group.t * array.token + head * array.head,
        width, group
    };
}

struct alignas(sizeof(Stored) * COLUMNS < 16 ? sizeof(Stored) * COLUMNS : 16) Pack {
    Stored x[COLUMNS];
};

__device__ inline void load_row(const Rows& rows, int i, int column, Real (&x)[COLUMNS]) {
    const Array& a = *rows.array;
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) x[c] = 0;
    if (!(rows.group.kept >> i & 1) || column >= rows.width) return;
    const Stored* source = rows.first + i * a.token + column * a.dim;
    if (a.is_vectorized) {
        Pack pack = *reinterpret_cast<const Pack*>(source);
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) x[c] = widen(pack.x[c]);
        return;
    }
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c)
        if (column + c < rows.width) x[c] = widen(source[c * a.dim]);
}

__device__ inline void load_rows(const Rows& rows, int column, Real (&x)[TOKENS][COLUMNS]) {
#pragma unroll
    for (int i = 0; i < TOKENS; ++i) load_row(rows, i, column, x[i]);
}

// Write a row, or add to the stored one: state heads that share a key run in successive launches.
__device__ inline void store_row(
    const Rows& rows, int i, int column, const Real (&x)[COLUMNS], bool adds
) {
    const Array& a = *rows.array;
    if (i >= rows.group.n || column >= rows.width) return;
    Stored* target = rows.first + i * a.token + column * a.dim;
    if (a.is_vectorized && !adds) {
        Pack pack;
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) pack.x[c] = to_stored(x[c], Stored());
        *reinterpret_cast<Pack*>(target) = pack;
        return;
    }
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) {
        if (column + c >= rows.width) continue;
        Stored* cell = target + c * a.dim;
        *cell = to_stored(adds ? widen(*cell) + x[c] : x[c], Stored());
    }
}

__device__ inline void store_rows(
    const Rows& rows, int column, const Real (&x)[TOKENS][COLUMNS], bool adds
) {
#pragma unroll
    for (int i = 0; i < TOKENS; ++i) store_row(rows, i, column, x[i], adds);
}

// A matrix in scratch, or the planes. n_rows includes PAD: n_rows - PAD rows are stored, a
// multiple of ROW_STEP. Rows are padded with zeros to whole slabs, plus PAD. Coefficients
// c[token][row] have the row stride n_rows.
struct Matrix {
    Real* data;
    int n_rows, width;
};

__device__ inline int padded(int n_rows) { return round_up(n_rows, ROW_STEP) + PAD; }
__device__ inline int row_width(int n_columns) { return round_up(n_columns, SLAB) + PAD; }

struct alignas(sizeof(Real) * COLUMNS < 16 ? sizeof(Real) * COLUMNS : 16) Vector {
    Real x[COLUMNS];
};

__device__ inline void load_tile(const Matrix& m, int row, int column, Real (&a)[ROWS][COLUMNS]) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        Vector vector =
            *reinterpret_cast<const Vector*>(m.data + (i64)(row + r) * m.width + column);
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) a[r][c] = vector.x[c];
    }
}

__device__ inline void store_tile(
    const Matrix& m, int row, int column, const Real (&a)[ROWS][COLUMNS]
) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        Vector vector;
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) vector.x[c] = a[r][c];
        *reinterpret_cast<Vector*>(m.data + (i64)(row + r) * m.width + column) = vector;
    }
}

#if TENSOR_CORES
#include "cuda/tensor_cores.cuh"
#else

// The coefficients of one token for the ROWS rows of a tile.
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

// Butterfly reduction: lanes exchange halves of x[2 * WIDTH], then quarters, and so on.
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

// Return the sum of x[lane] over all lanes: 32 sums in 31 shuffles, in a fixed order.
__device__ inline Real lane_total(Real (&x)[LANES]) {
    fold<LANES / 2>(x);
    return x[0];
}

// Write or add a lane's number of a tile to c[TOKENS][width]: token lane / ROWS, row lane % ROWS.
__device__ inline void add_lane_total(Real total, Real* c, int width, int row, bool is_first) {
    Real* target = c + lane_id() / ROWS * width + row + lane_id() % ROWS;
    *target = is_first ? total : *target + total;
}

// No barrier: the lane that wrote c[token][row] in `project` is the one that continues with it.
__device__ inline void sync_projection() {}

// c[token][row] = <row of m, token>, summed over one slab: the columns from `column` of each lane.
// Added to the sums of earlier slabs unless is_first.
__device__ inline void project_slab(
    const Matrix& m, const Real (&rows)[TOKENS][COLUMNS], int column, bool is_first, Real* c
) {
    for (int row = 0; row < m.n_rows; row += ROWS) {
        Real a[ROWS][COLUMNS], sums[LANES];
        load_tile(m, row, column, a);
#pragma unroll
        for (int i = 0; i < TOKENS; ++i)
#pragma unroll
            for (int r = 0; r < ROWS; ++r) sums[i * ROWS + r] = dot(a[r], rows[i]);
        add_lane_total(lane_total(sums), c, m.n_rows, row, is_first);
    }
}

// c[token][row] = <row of m, token of x>
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

// A bump allocator over the scratch of a block. `_scratch_numbers` of call.py counts the same
// pieces.
struct Scratch {
    Real* next;

    __device__ Real* take(i64 n) {
        Real* piece = next;
        next += n;
        return piece;
    }

    __device__ double* take_doubles(i64 n) {
        return reinterpret_cast<double*>(take(n * (sizeof(double) / sizeof(Real))));
    }
};

__device__ inline void clear(Real* x, i64 n) {
    for (i64 i = thread_id(); i < n; i += THREADS) x[i] = 0;
}

__device__ inline void clear_matrix(const Matrix& m) {
    for (int row = 0; row < m.n_rows - PAD; ++row)
        for (int column = thread_id(); column < m.width; column += THREADS)
            m.data[(i64)row * m.width + column] = 0;
}

// Add a matrix of Real sums to float64 numbers target[n_rows][n_columns], and clear it.
__device__ inline void flush_matrix(
    const Matrix& m, int n_rows, int n_columns, double* target, bool is_first
) {
    for (int row = 0; row < n_rows; ++row) {
        for (int column = thread_id(); column < n_columns; column += THREADS) {
            Real* sum = m.data + (i64)row * m.width + column;
            double* total = target + (i64)row * n_columns + column;
            *total = is_first ? (double)*sum : *total + *sum;
            *sum = 0;
        }
    }
}
