// Sums over segments, in float64 and in their order, so that bits do not depend on how work was spread.
#include "cuda/warp.cuh"

constexpr int AHEAD = 8;  // segments whose numbers are asked for before they are needed

// parts [n, heads * repeats, width]: add up `repeats` neighbours, leave in the first what came before it, and move on
// carry [n_owners, heads, width]. A thread has one column.
extern "C" __global__ void scan(
    const i64* owners, double* parts, double* carry, i64 n, i64 heads, i64 repeats, i64 width, i64 reverse) {
    i64 column = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= heads * width) return;
    i64 head = column / width, offset = head * repeats * width + column % width, step = heads * repeats * width;
    i64 owner = -1;  // a part's owner never comes back after that of another
    double total = 0;
    for (i64 first = 0; first < n; first += AHEAD) {
        double sums[AHEAD];
#pragma unroll
        for (int j = 0; j < AHEAD; ++j) {
            if (first + j >= n) continue;
            const double* part = parts + (reverse ? n - 1 - first - j : first + j) * step + offset;
            sums[j] = part[0];
            for (i64 r = 1; r < repeats; ++r) sums[j] += part[r * width];
        }
#pragma unroll
        for (int j = 0; j < AHEAD; ++j) {
            if (first + j >= n) continue;
            i64 i = reverse ? n - 1 - first - j : first + j;
            if (owners[i] != owner) {
                if (owner >= 0) carry[owner * heads * width + column] = total;
                owner = owners[i];
                total = carry[owner * heads * width + column];
            }
            parts[i * step + offset] = total;
            total += sums[j];
        }
    }
    if (owner >= 0) carry[owner * heads * width + column] = total;
}
