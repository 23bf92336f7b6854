// y = a w^T with an epilogue E, a T [M, K], w T [N, K] row-major, sums in f32. K is a multiple of 8, M and N are any.
//   store_f32: y f32 [M, N] · residual: y f32 [M, N] += · silu: y T [M, F] = silu(gate) * up, w T [2 F, K] with the gate
//   rows first, and F stands for N everywhere below
// gemm_tiled_T_E: any M. Grid (ceil(N / 128) or ceil(F / 64), ceil(M / 128)), block 256, no dynamic shared memory.
//   workspace and tickets are not used. The order of sums does not depend on M, N or the grid.
// gemm_stream_T_E: M <= 64, bound by the bytes of w. Grid: any number of blocks (SMs * 2 fill sm_80, 90 and 100, SMs
//   elsewhere), block 256, dynamic shared memory 4 * (16384 + 128 P) bytes, P = M rounded up to 8, 16, 32 or 64.
//   workspace f32 [2 grid 128 P] · tickets i32 [ceil(N / 128) or ceil(F / 64)], zero before and after.
//   Every block takes the same number of units (128 rows of w by 64 columns), running through tiles of 128 rows; a tile
//   that several blocks share is summed by the last of them, in the blocks' order. The order of sums depends on the
//   grid, N and K, not on M. Bytes: 2 N K + (N / 128) 2 M K from L2; flops 2 M N K.
//
// Weight rows are the mma's M, tokens its N (8 each). The order of k within a product is free, so it is chosen such that
// sixteen consecutive bytes of a row are exactly one thread's fragments of two mma: no reordering of w is stored.
// `WeightFragments` is the only part that knows how weights are stored.
#include "common.cuh"

enum Epilogue { STORE_F32, RESIDUAL, SILU };

/// One or two of the epilogue's outputs at (token m, column n).
template <Epilogue E, class T>
DEVICE void finish(void* y, int m, int n, int N, float value, float up) {
    const u64 at = u64(m) * N + n;
    if constexpr (E == STORE_F32) static_cast<float*>(y)[at] = value;
    if constexpr (E == RESIDUAL) static_cast<float*>(y)[at] += value;
    if constexpr (E == SILU) static_cast<T*>(y)[at] = from_f32<T>(silu(value) * up);
}

// ---- Tiled --------------------------------------------------------------------------------------------------------
// Block tile 128 tokens x 128 rows of w x 32; warps 2 x 4, each 64 x 32. With SILU, rows 0..15 of a warp's 32 are gate
// rows and 16..31 the up rows of the same features.
namespace tiled {
constexpr int M_TILE = 128, N_TILE = 128, K_TILE = 32, STAGES = 3;
constexpr int STAGE_BYTES = (M_TILE + N_TILE) * K_TILE * 2;

/// Place of a 16-byte chunk (0..3) of a row: eight rows of one chunk fall into different banks.
DEVICE int place(int row, int chunk) { return row * 64 + ((chunk ^ ((row >> 1) & 3)) << 4); }

struct Tile {
    int m, n;
};
/// Blocks that run together take M_GROUP rows of tiles and a few columns, so that both operands come from L2.
DEVICE Tile tile_of_block() {
    constexpr int M_GROUP = 8;
    const int linear = blockIdx.y * gridDim.x + blockIdx.x, first = linear / (M_GROUP * gridDim.x) * M_GROUP;
    const int rows = min(M_GROUP, int(gridDim.y) - first), within = linear - first * gridDim.x;
    return {first + within % rows, within / rows};
}

/// Row of w that is row `r` of tile column `tile`; -1 beyond the end.
template <Epilogue E>
DEVICE int weight_row(int tile, int r, int N) {
    if constexpr (E == SILU) {
        const int feature = tile * 64 + (r >> 5) * 16 + (r & 15);
        return feature < N ? feature + ((r & 16) ? N : 0) : -1;
    }
    const int row = tile * N_TILE + r;
    return row < N ? row : -1;
}

template <Epilogue E, class T>
DEVICE void load_stage(unsigned char* stage, const T* a, const T* w, Tile tile, int M, int N, int K, int k_first) {
    for (int i = threadIdx.x; i < (M_TILE + N_TILE) * 4; i += 256) {
        const int chunk = i & 3, k = k_first + chunk * 8;
        const bool is_weight = i >= M_TILE * 4;
        const int r = (i >> 2) - (is_weight ? M_TILE : 0);
        int row = is_weight ? weight_row<E>(tile.n, r, N) : tile.m * M_TILE + r;
        if (!is_weight && row >= M) row = -1;
        const bool valid = row >= 0 && k < K;
        const T* from = is_weight ? w : a;
        copy_async16_or_zero(stage + (is_weight ? M_TILE * 64 : 0) + place(r, chunk), valid ? from + u64(row) * K + k : from, valid);
    }
}

template <class T>
DEVICE void multiply_stage(const unsigned char* stage, float (&sum)[4][4][4]) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const unsigned char* tokens = stage;
    const unsigned char* weights = stage + M_TILE * 64;
#pragma unroll
    for (int step = 0; step < K_TILE / 16; step++) {
        u32 a[4][4], b[2][4];
#pragma unroll
        for (int i = 0; i < 4; i++) ldmatrix_x4(a[i], tokens + place((warp >> 2) * 64 + i * 16 + (lane & 15), step * 2 + (lane >> 4)));
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const int row = (warp & 3) * 32 + j * 16 + (lane & 7) + ((lane >> 4) << 3);
            ldmatrix_x4(b[j], weights + place(row, step * 2 + ((lane >> 3) & 1)));
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
#pragma unroll
            for (int j = 0; j < 4; j++) mma16816<T>(sum[i][j], a[i], {b[j >> 1][(j & 1) * 2], b[j >> 1][(j & 1) * 2 + 1]});
        }
    }
}

template <Epilogue E, class T>
DEVICE void write(void* y, const float (&sum)[4][4][4], Tile tile, int M, int N) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    constexpr int columns = E == SILU ? 2 : 4;
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int j = 0; j < columns; j++) {
#pragma unroll
            for (int v = 0; v < 4; v++) {
                const int m = tile.m * M_TILE + (warp >> 2) * 64 + i * 16 + (lane >> 2) + (v >> 1) * 8;
                const int n = tile.n * (E == SILU ? 64 : 128) + (warp & 3) * (E == SILU ? 16 : 32) + j * 8 + (lane & 3) * 2 + (v & 1);
                if (m < M && n < N) finish<E, T>(y, m, n, N, sum[i][j][v], sum[i][E == SILU ? j + 2 : j][v]);
            }
        }
    }
}

template <Epilogue E, class T>
DEVICE void gemm(void* y, const T* a, const T* w, int M, int N, int K) {
    SHARED(unsigned char, ring, STAGES * STAGE_BYTES);
    float sum[4][4][4] = {};
    const int steps = (K + K_TILE - 1) / K_TILE;
    const Tile tile = tile_of_block();
    pdl_wait();
    for (int s = 0; s < STAGES - 1; s++) {
        if (s < steps) load_stage<E>(ring + s * STAGE_BYTES, a, w, tile, M, N, K, s * K_TILE);
        copy_commit();
    }
    for (int s = 0; s < steps; s++) {
        copy_wait<STAGES - 2>();
        __syncthreads();
        const int next = s + STAGES - 1;
        if (next < steps) load_stage<E>(ring + next % STAGES * STAGE_BYTES, a, w, tile, M, N, K, next * K_TILE);
        copy_commit();
        multiply_stage<T>(ring + s % STAGES * STAGE_BYTES, sum);
    }
    pdl_launch();
    write<E, T>(y, sum, tile, M, N);
}
}  // namespace tiled

// ---- Streaming ----------------------------------------------------------------------------------------------------
namespace stream {
constexpr int ROWS = 128, COLUMNS = 64, STAGES = 4;
constexpr int WEIGHT_BYTES = ROWS * COLUMNS * 2;

/// Place of a 16-byte chunk (0..7) of a row of 128 bytes: a quarter warp reads four chunks of two rows, all banks once.
DEVICE int place(int row, int chunk) { return row * 128 + ((chunk ^ ((row & 1) << 2)) << 4); }

/// Row of w that is row `r` of a tile; -1 beyond the end. With SILU, rows 0..7 of sixteen are gate rows and 8..15 the
/// up rows of the same features, so that one thread holds both.
template <Epilogue E>
DEVICE int weight_row(int tile, int r, int N) {
    if constexpr (E == SILU) {
        const int feature = tile * 64 + (r >> 4) * 8 + (r & 7);
        return feature < N ? feature + ((r & 8) ? N : 0) : -1;
    }
    const int row = tile * ROWS + r;
    return row < N ? row : -1;
}

/// The weight side of two mma: sixteen rows of w by 32 columns, from a stage in shared memory.
template <class T>
struct WeightFragments {
    u32 first[4], second[4];

    DEVICE WeightFragments(const unsigned char* stage, int row, int block) {
        const int lane = threadIdx.x % 32, g = lane >> 2, t = lane & 3;
        const Vec16 upper = shared_load128(stage + place(row + g, block * 4 + t));
        const Vec16 lower = shared_load128(stage + place(row + g + 8, block * 4 + t));
        first[0] = upper.word[0], first[1] = lower.word[0], first[2] = upper.word[1], first[3] = lower.word[1];
        second[0] = upper.word[2], second[1] = lower.word[2], second[2] = upper.word[3], second[3] = lower.word[3];
    }
};

/// How the units of all tiles, laid one after another, are dealt to the blocks. No block that takes part is without one.
struct Deal {
    int steps;  // units of one tile
    int units, blocks;

    DEVICE Deal(int tiles, int steps) : steps(steps), units(tiles * steps), blocks(min(int(gridDim.x), tiles * steps)) {}
    DEVICE int begin(int block) const { return int(u64(units) * block / blocks); }
    DEVICE int owner(int unit) const { return int(((u64(unit) + 1) * blocks - 1) / units); }
};

template <Epilogue E, class T>
DEVICE void load_weights(unsigned char* stage, const T* w, int N, int K, int tile, int step) {
#pragma unroll
    for (int i = 0; i < ROWS * 8 / 256; i++) {
        const int r = (threadIdx.x >> 3) + i * 32, chunk = threadIdx.x & 7, k = step * COLUMNS + chunk * 8;
        const int row = weight_row<E>(tile, r, N);
        const bool valid = row >= 0 && k < K;
        copy_async16_or_zero(stage + place(r, chunk), valid ? w + u64(row) * K + k : w, valid);
    }
}

template <class T, int TOKENS>
DEVICE void load_tokens(unsigned char* stage, const T* a, int M, int K, int step) {
    for (int i = threadIdx.x; i < TOKENS * 8; i += 256) {
        const int m = i >> 3, chunk = i & 7, k = step * COLUMNS + chunk * 8;
        const bool valid = m < M && k < K;
        copy_async16_or_zero(stage + place(m, chunk), valid ? a + u64(m) * K + k : a, valid);
    }
}

/// TOKENS = 8, 16, 32, 64. Warps split the tile's rows, and at 64 tokens also the tokens in halves.
template <Epilogue E, class T, int TOKENS>
struct Stream {
    static constexpr int TOKEN_WARPS = TOKENS == 64 ? 2 : 1;
    static constexpr int ROW_TILES = TOKEN_WARPS;  // of 16 rows a warp
    static constexpr int TOKEN_TILES = TOKENS / 8 / TOKEN_WARPS;
    static constexpr int STAGE_BYTES = WEIGHT_BYTES + TOKENS * COLUMNS * 2;
    static constexpr int SUMS = ROW_TILES * TOKEN_TILES * 4;

    float sum[ROW_TILES][TOKEN_TILES][4];

    DEVICE void clear() {
#pragma unroll
        for (int i = 0; i < SUMS; i++) sum[i / (TOKEN_TILES * 4)][i / 4 % TOKEN_TILES][i % 4] = 0.0f;
    }

    DEVICE static int first_row() { return int(threadIdx.x / 32) / TOKEN_WARPS * ROW_TILES * 16; }
    DEVICE static int first_token() { return int(threadIdx.x / 32) % TOKEN_WARPS * TOKEN_TILES * 8; }

    DEVICE void multiply(const unsigned char* stage) {
        const int lane = threadIdx.x % 32;
        const unsigned char* tokens = stage + WEIGHT_BYTES;
#pragma unroll
        for (int block = 0; block < COLUMNS / 32; block++) {
            Vec16 b[TOKEN_TILES];
#pragma unroll
            for (int j = 0; j < TOKEN_TILES; j++) {
                b[j] = shared_load128(tokens + place(first_token() + j * 8 + (lane >> 2), block * 4 + (lane & 3)));
            }
#pragma unroll
            for (int i = 0; i < ROW_TILES; i++) {
                const WeightFragments<T> weight(stage, first_row() + i * 16, block);
#pragma unroll
                for (int j = 0; j < TOKEN_TILES; j++) {
                    mma16816<T>(sum[i][j], weight.first, {b[j].word[0], b[j].word[1]});
                    mma16816<T>(sum[i][j], weight.second, {b[j].word[2], b[j].word[3]});
                }
            }
        }
    }

    DEVICE void write(void* y, int tile, int M, int N) const {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < ROW_TILES; i++) {
#pragma unroll
            for (int j = 0; j < TOKEN_TILES; j++) {
#pragma unroll
                for (int v = 0; v < (E == SILU ? 2 : 4); v++) {
                    const int m = first_token() + j * 8 + (lane & 3) * 2 + (v & 1);
                    const int r = first_row() + i * 16 + (lane >> 2) + (v >> 1) * 8;
                    const int n = weight_row<E>(tile, r, N);
                    if (m < M && n >= 0) finish<E, T>(y, m, n, N, sum[i][j][v], sum[i][j][E == SILU ? v + 2 : v]);
                }
            }
        }
    }

    /// This block's part of a tile that others share; true in the block that came last, with all parts summed.
    DEVICE bool combine(float* workspace, int* tickets, int tile, const Deal& deal) {
        SHARED(int, arrived, 1);
        const int tile_begin = tile * deal.steps;
        const int first = deal.owner(tile_begin), last = deal.owner(tile_begin + deal.steps - 1);
        // A block has at most two shared tiles: the one it begins inside of (part 0) and the one it ends in (part 1).
        auto part = [&](int block) {
            const int which = deal.begin(block) > tile_begin ? 0 : 1;
            return workspace + u64(2 * block + which) * (ROWS * TOKENS) + threadIdx.x;
        };
        float* mine = part(blockIdx.x);
#pragma unroll
        for (int i = 0; i < SUMS; i++) mine[i * 256] = sum[i / (TOKEN_TILES * 4)][i / 4 % TOKEN_TILES][i % 4];
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) *arrived = atomicAdd(tickets + tile, 1);
        __syncthreads();
        if (*arrived != last - first) return false;
        __threadfence();
        if (threadIdx.x == 0) tickets[tile] = 0;
        clear();
        for (int block = first; block <= last; block++) {
            const float* theirs = part(block);
#pragma unroll
            for (int i = 0; i < SUMS; i++) sum[i / (TOKEN_TILES * 4)][i / 4 % TOKEN_TILES][i % 4] += load_l2(theirs + i * 256);
        }
        return true;
    }

    DEVICE void run(void* y, const T* a, const T* w, float* workspace, int* tickets, int M, int N, int K) {
        DYNAMIC_SHARED(ring);
        constexpr int TILE_COLUMNS = E == SILU ? 64 : ROWS;
        const Deal deal((N + TILE_COLUMNS - 1) / TILE_COLUMNS, (K + COLUMNS - 1) / COLUMNS);
        if (int(blockIdx.x) >= deal.blocks) return pdl_wait();
        const int steps = deal.steps, begin = deal.begin(blockIdx.x), end = deal.begin(blockIdx.x + 1);

        // Weights are nobody's output: they are on their way before the grid before this one has ended.
        for (int s = 0; s < STAGES - 1; s++) {
            const int unit = begin + s;
            if (unit < end) load_weights<E>(ring + s * STAGE_BYTES, w, N, K, unit / steps, unit % steps);
        }
        pdl_wait();
        for (int s = 0; s < STAGES - 1; s++) {
            const int unit = begin + s;
            if (unit < end) load_tokens<T, TOKENS>(ring + s * STAGE_BYTES + WEIGHT_BYTES, a, M, K, unit % steps);
            copy_commit();
        }

        pdl_launch();

        clear();
        int tile = begin / steps, step = begin % steps;
        int next_tile = (begin + STAGES - 1) / steps, next_step = (begin + STAGES - 1) % steps;
        bool whole = step == 0;
        for (int unit = begin, slot = 0; unit < end; unit++) {
            copy_wait<STAGES - 2>();
            __syncthreads();
            if (unit + STAGES - 1 < end) {
                unsigned char* free_stage = ring + (slot + STAGES - 1) % STAGES * STAGE_BYTES;
                load_weights<E>(free_stage, w, N, K, next_tile, next_step);
                load_tokens<T, TOKENS>(free_stage + WEIGHT_BYTES, a, M, K, next_step);
            }
            copy_commit();
            if (++next_step == steps) next_step = 0, next_tile++;
            multiply(ring + slot * STAGE_BYTES);
            slot = (slot + 1) % STAGES;
            step++;
            if (step == steps || unit + 1 == end) {
                whole = whole && step == steps;
                if (whole || combine(workspace, tickets, tile, deal)) write(y, tile, M, N);
                clear();
                tile++, step = 0, whole = true;
            }
        }
    }
};

template <Epilogue E, class T>
DEVICE void gemm(void* y, const T* a, const T* w, float* workspace, int* tickets, int M, int N, int K) {
    if (M <= 8) return Stream<E, T, 8>().run(y, a, w, workspace, tickets, M, N, K);
    if (M <= 16) return Stream<E, T, 16>().run(y, a, w, workspace, tickets, M, N, K);
    if (M <= 32) return Stream<E, T, 32>().run(y, a, w, workspace, tickets, M, N, K);
    Stream<E, T, 64>().run(y, a, w, workspace, tickets, M, N, K);
}
}  // namespace stream

#define GEMM(name, kind, blocks_an_sm, T, E, Y) \
    extern "C" __global__ void __launch_bounds__(256, blocks_an_sm) name(Y* y, const T* a, const T* w, float* workspace, int* tickets, int M, int N, int K) { \
        kind(E, T); \
    }
#define TILED(E, T) tiled::gemm<E, T>(y, a, w, M, N, K)
#define STREAM(E, T) stream::gemm<E, T>(y, a, w, workspace, tickets, M, N, K)

GEMM(gemm_tiled_bf16_store_f32, TILED, 2, Bf16, STORE_F32, float)
GEMM(gemm_tiled_bf16_residual, TILED, 2, Bf16, RESIDUAL, float)
GEMM(gemm_tiled_bf16_silu, TILED, 2, Bf16, SILU, Bf16)
GEMM(gemm_tiled_f16_store_f32, TILED, 2, F16, STORE_F32, float)
GEMM(gemm_tiled_f16_residual, TILED, 2, F16, RESIDUAL, float)
GEMM(gemm_tiled_f16_silu, TILED, 2, F16, SILU, F16)
GEMM(gemm_stream_bf16_store_f32, STREAM, 2, Bf16, STORE_F32, float)
GEMM(gemm_stream_bf16_residual, STREAM, 2, Bf16, RESIDUAL, float)
GEMM(gemm_stream_bf16_silu, STREAM, 2, Bf16, SILU, Bf16)
GEMM(gemm_stream_f16_store_f32, STREAM, 2, F16, STORE_F32, float)
GEMM(gemm_stream_f16_residual, STREAM, 2, F16, RESIDUAL, float)
GEMM(gemm_stream_f16_silu, STREAM, 2, F16, SILU, F16)
