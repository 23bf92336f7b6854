// embed_T: x[t] = table[token[t]], widened to f32. First operation of a step.
//   x f32 [n, d] · table T [vocab, d] · tokens i32 [n]: an id, or ~row of `previous` (negative) · previous i32 [rows]
// Grid n, block 256. d is a multiple of 8. Bytes: n d (2 read + 4 written). A previous sample of -1 (no number was
// sampled; the host reports it) reads row 0.
#include "common.cuh"

template <class T>
DEVICE void embed(float* x, const T* table, const int* tokens, const int* previous, int d) {
    pdl_wait();
    pdl_launch();
    const int token = tokens[blockIdx.x];
    const int id = max(token >= 0 ? token : previous[~token], 0);
    const T* row = table + u64(id) * d;
    float* out = x + u64(blockIdx.x) * d;
    for (int i = threadIdx.x * 8; i < d; i += blockDim.x * 8) {
        const Vec16 values = load128_once(row + i);
        for (int half = 0; half < 2; half++) {
            Vec16 wide;
            for (int j = 0; j < 2; j++) {
                const u32 pair = values.word[2 * half + j];
                wide.word[2 * j] = __float_as_uint(low<T>(pair));
                wide.word[2 * j + 1] = __float_as_uint(high<T>(pair));
            }
            store128(out + i + 4 * half, wide);
        }
    }
}

extern "C" __global__ void __launch_bounds__(256) embed_bf16(float* x, const Bf16* table, const int* tokens, const int* previous, int d) {
    embed(x, table, tokens, previous, d);
}
extern "C" __global__ void __launch_bounds__(256) embed_f16(float* x, const F16* table, const int* tokens, const int* previous, int d) {
    embed(x, table, tokens, previous, d);
}
