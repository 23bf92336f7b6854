// y = a w^T with an epilogue E, a T [M, K], w T [N, K] row-major, sums in f32. K is a multiple of 8, M and N are any.
//   store_f32: y f32 [M, N] · residual: y f32 [M, N] += · silu: y T [M, F] = silu(gate) * up, w T [2 F, K] with the gate
//   rows first, and F stands for N everywhere below
// gemm_tiled_T_E: any M. Grid (ceil(N / 128) or ceil(F / 64), ceil(M / 128)), block 256, no dynamic shared memory.
//   workspace and tickets are not used. The order of sums does not depend on M, N or the grid.
// gemm_stream_T_E_P: M <= P, P = 8, 16, 32 or 64, bound by the bytes of w. Grid: any number of blocks (SMs * 2 fill sm_80,
//   90 and 100, SMs elsewhere), block 256, dynamic shared memory 4 * (16384 + 128 P) bytes.
//   workspace f32 [2 grid 128 P] · tickets i32 [ceil(N / 128) or ceil(F / 64)], zero before and after.
//   Every block takes the same number of units (128 rows of w by 64 columns), running through tiles of 128 rows; a tile
//   that several blocks share is summed by the last of them, in the blocks' order. The order of sums depends on the
//   grid, N and K, not on M or P. Bytes: 2 N K + (N / 128) 2 M K from L2; flops 2 M N K.
//   An entry of its own for each P, because registers are given by the largest path in an entry: up to P = 32 a block
//   fits beside two blocks of attention_decode and fetches its weights while they run.
//
// Weight rows are the mma's M, tokens its N (8 each). `multiply` is the only part of either that knows how weights are
// stored.
#include "common.cuh"

enum Epilogue { STORE_F32, RESIDUAL, SILU };

/// One or two of the epilogue's outputs at (token m, column n).
template <Epilogue E, class T>
DEVICE void finish(void* y, int m, int n, int N, float value, float up) {
    const u64 at = u64(m) * N + n;
    if constexpr (E == STORE_F32) static_cast<float*>(y)[at] = value;
    if constexpr (E == RESIDUAL) add_to(static_cast<float*>(y) + at, value);
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

/// Place of a 16-byte chunk (0..7) of a row of 128 bytes: eight rows of one chunk fall into different banks. Rows that
/// are a multiple of eight apart differ by 128 bytes a row.
DEVICE int place(int row, int chunk) { return row * 128 + ((chunk ^ (row & 7)) << 4); }

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

/// How the units of all tiles, laid one after another, are dealt to the blocks. No block that takes part is without one.
struct Deal {
    int steps;  // units of one tile
    int units, blocks;

    DEVICE Deal(int tiles, int steps) : steps(steps), units(tiles * steps), blocks(min(int(gridDim.x), tiles * steps)) {}
    DEVICE int begin(int block) const { return int(u64(units) * block / blocks); }
    DEVICE int owner(int unit) const { return int(((u64(unit) + 1) * blocks - 1) / units); }
};

/// This thread's copies: one 16-byte chunk of every 32nd row of a tile of w, and of every 32nd token. What changes only
/// from tile to tile is worked out in `begin_tile`; a unit adds its column.
template <Epilogue E, class T, int TOKENS>
struct Copies {
    static constexpr int EACH = ROWS / 32, TOKENS_EACH = (TOKENS + 31) / 32;
    /// Rows of w from one of this thread's to the next: with SILU, half of 32 rows of a tile are up rows.
    static constexpr int APART = E == SILU ? 16 : 32;

    const T *tokens, *weights;  // column 0 of this thread's chunk in its first token, and in the tile's first row
    int tokens_left, rows_left;  // how many of them exist
    int to;                      // where they go in a stage

    DEVICE static int row() { return threadIdx.x >> 3; }
    DEVICE static int chunk() { return threadIdx.x & 7; }

    DEVICE Copies(const T* a, int M, int K)
        : tokens(a + u64(row()) * K + chunk() * 8), tokens_left((M - row() + 31) / 32), to(place(row(), chunk())) {}

    DEVICE void begin_tile(const T* w, int tile, int N, int K) {
        const int first = E == SILU ? tile * 64 + (row() >> 4) * 8 + (row() & 7) : tile * ROWS + row();
        weights = w + u64(first + (E == SILU && (row() & 8) ? N : 0)) * K + chunk() * 8;
        rows_left = (N - first + APART - 1) / APART;
    }
    DEVICE void load_weights(Shared stage, int step, int K) const {
        const int exist = step * COLUMNS + chunk() * 8 < K ? rows_left : 0;
        const T* from = weights + step * COLUMNS;
#pragma unroll
        for (int i = 0; i < EACH; i++) copy_async16_or_zero(stage + to + i * 32 * 128, from + u64(i * APART) * K, i < exist);
    }
    DEVICE void load_tokens(Shared stage, int step, int K) const {
        if (TOKENS < 32 && row() >= TOKENS) return;
        const int exist = step * COLUMNS + chunk() * 8 < K ? tokens_left : 0;
        const T* from = tokens + step * COLUMNS;
#pragma unroll
        for (int i = 0; i < TOKENS_EACH; i++) {
            copy_async16_or_zero(stage + WEIGHT_BYTES + to + i * 32 * 128, from + u64(i * 32) * K, i < exist);
        }
    }
};

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

    /// What this lane reads of a stage, for ldmatrix: sixteen rows of w by 16 columns, and eight tokens by 32 columns, both
    /// at column 0. Column c is at the same place with its chunk's bits flipped: `place ^ c * 2`.
    DEVICE static int weight_place() { return place(first_row() + int(threadIdx.x & 15), int(threadIdx.x >> 4) & 1); }
    DEVICE static int token_place() { return WEIGHT_BYTES + place(first_token() + int(threadIdx.x & 7), int(threadIdx.x >> 3) & 3); }

    DEVICE void multiply(Shared stage, int weight_at, int token_at) {
#pragma unroll
        for (int k = 0; k < COLUMNS; k += 32) {
            u32 b[TOKEN_TILES][4];
#pragma unroll
            for (int j = 0; j < TOKEN_TILES; j++) ldmatrix_x4(b[j], stage + (token_at ^ k * 2) + j * 8 * 128);
#pragma unroll
            for (int half = 0; half < 2; half++) {
#pragma unroll
                for (int i = 0; i < ROW_TILES; i++) {
                    u32 weights[4];
                    ldmatrix_x4(weights, stage + (weight_at ^ (k + half * 16) * 2) + i * 16 * 128);
#pragma unroll
                    for (int j = 0; j < TOKEN_TILES; j++) mma16816<T>(sum[i][j], weights, {b[j][half * 2], b[j][half * 2 + 1]});
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
        // A block has at most two shared tiles: the one it begins inside of (part 0) and the one it ends in (part 1). Of a
        // tile's blocks, all but the first begin inside of it.
        auto part = [&](int block) { return workspace + u64(2 * block + (block == first)) * (ROWS * TOKENS) + threadIdx.x; };
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
        // Several parts are on their way at a time, as many as registers hold; they are summed in the blocks' order.
        constexpr int GROUP = SUMS >= 16 ? 1 : 32 / SUMS;
        for (int block = first; block <= last; block += GROUP) {
            float theirs[GROUP][SUMS];
#pragma unroll
            for (int g = 0; g < GROUP; g++) {
                const float* from = part(min(block + g, last));
#pragma unroll
                for (int i = 0; i < SUMS; i++) theirs[g][i] = load_l2(from + i * 256);
            }
#pragma unroll
            for (int g = 0; g < GROUP; g++) {
                if (block + g > last) break;
#pragma unroll
                for (int i = 0; i < SUMS; i++) sum[i / (TOKEN_TILES * 4)][i / 4 % TOKEN_TILES][i % 4] += theirs[g][i];
            }
        }
        return true;
    }

    DEVICE void run(void* y, const T* a, const T* w, float* workspace, int* tickets, int M, int N, int K) {
        DYNAMIC_SHARED(memory);
        const Shared ring = shared_place(memory);
        constexpr int TILE_COLUMNS = E == SILU ? 64 : ROWS;
        const Deal deal((N + TILE_COLUMNS - 1) / TILE_COLUMNS, (K + COLUMNS - 1) / COLUMNS);
        if (int(blockIdx.x) >= deal.blocks) return pdl_wait();
        const int steps = deal.steps, begin = deal.begin(blockIdx.x), units = deal.begin(blockIdx.x + 1) - begin;
        int tile = begin / steps, step = begin % steps;  // of the unit that is multiplied

        Copies<E, T, TOKENS> copies(a, M, K);
        int ahead = 0, next_tile = tile, next_step = step;  // the unit that is fetched
        copies.begin_tile(w, tile, N, K);
        auto advance = [&] {
            ahead++;
            if (++next_step == steps) next_step = 0, copies.begin_tile(w, ++next_tile, N, K);
        };
        // Weights are nobody's output: they are on their way before the grid before this one has ended.
        for (int s = 0; s < STAGES - 1 && ahead < units; s++, advance()) copies.load_weights(ring + s * STAGE_BYTES, next_step, K);
        pdl_wait();
        pdl_launch();
        for (int s = 0; s < STAGES - 1; s++) {
            if (s < units) copies.load_tokens(ring + s * STAGE_BYTES, (step + s) % steps, K);
            copy_commit();
        }

        const int weight_at = weight_place(), token_at = token_place();
        clear();
        bool whole = step == 0;
        for (int unit = 0; unit < units; unit++) {
            copy_wait<STAGES - 2>();
            __syncthreads();
            if (ahead < units) {
                const Shared free_stage = ring + u32(ahead) % STAGES * STAGE_BYTES;
                copies.load_weights(free_stage, next_step, K);
                copies.load_tokens(free_stage, next_step, K);
                advance();
            }
            copy_commit();
            multiply(ring + u32(unit) % STAGES * STAGE_BYTES, weight_at, token_at);
            step++;
            if (step == steps || unit + 1 == units) {
                whole = whole && step == steps;
                if (whole || combine(workspace, tickets, tile, deal)) write(y, tile, M, N);
                clear();
                tile++, step = 0, whole = true;
            }
        }
    }
};
}  // namespace stream

#define GEMM(name, blocks_an_sm, T, E, Y, body) \
    extern "C" __global__ void __launch_bounds__(256, blocks_an_sm) name(Y* y, const T* a, const T* w, float* workspace, int* tickets, int M, int N, int K) { \
        body; \
    }
#define STREAM(name, T, E, Y, P) GEMM(name##_##P, P <= 32 ? 3 : 2, T, E, Y, (stream::Stream<E, T, P>().run(y, a, w, workspace, tickets, M, N, K)))
#define BOTH(t, e, T, E, Y) \
    GEMM(gemm_tiled_##t##_##e, 2, T, E, Y, (tiled::gemm<E, T>(y, a, w, M, N, K))) \
    STREAM(gemm_stream_##t##_##e, T, E, Y, 8) \
    STREAM(gemm_stream_##t##_##e, T, E, Y, 16) \
    STREAM(gemm_stream_##t##_##e, T, E, Y, 32) \
    STREAM(gemm_stream_##t##_##e, T, E, Y, 64)

BOTH(bf16, store_f32, Bf16, STORE_F32, float)
BOTH(bf16, residual, Bf16, RESIDUAL, float)
BOTH(bf16, silu, Bf16, SILU, Bf16)
BOTH(f16, store_f32, F16, STORE_F32, float)
BOTH(f16, residual, F16, RESIDUAL, float)
BOTH(f16, silu, F16, SILU, F16)
