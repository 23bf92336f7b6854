// synthetic_T: values of a synthetic tensor from its key, bit-identical to src/weights/synthetic.rs.
//   out[i] = center + scale * unit(first + i) for i < count · T is bf16, f16 (rounded to nearest even) or f32
// Any grid, block 256. Bytes: what it writes; a dozen integer multiplications a value.
#include "common.cuh"

DEVICE float synthetic_value(u64 key, float center, float scale, u64 index) {
    const int bits = int(mix(key + (index + 1) * GOLDEN) >> 40);
    const float unit = __fmul_rn(float(2 * bits + 1 - (1 << 24)), 1.0f / 16777216.0f);
    return __fadd_rn(center, __fmul_rn(scale, unit));
}

DEVICE void store(float* out, float value) { *out = value; }
DEVICE void store(Bf16* out, float value) { *out = from_f32<Bf16>(value); }
DEVICE void store(F16* out, float value) { *out = from_f32<F16>(value); }

template <class T>
DEVICE void synthetic(T* out, u64 key, float center, float scale, u64 first, u64 count) {
    pdl_wait();
    const u64 threads = u64(gridDim.x) * blockDim.x;
    for (u64 i = u64(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += threads) {
        store(out + i, synthetic_value(key, center, scale, first + i));
    }
    // Products fetch weights before they wait: only once all of this block's are in L2 may the next grid begin.
    __threadfence();
    __syncthreads();
    pdl_launch();
}

extern "C" __global__ void __launch_bounds__(256) synthetic_bf16(Bf16* out, u64 key, float center, float scale, u64 first, u64 count) {
    synthetic(out, key, center, scale, first, count);
}
extern "C" __global__ void __launch_bounds__(256) synthetic_f16(F16* out, u64 key, float center, float scale, u64 first, u64 count) {
    synthetic(out, key, center, scale, first, count);
}
extern "C" __global__ void __launch_bounds__(256) synthetic_f32(float* out, u64 key, float center, float scale, u64 first, u64 count) {
    synthetic(out, key, center, scale, first, count);
}
