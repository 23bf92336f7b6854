// rope_kv_T: from the QKV product to attention's inputs: + bias, norm over each head of q and k (Qwen3), rotary
// embedding of the pairs (i, i + head_dim / 2); q to its own buffer, k and v to their slots of the layer's pages.
//   q_out T [n, heads hd] · k_cache, v_cache T [pages, kv_heads, 16, hd] · qkv f32 [n, (heads + 2 kv_heads) hd]
//   bias f32 [(heads + 2 kv_heads) hd] or null · q_norm, k_norm f32 [hd] or null · inv_freq f32 [hd / 2]
//   positions, slots i32 [n]; a negative slot is written nowhere (padding)
// Grid (n, heads + 2 kv_heads), block 32..128 (a multiple of 32). head_dim is even. Bytes: 6 a value.
// Angles are formed in f64 and reduced to half turns, so that position 131072 is as accurate as position 1.
#include "common.cuh"

DEVICE void half_turns(int position, float frequency, float* sine, float* cosine) {
    const double turns = double(position) * double(frequency) * 0.31830988618379067154;
    // Nearest even number of half turns: adding and taking away 1.5 * 2^53 rounds to a multiple of 2.
    const double shift = 13510798882111488.0;
    const double even = __dsub_rn(__dadd_rn(turns, shift), shift);
    sincospif(float(turns - even), sine, cosine);
}

template <class T>
DEVICE void rope_kv(T* q_out, T* k_cache, T* v_cache, const float* qkv, const float* bias, const float* q_norm,
                    const float* k_norm, const float* inv_freq, const int* positions, const int* slots, int heads,
                    int kv_heads, int head_dim, float eps) {
    SHARED(float, scratch, 33);
    pdl_wait();
    pdl_launch();
    const int token = blockIdx.x, row = blockIdx.y, half = head_dim / 2;
    const bool is_query = row < heads, is_value = row >= heads + kv_heads;
    const float* in = qkv + (u64(token) * (heads + 2 * kv_heads) + row) * head_dim;
    const float* add = bias ? bias + u64(row) * head_dim : nullptr;
    const float* gain = is_value ? nullptr : is_query ? q_norm : k_norm;

    float scale = 1.0f;
    if (gain) {
        float sum = 0.0f;
        for (int i = threadIdx.x; i < head_dim; i += blockDim.x) {
            const float x = in[i] + (add ? add[i] : 0.0f);
            sum += x * x;
        }
        scale = rsqrtf(block_sum(sum, scratch) / head_dim + eps);
    }

    T* out = q_out + (u64(token) * heads + row) * head_dim;
    if (!is_query) {
        const int slot = slots[token];
        if (slot < 0) return;
        const int kv_head = row - heads - (is_value ? kv_heads : 0);
        out = (is_value ? v_cache : k_cache) + cache_offset(slot / PAGE_SIZE, slot % PAGE_SIZE, kv_head, kv_heads, head_dim);
    }
    for (int i = threadIdx.x; i < half; i += blockDim.x) {
        float left = in[i] + (add ? add[i] : 0.0f), right = in[i + half] + (add ? add[i + half] : 0.0f);
        if (gain) {
            left *= scale * gain[i];
            right *= scale * gain[i + half];
        }
        if (!is_value) {
            float sine, cosine;
            half_turns(positions[token], inv_freq[i], &sine, &cosine);
            const float rotated = left * cosine - right * sine;
            right = right * cosine + left * sine;
            left = rotated;
        }
        out[i] = from_f32<T>(left);
        out[i + half] = from_f32<T>(right);
    }
}

#define ROPE_KV(T, name) \
    extern "C" __global__ void __launch_bounds__(128) name( \
        T* q_out, T* k_cache, T* v_cache, const float* qkv, const float* bias, const float* q_norm, const float* k_norm, \
        const float* inv_freq, const int* positions, const int* slots, int heads, int kv_heads, int head_dim, float eps) { \
        rope_kv(q_out, k_cache, v_cache, qkv, bias, q_norm, k_norm, inv_freq, positions, slots, heads, kv_heads, head_dim, eps); \
    }
ROPE_KV(Bf16, rope_kv_bf16)
ROPE_KV(F16, rope_kv_f16)
