// From rows of logits to tokens, in two stages so that one row uses many blocks. The arithmetic is that of
// src/backend/sampling.rs to the bit: integers, or single f32 operations rounded once and never fused by the compiler.
// sample_stage1: each block takes one chunk of one row's ids and writes its best (value, id).
//   logits f32 [r, vocab] · temperature f32 [r] (0: greedy) · seeds_lo, seeds_hi u32 [r] · positions i32 [r]
//   best_value f32, best_id i32 [r, chunks]
//   Grid (chunks, r), block 256. Bytes: 4 r vocab.
// sample_stage2: the best of a row's chunks, the lowest id on a tie.
//   samples i32 [r]; -1 where a value is not a number · Grid r, block 32..256 (a multiple of 32).
#include "common.cuh"

constexpr int NOT_A_NUMBER = -1;

DEVICE u64 position_key(u64 seed, u32 position) { return mix(mix(seed + GOLDEN) ^ u64(position)); }

DEVICE float uniform(u64 key, u32 id) {
    const u32 bits = u32(mix(key + GOLDEN * (u64(id) + 1)) >> 41);
    return __fmul_rn(float(2 * bits + 1), 1.0f / 16777216.0f);
}

/// Natural logarithm of a positive normal number (Cephes logf).
DEVICE float natural_log(float x) {
    const u32 shifted = __float_as_uint(x) + (0x3F800000u - 0x3F3504F3u);
    const float exponent = float(int(shifted >> 23) - 127);
    const float f = __fadd_rn(__uint_as_float((shifted & 0x007FFFFFu) + 0x3F3504F3u), -1.0f);
    const float square = __fmul_rn(f, f);
    float series = 7.0376836e-2f;
    series = __fmaf_rn(series, f, -1.151461e-1f);
    series = __fmaf_rn(series, f, 1.1676999e-1f);
    series = __fmaf_rn(series, f, -1.2420141e-1f);
    series = __fmaf_rn(series, f, 1.4249323e-1f);
    series = __fmaf_rn(series, f, -1.6668057e-1f);
    series = __fmaf_rn(series, f, 2.0000715e-1f);
    series = __fmaf_rn(series, f, -2.4999994e-1f);
    series = __fmaf_rn(series, f, 3.3333331e-1f);
    const float tail = __fmaf_rn(exponent, -2.1219444e-4f, __fmul_rn(series, __fmul_rn(f, square)));
    return __fmaf_rn(exponent, 0.6933594f, __fadd_rn(f, __fmaf_rn(square, -0.5f, tail)));
}
DEVICE float gumbel(u64 key, u32 id) { return -natural_log(-natural_log(uniform(key, id))); }

struct Best {
    float value;
    int id;
};
/// A value that is not a number wins over all; then the larger value, then the lower id.
DEVICE Best better(Best a, Best b) {
    if (a.id == NOT_A_NUMBER || b.id == NOT_A_NUMBER) return Best{0.0f, NOT_A_NUMBER};
    return b.value > a.value || (b.value == a.value && b.id < a.id) ? b : a;
}
/// Before any value: loses to all, as every id is lower.
constexpr int NO_ID = 0x7FFFFFFF;

DEVICE Best block_best(Best best, Best* scratch) {
    for (int bits = 16; bits > 0; bits >>= 1) {
        best = better(best, Best{__shfl_xor_sync(WHOLE_WARP, best.value, bits), __shfl_xor_sync(WHOLE_WARP, best.id, bits)});
    }
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = best;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int warp = 1; warp < int(blockDim.x / 32); warp++) best = better(best, scratch[warp]);
    }
    return best;
}

extern "C" __global__ void __launch_bounds__(256) sample_stage1(const float* logits, const float* temperature, const u32* seeds_lo, const u32* seeds_hi,
                                                                const int* positions, float* best_value, int* best_id, int vocab) {
    SHARED(Best, scratch, 8);
    pdl_wait();
    pdl_launch();
    const int row = blockIdx.y, chunks = gridDim.x;
    const int ids = (vocab + chunks - 1) / chunks, first = blockIdx.x * ids, end = min(first + ids, vocab);
    const float warmth = temperature[row];
    const u64 key = position_key(u64(seeds_hi[row]) << 32 | seeds_lo[row], u32(positions[row]));
    Best best = {MINUS_INFINITY, NO_ID};
    for (int id = first + int(threadIdx.x); id < end; id += blockDim.x) {
        float value = logits[u64(row) * vocab + id];
        if (warmth > 0.0f) value = __fadd_rn(__fdiv_rn(value, warmth), gumbel(key, u32(id)));
        best = better(best, Best{value, value == value ? id : NOT_A_NUMBER});
    }
    best = block_best(best, scratch);
    if (threadIdx.x == 0) {
        best_value[row * chunks + blockIdx.x] = best.value;
        best_id[row * chunks + blockIdx.x] = best.id;
    }
}

extern "C" __global__ void __launch_bounds__(256) sample_stage2(int* samples, const float* best_value, const int* best_id, int chunks) {
    SHARED(Best, scratch, 8);
    pdl_wait();
    pdl_launch();
    const int row = blockIdx.x;
    Best best = {MINUS_INFINITY, NO_ID};
    for (int chunk = threadIdx.x; chunk < chunks; chunk += blockDim.x) {
        best = better(best, Best{best_value[row * chunks + chunk], best_id[row * chunks + chunk]});
    }
    best = block_best(best, scratch);
    if (threadIdx.x == 0) samples[row] = best.id;
}
