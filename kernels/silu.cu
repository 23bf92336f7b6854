// silu_mul_T: out[t, i] = silu(in[t, i]) * in[t, f + i], for a gate and up product that a library made. f32 in between,
// one rounding to T.
//   out T [n, f] · in T [n, 2 f], the gate columns first
// Grid (n, ceil(f / 2048)), block 256: eight values a thread. f is a multiple of 8. Bytes: n f (4 read + 2 written).
#include "common.cuh"

template <class T>
DEVICE void silu_mul(T* out, const T* in, int f) {
    const int i = (blockIdx.y * blockDim.x + threadIdx.x) * 8;
    pdl_wait();
    pdl_launch();
    if (i >= f) return;
    const T* row = in + u64(blockIdx.x) * 2 * f;
    const Vec16 gate = load128(row + i), up = load128(row + f + i);
    Vec16 result;
    for (int j = 0; j < 4; j++) {
        const float a = silu(low<T>(gate.word[j])) * low<T>(up.word[j]);
        const float b = silu(high<T>(gate.word[j])) * high<T>(up.word[j]);
        result.word[j] = pack<T>(a, b);
    }
    store128(out + u64(blockIdx.x) * f + i, result);
}

extern "C" __global__ void __launch_bounds__(256) silu_mul_bf16(Bf16* out, const Bf16* in, int f) { silu_mul(out, in, f); }
extern "C" __global__ void __launch_bounds__(256) silu_mul_f16(F16* out, const F16* in, int f) { silu_mul(out, in, f); }
