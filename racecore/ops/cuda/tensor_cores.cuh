// The products of warp.cuh with tensor cores, which multiply bfloat16 and add in float32, for rows
// stored as bfloat16.
//
// Precision. A stored row is exact in bfloat16. A float32 number is exactly the sum of three
// bfloat16 numbers: its leading 8 bits, the next 8 and the last 8. Products of float32 with a
// stored row use all three and lose nothing. `expand` multiplies float32 by float32 and rounds its
// sums to bfloat16; there both are split into two pieces, 16 bits.
//
// Thread mapping. The instruction is a matrix product by a warp, d[16][8] += a[16][16] @ b[16][8].
// With g = lane / 4 and t = lane % 4, a lane holds the following numbers, two in each register of
// a and b, the first in the lower half (PTX ISA, fragments of mma.m16n8k16):
//   a[0] row g, columns 2t, 2t+1    a[1] row g+8, same columns    a[2], a[3] likewise, 2t+8, 2t+9
//   b[0] rows 2t, 2t+1, column g    b[1] rows 2t+8, 2t+9
//   d[0], d[1] row g, columns 2t, 2t+1    d[2], d[3] row g+8, same columns
// The order of rows and columns is free, and chosen so that a lane reads four adjacent columns of
// a row at once:
//   project     d[row][token], over columns. Columns 2t, 2t+1, 2t+8, 2t+9 of a are columns
//               4t ... 4t+3 of the matrix; its row r is row r % 8 / 2 + r % 2 * 4 + r / 8 * 8
//   expand      d[column][token], over rows. Two products, h = 0, 1: row r of a is column
//               4 * (r % 8) + 2 * h + r / 8
//   accumulate  d[column][row], over tokens. Two products, likewise
// Rows of scratch are PAD numbers longer than a multiple of 32, so these reads have no bank
// conflicts.
#pragma once

constexpr int TILES = TOKENS / 8;  // tiles of eight tokens: products have eight columns

struct Left {
    unsigned x[4];
};
struct Right {
    unsigned x[2];
};
struct Sum {
    float x[4];
};

__device__ inline void multiply_add(Sum& d, const Left& a, const Right& b) {
#ifdef __CUDA_ARCH__
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d.x[0]), "+f"(d.x[1]), "+f"(d.x[2]), "+f"(d.x[3])
        : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "r"(b.x[0]), "r"(b.x[1])
    );
#else
    cuda_mma_m16n8k16(d.x, a.x, b.x);
#endif
}

// The product of numbers in N pieces with numbers in M pieces: smallest terms first, without the
// terms below the last bit.
template <int N, int M>
__device__ inline void multiply_add(Sum& d, const Left (&a)[N], const Right (&b)[M]) {
    constexpr int LAST = (N > M ? N : M) - 1;
#pragma unroll
    for (int order = LAST; order >= 0; --order)
#pragma unroll
        for (int i = 0; i < N; ++i)
            if (order - i >= 0 && order - i < M) multiply_add(d, a[i], b[order - i]);
}

// Tensor cores truncate their sums towards zero. Long sums are therefore added here, in float32.
__device__ inline void add(Sum& d, const Sum& x) {
#pragma unroll
    for (int i = 0; i < 4; ++i) d.x[i] += x.x[i];
}

union Word {
    float value;
    unsigned bits;
};

__device__ inline unsigned upper_halves(unsigned first, unsigned second) {
    return first >> 16 | (second & 0xffff0000u);
}
__device__ inline unsigned lower_halves(unsigned first, unsigned second) {
    return (first & 0xffffu) | second << 16;
}

// Split two numbers into N pieces; piece i goes to register r of fragment i.
template <int N, typename Fragment>
__device__ inline void split(float first, float second, Fragment (&pieces)[N], int r) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
        Word one = {first}, two = {second};
        pieces[i].x[r] = upper_halves(one.bits, two.bits);
        one.bits &= 0xffff0000u;
        two.bits &= 0xffff0000u;
        first -= one.value;
        second -= two.value;
    }
}

// Four columns of a token, as stored.
struct alignas(8) Quad {
    unsigned x[2];
};

__device__ inline Quad load_quad(const Rows& rows, int i, int column) {
    const Array& a = *rows.array;
    Quad quad = {{0, 0}};
    if (!(rows.group.kept >> i & 1) || column >= rows.width) return quad;
    const Stored* source = rows.first + i * a.token + column * a.dim;
    if (a.is_vectorized) return *reinterpret_cast<const Quad*>(source);
#pragma unroll
    for (int c = 0; c < 4; ++c)
        if (column + c < rows.width)
            quad.x[c / 2] |= (unsigned)source[c * a.dim].bits << 16 * (c % 2);
    return quad;
}

__device__ inline int group_id() { return lane_id() / 4; }
__device__ inline int member_id() { return lane_id() % 4; }

// The token of a lane's pair r of 16 numbers, and of its numbers of a sum.
__device__ inline int token_of(int r) { return 2 * member_id() + 8 * r; }

// Stored rows as b, over columns column ... column + 15.
__device__ inline void load_columns(const Rows& x, int column, Right (&b)[TILES][1]) {
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
        Quad quad = load_quad(x, 8 * tile + group_id(), column + 4 * member_id());
        b[tile][0] = Right{{quad.x[0], quad.x[1]}};
    }
}

// Stored rows as a, over tokens, of columns column ... column + 31.
__device__ inline void load_tokens(const Rows& x, int column, Left (&a)[2][1]) {
    Quad quads[4];
#pragma unroll
    for (int j = 0; j < 4; ++j)
        quads[j] = load_quad(x, token_of(j / 2) + j % 2, column + 4 * group_id());
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            unsigned first = quads[2 * r].x[h], second = quads[2 * r + 1].x[h];
            a[h][0].x[2 * r] = lower_halves(first, second);
            a[h][0].x[2 * r + 1] = upper_halves(first, second);
        }
}

__device__ inline Vector load_vector(const Matrix& m, int row, int column) {
    return *reinterpret_cast<const Vector*>(m.data + (i64)row * m.width + column);
}

// Coefficients c[token][row] as b, over rows row ... row + 15, or the first 8 if there are no
// more.
template <int N>
__device__ inline void load_coefficients(const Real* c, int width, int row, Right (&b)[TILES][N]) {
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const Real* source = c + (8 * tile + group_id()) * width + row + token_of(r);
            bool exists = row + 8 * r < width - PAD;
            split(exists ? source[0] : 0, exists ? source[1] : 0, b[tile], r);
        }
}

// A barrier: other threads continue with the c that `project` wrote, and its input may be
// overwritten.
__device__ inline void sync_projection() { __syncthreads(); }

// c[token][row] = <row of m, token of x>, or added to c. Warps divide the rows.
__device__ inline void project(const Matrix& m, const Rows& x, Real* c, bool adds = false) {
    int lane_row = group_id() / 2 + group_id() % 2 * 4;
    for (int row = 16 * warp_id(); row < m.n_rows - PAD; row += 16 * WARPS) {
        bool is_whole = row + 8 < m.n_rows - PAD;
        Sum sums[TILES] = {};
        for (int column = 0; column < x.width; column += 16) {
            Left a[3];
            Right b[TILES][1];
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                Vector four = {};
                if (r == 0 || is_whole)
                    four = load_vector(m, row + lane_row + 8 * r, column + 4 * member_id());
                split(four.x[0], four.x[1], a, r);
                split(four.x[2], four.x[3], a, r + 2);
            }
            load_columns(x, column, b);
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile) {
                Sum sum = {};
                multiply_add(sum, a, b[tile]);
                add(sums[tile], sum);
            }
        }
#pragma unroll
        for (int j = 0; j < 4 * TILES; ++j) {
            Real* target =
                c + (token_of(j / 4) + j % 2) * m.n_rows + row + lane_row + j % 4 / 2 * 8;
            if (j % 4 < 2 || is_whole)
                *target = adds ? *target + sums[j / 4].x[j % 4] : sums[j / 4].x[j % 4];
        }
    }
    if (!adds)
        for (int j = thread_id(); j < TOKENS * PAD; j += THREADS)
            c[j / PAD * m.n_rows + m.n_rows - PAD + j % PAD] = 0;
}

// sums[h][tile] += sum over rows of c[token][row] * row of m, for columns column ... column + 31.
__device__ inline void add_rows(const Real* c, const Matrix& m, int column, Sum (&sums)[2][TILES]) {
    for (int row = 0; row < m.n_rows - PAD; row += 16) {
        Right b[TILES][2];
        Vector four[4] = {};
        load_coefficients(c, m.n_rows, row, b);
#pragma unroll
        for (int j = 0; j < 4; ++j)
            if (row + j / 2 * 8 < m.n_rows - PAD)
                four[j] = load_vector(m, row + token_of(j / 2) + j % 2, column + 4 * group_id());
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            Left a[2];
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                int pair = r / 2 * 2, i = 2 * h + r % 2;
                split(four[pair].x[i], four[pair + 1].x[i], a, r);
            }
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile) multiply_add(sums[h][tile], a, b[tile]);
        }
    }
}

__device__ inline void store_sums(
    const Rows& x, int column, const Sum (&sums)[2][TILES], bool adds
) {
#pragma unroll
    for (int j = 0; j < 2 * TILES; ++j) {
        const Sum &first = sums[0][j / 2], &second = sums[1][j / 2];
        Real row[COLUMNS] = {
            first.x[j % 2], first.x[j % 2 + 2], second.x[j % 2], second.x[j % 2 + 2]
        };
        store_row(x, token_of(j / 2) + j % 2, column + 4 * group_id(), row, adds);
    }
}

// token of x = sum over rows of c[token][row] * row of m. Warps divide the columns, as in
// `accumulate`.
__device__ inline void expand(const Real* c, const Matrix& m, const Rows& x, bool adds) {
    for (int column = 32 * warp_id(); column < x.width; column += 32 * WARPS) {
        Sum sums[2][TILES] = {};
        add_rows(c, m, column, sums);
        store_sums(x, column, sums, adds);
    }
}

// row of m += sum over tokens of c[token][row] * token of x
__device__ inline void accumulate(const Real* c, const Matrix& m, const Rows& x) {
    for (int column = 32 * warp_id(); column < x.width; column += 32 * WARPS) {
        Left a[2][1];
        load_tokens(x, column, a);
        for (int row = 0; row < m.n_rows - PAD; row += 8) {
            Right b[3];
            Sum sums[2] = {};
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const Real* source = c + token_of(r) * m.n_rows + row + group_id();
                split(source[0], source[m.n_rows], b, r);
            }
            multiply_add(sums[0], a[0], b);
            multiply_add(sums[1], a[1], b);
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                Vector* target = reinterpret_cast<Vector*>(
                    m.data + (i64)(row + token_of(0) + j) * m.width + column + 4 * group_id()
                );
                Vector four = *target;
#pragma unroll
                for (int i = 0; i < 4; ++i) four.x[i] += sums[i / 2].x[i % 2 * 2 + j];
                *target = four;
            }
        }
    }
}
