// rms_norm_T: out[t] = x[r] / sqrt(mean(x[r]^2) + eps) * gain, r = rows[t] or t. f32 sums, one rounding to T.
//   out T [n, d] · x f32 [.., d] · gain f32 [d] · rows i32 [n] or null
// Grid n, block 256. d is a multiple of 8. Bytes: n d (4 read + 2 written); the second read of x hits L1.
#include "common.cuh"

DEVICE float square_sum(Vec16 v) {
    float sum = 0.0f;
    for (int j = 0; j < 4; j++) sum += __uint_as_float(v.word[j]) * __uint_as_float(v.word[j]);
    return sum;
}

template <class T>
DEVICE void rms_norm(T* out, const float* x, const float* gain, const int* rows, int d, float eps) {
    SHARED(float, scratch, 33);
    pdl_wait();
    pdl_launch();
    const float* row = x + u64(rows ? rows[blockIdx.x] : blockIdx.x) * d;
    float sum = 0.0f;
    for (int i = threadIdx.x * 4; i < d; i += blockDim.x * 4) sum += square_sum(load128(row + i));
    const float scale = rsqrtf(block_sum(sum, scratch) / d + eps);
    for (int i = threadIdx.x * 8; i < d; i += blockDim.x * 8) {
        Vec16 result;
        for (int half = 0; half < 2; half++) {
            const Vec16 v = load128(row + i + 4 * half), g = load128(gain + i + 4 * half);
            for (int j = 0; j < 2; j++) {
                const float a = __uint_as_float(v.word[2 * j]) * scale * __uint_as_float(g.word[2 * j]);
                const float b = __uint_as_float(v.word[2 * j + 1]) * scale * __uint_as_float(g.word[2 * j + 1]);
                result.word[2 * half + j] = pack<T>(a, b);
            }
        }
        store128(out + u64(blockIdx.x) * d + i, result);
    }
}

extern "C" __global__ void __launch_bounds__(256) rms_norm_bf16(Bf16* out, const float* x, const float* gain, const int* rows, int d, float eps) {
    rms_norm(out, x, gain, rows, d, eps);
}
extern "C" __global__ void __launch_bounds__(256) rms_norm_f16(F16* out, const float* x, const float* gain, const int* rows, int d, float eps) {
    rms_norm(out, x, gain, rows, d, eps);
}
