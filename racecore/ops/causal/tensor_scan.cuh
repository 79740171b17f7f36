// The scans of causal/kernels.cu with tensor cores, one group of tokens at a time: products of the
// group with the state before it, plus products between its own tokens in which each token sees
// only the tokens that it may.
#pragma once

// Numbers for pairs of tokens of the group: [i][j] is in row i and column j of a sum.
struct Square {
    Sum x[TILES];
};

// Whether token j is visible to token i: not later, or backward not earlier.
__device__ inline bool is_visible(int i, int j, bool backward) {
    return backward ? j >= i : j <= i;
}

__device__ inline void clear_invisible(Square& square, bool backward) {
#pragma unroll
    for (int j = 0; j < 4 * TILES; ++j) {
        int row = group_id() + j % 4 / 2 * 8, column = token_of(j / 4) + j % 2;
        if (!is_visible(row, column, backward)) square.x[j / 4].x[j % 4] = 0;
    }
}

// square[i][j] = <x[i], y[j]> of stored rows
__device__ inline Square square_of_rows(const Rows& x, const Rows& y, bool backward) {
    Square square = {};
    for (int column = 0; column < x.width; column += 16) {
        Right of_x[TILES][1], b[TILES][1];
        load_columns(x, column, of_x);
        load_columns(y, column, b);
        Left a[1] = {{{of_x[0][0].x[0], of_x[1][0].x[0], of_x[0][0].x[1], of_x[1][0].x[1]}}};
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
            Sum sum = {};
            multiply_add(sum, a, b[tile]);
            add(square.x[tile], sum);
        }
    }
    clear_invisible(square, backward);
    return square;
}

// square[i][j] = <c[i], d[j]> of coefficients
__device__ inline Square square_of_coefficients(
    const Real* c, const Real* d, int width, bool backward
) {
    Square square = {};
    for (int row = 0; row < width - PAD; row += 16) {
        Right of_c[TILES][2], b[TILES][2];
        load_coefficients(c, width, row, of_c);
        load_coefficients(d, width, row, b);
        Left a[2];
#pragma unroll
        for (int i = 0; i < 2; ++i)
            a[i] = Left{{of_c[0][i].x[0], of_c[1][i].x[0], of_c[0][i].x[1], of_c[1][i].x[1]}};
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) multiply_add(square.x[tile], a, b[tile]);
    }
    clear_invisible(square, backward);
    return square;
}

__device__ inline bool is_finite(const Sum& sum) {
    float zero = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) zero += sum.x[i] * 0;
    return zero == 0;
}

// `a` with zeros for the tokens that are invisible to token i.
__device__ inline Left visible_to(int i, const Left& a, bool backward) {
    Left visible;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
        int token = token_of(r / 2);
        unsigned mask = (is_visible(i, token, backward) ? 0xffffu : 0) |
                        (is_visible(i, token + 1, backward) ? 0xffff0000u : 0);
        visible.x[r] = a.x[r] & mask;
    }
    return visible;
}

// sums[token i] += sum over tokens j visible to i of square[i][j] * a[..][j], with the square
// split into M bfloat16 pieces.
// A zero in the square does not stop NaN or infinity (0 * NaN is NaN). If a result is not finite,
// tokens are computed one by one with the invisible rows cleared; finite results keep their bits
// either way.
template <int M, int N>
__device__ inline void add_visible(
    const Left (&a)[N], const Square& square, bool backward, Sum (&sums)[TILES]
) {
    Right b[TILES][M];
    Sum all[TILES] = {};
    bool finite = true;
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
        // columns 2t, 2t+1 of row g of a sum are rows 2t, 2t+1 of column g of b
        split(square.x[0].x[2 * tile], square.x[0].x[2 * tile + 1], b[tile], 0);
        split(square.x[1].x[2 * tile], square.x[1].x[2 * tile + 1], b[tile], 1);
        multiply_add(all[tile], a, b[tile]);
        finite = finite && is_finite(all[tile]);
    }
    if (__any_sync(~0u, !finite)) {
#pragma unroll 1
        for (int i = 0; i < TOKENS; ++i) {
            Left visible[N];
            for (int p = 0; p < N; ++p) visible[p] = visible_to(i, a[p], backward);
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile) {
                Sum one = {};
                multiply_add(one, visible, b[tile]);
                for (int j = 0; j < 4; ++j)
                    if (token_of(tile) + j % 2 == i) all[tile].x[j] = one.x[j];
            }
        }
    }
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) add(sums[tile], all[tile]);
}

// sums[i] += sum over tokens j visible to i of square[i][j] * x[j], for columns column ... column
// + 31.
__device__ inline void add_tokens(
    const Square& square, const Rows& x, int column, bool backward, Sum (&sums)[2][TILES]
) {
    Left a[2][1];
    load_tokens(x, column, a);
    add_visible<2>(a[0], square, backward, sums[0]);
    add_visible<2>(a[1], square, backward, sums[1]);
}

// h[i] += sum over tokens j visible to i of square[i][j] * c[j]. The thread has the same numbers
// as in `project`.
__device__ inline void add_coefficients(
    const Square& square, const Real* c, int width, bool backward, Real* h
) {
    int lane_row = group_id() / 2 + group_id() % 2 * 4;
    for (int row = 16 * warp_id(); row < width - PAD; row += 16 * WARPS) {
        bool is_whole = row + 8 < width - PAD;
        Left a[3];
        Sum sums[TILES] = {};
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            const Real* source = c + token_of(r / 2) * width + row + lane_row + r % 2 * 8;
            bool exists = r % 2 == 0 || is_whole;
            split(exists ? source[0] : 0, exists ? source[width] : 0, a, r);
        }
        add_visible<3>(a, square, backward, sums);
#pragma unroll
        for (int j = 0; j < 4 * TILES; ++j)
            if (j % 4 < 2 || is_whole)
                h[(token_of(j / 4) + j % 2) * width + row + lane_row + j % 4 / 2 * 8] +=
                    sums[j / 4].x[j % 4];
    }
}

__device__ inline void scan_rows(
    const Matrix& state, const Real* phi, const Rows& v, const Real* rho, const Rows& out
) {
    Square square = square_of_coefficients(rho, phi, state.n_rows, false);
    for (int column = 32 * warp_id(); column < v.width; column += 32 * WARPS) {
        Sum sums[2][TILES] = {};
        add_rows(rho, state, column, sums);
        add_tokens(square, v, column, false, sums);
        store_sums(out, column, sums, false);
    }
    accumulate(phi, state, v);
}

__device__ inline void scan_weights(
    const Matrix& state, const Real* phi, const Rows& v, const Rows& g, Real* h
) {
    project(state, g, h);
    add_coefficients(square_of_rows(g, v, false), phi, state.n_rows, false, h);
    __syncthreads();
    accumulate(phi, state, v);
}

__device__ inline void scan_rows_backward(
    const Call& call, const Matrix& d_state, const Stash& first, i64 repeats, const Rows& first_g,
    const Real* phi, const Rows& v, const Rows& d_v, bool adds, Real* d_phi
) {
    i64 step = 2 * TOKENS * d_state.n_rows;  // from the rho of one query head to the next
    project(d_state, v, d_phi, true);
    Rows g = first_g;
    for (i64 r = 0; r < repeats; ++r, g.first += call.d_out.head)
        add_coefficients(
            square_of_rows(v, g, true), first.rho + r * step, d_state.n_rows, true, d_phi
        );
    __syncthreads();  // d_v may overwrite v
    for (int column = 32 * warp_id(); d_v.array->data != nullptr && column < v.width;
         column += 32 * WARPS) {
        Sum sums[2][TILES] = {};
        add_rows(phi, d_state, column, sums);
        g = first_g;
        for (i64 r = 0; r < repeats; ++r, g.first += call.d_out.head) {
            Square square = square_of_coefficients(phi, first.rho + r * step, d_state.n_rows, true);
            add_tokens(square, g, column, true, sums);
        }
        store_sums(d_v, column, sums, adds);
    }
    g = first_g;
    for (i64 r = 0; r < repeats; ++r, g.first += call.d_out.head)
        accumulate(first.rho + r * step, d_state, g);
}
