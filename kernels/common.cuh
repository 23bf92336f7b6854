// Types and small helpers that every kernel uses: 16-bit floats as bits, sums over a warp and a block, the KV cache's
// layout. Header-free: nothing is included but ptx.cuh, so that NVRTC needs no toolkit.
#pragma once

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#ifdef CUDA_EMU
#include "emulation.h"
#define DEVICE inline
/// A shared array of a block, poisoned when the block starts.
#define SHARED(T, name, count) \
    static const char name##_tag = 0; \
    T* name = reinterpret_cast<T*>(emu::shared_array(&name##_tag, sizeof(T) * (count)))
#define DYNAMIC_SHARED(name) unsigned char* name = emu::current->block->dynamic
#else
#define DEVICE __device__ __forceinline__
#define SHARED(T, name, count) __shared__ __align__(16) T name[count]
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#endif

struct Bf16 {
    u16 bits;
};
struct F16 {
    u16 bits;
};
/// What one 128-bit load brings: eight 16-bit values or four f32.
struct alignas(16) Vec16 {
    u32 word[4];
};

#include "ptx.cuh"

constexpr int PAGE_SIZE = 16;
#define MINUS_INFINITY __uint_as_float(0xFF800000u)
constexpr u32 WHOLE_WARP = 0xFFFFFFFFu;

DEVICE float to_f32(Bf16 x) { return __uint_as_float(u32(x.bits) << 16); }
DEVICE float to_f32(F16 x) { return widen_f16(x.bits); }
/// Low and high value of a pair.
template <class T>
DEVICE float low(u32 pair) {
    return to_f32(T{u16(pair)});
}
template <class T>
DEVICE float high(u32 pair) {
    return to_f32(T{u16(pair >> 16)});
}
/// Rounded to nearest even.
template <class T>
DEVICE T from_f32(float x) {
    return T{u16(pack<T>(x, 0.0f))};
}

/// x · sigmoid(x)
DEVICE float silu(float x) { return x / (1.0f + exp2_approx(-1.4426950408889634f * x)); }

DEVICE float warp_sum(float x) {
    for (int bits = 16; bits > 0; bits >>= 1) x += __shfl_xor_sync(WHOLE_WARP, x, bits);
    return x;
}

/// Sum over the block, the same in every thread. `scratch` holds 33 values and may be used again after a barrier.
DEVICE float block_sum(float x, float* scratch) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    x = warp_sum(x);
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    if (warp == 0) {
        x = warp_sum(lane < warps ? scratch[lane] : 0.0f);
        if (lane == 0) scratch[32] = x;
    }
    __syncthreads();
    return scratch[32];
}

/// 2^64 divided by the golden ratio, odd: the increment of SplitMix64; and its finaliser.
constexpr u64 GOLDEN = 0x9E3779B97F4A7C15ull;
DEVICE u64 mix(u64 bits) {
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9ull;
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EBull;
    return bits ^ (bits >> 31);
}

/// First value of a token's head in a layer's cache, T [pages, kv_heads, PAGE_SIZE, head_dim].
DEVICE u64 cache_offset(int page, int offset, int kv_head, int kv_heads, int head_dim) {
    return ((u64(page) * kv_heads + kv_head) * PAGE_SIZE + offset) * head_dim;
}
