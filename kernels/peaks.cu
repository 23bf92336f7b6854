// Ceilings of the device.
// read_bandwidth(const void* from, u64 vectors, u32* sink): reads `vectors` * 16 bytes. The xor of all words goes to
//   sink[block] only where it is a value that random data practically never has, so that the reads are not removed.
// copy_bandwidth(void* to, const void* from, u64 vectors): reads and writes `vectors` * 16 bytes.
// empty(): what a launch costs.
// mma_peak_T(float* sums, u32 seed, int rounds): 8 chains of `rounds` mma (m16n8k16) in each warp, on random operands that
//   stay in registers: the rate at which mma.sync can be issued, without any memory. sums f32 [threads]: the sum of each
//   thread's accumulators. Flops: warps * 8 * rounds * 4096.
// Grid: a multiple of the SM count, block 256. Each thread of the bandwidth probes keeps eight 128-bit loads in flight.
#include "common.cuh"

constexpr int IN_FLIGHT = 8;

extern "C" __global__ void __launch_bounds__(256, 4) read_bandwidth(const Vec16* from, u64 vectors, u32* sink) {
    const u64 threads = u64(gridDim.x) * blockDim.x;
    u64 i = u64(blockIdx.x) * blockDim.x + threadIdx.x;
    u32 sum = 0;
    pdl_wait();
    pdl_launch();
    for (; i + (IN_FLIGHT - 1) * threads < vectors; i += IN_FLIGHT * threads) {
        Vec16 v[IN_FLIGHT];
#pragma unroll
        for (int j = 0; j < IN_FLIGHT; j++) v[j] = load128_once(from + i + j * threads);
#pragma unroll
        for (int j = 0; j < IN_FLIGHT; j++) sum ^= v[j].word[0] ^ v[j].word[1] ^ v[j].word[2] ^ v[j].word[3];
    }
    for (; i < vectors; i += threads) {
        const Vec16 v = load128_once(from + i);
        sum ^= v.word[0] ^ v.word[1] ^ v.word[2] ^ v.word[3];
    }
    if (sum == 0x9E3779B9u) sink[blockIdx.x] = sum;
}

extern "C" __global__ void __launch_bounds__(256, 4) copy_bandwidth(Vec16* to, const Vec16* from, u64 vectors) {
    const u64 threads = u64(gridDim.x) * blockDim.x;
    u64 i = u64(blockIdx.x) * blockDim.x + threadIdx.x;
    pdl_wait();
    pdl_launch();
    for (; i + (IN_FLIGHT - 1) * threads < vectors; i += IN_FLIGHT * threads) {
        Vec16 v[IN_FLIGHT];
#pragma unroll
        for (int j = 0; j < IN_FLIGHT; j++) v[j] = load128_once(from + i + j * threads);
#pragma unroll
        for (int j = 0; j < IN_FLIGHT; j++) store128(to + i + j * threads, v[j]);
    }
    for (; i < vectors; i += threads) store128(to + i, load128_once(from + i));
}

extern "C" __global__ void __launch_bounds__(256) empty() {
    pdl_wait();
    pdl_launch();
}

constexpr int CHAINS = 8;

/// Two random values in (-1, 1) as a pair.
template <class T>
DEVICE u32 random_pair(u64 key, int index) {
    const u64 bits = mix(key + u64(index + 1) * GOLDEN);
    return pack<T>(float(int(u32(bits) | 1u)) * (1.0f / 2147483648.0f), float(int(u32(bits >> 32) | 1u)) * (1.0f / 2147483648.0f));
}

template <class T>
DEVICE void mma_peak(float* sums, u32 seed, int rounds) {
    const u64 thread = u64(blockIdx.x) * blockDim.x + threadIdx.x, key = mix(u64(seed) << 32 | thread);
    u32 a[4], b[CHAINS][2];
    float d[CHAINS][4];
#pragma unroll
    for (int i = 0; i < 4; i++) a[i] = random_pair<T>(key, i);
#pragma unroll
    for (int c = 0; c < CHAINS; c++) {
#pragma unroll
        for (int i = 0; i < 2; i++) b[c][i] = random_pair<T>(key, 4 + 2 * c + i);
#pragma unroll
        for (int i = 0; i < 4; i++) d[c][i] = 0.0f;
    }
    pdl_wait();
    pdl_launch();
    for (int round = 0; round < rounds; round++) {
#pragma unroll
        for (int c = 0; c < CHAINS; c++) mma16816<T>(d[c], a, b[c]);
    }
    float sum = 0.0f;
#pragma unroll
    for (int c = 0; c < CHAINS; c++) sum += (d[c][0] + d[c][1]) + (d[c][2] + d[c][3]);
    sums[thread] = sum;
}

extern "C" __global__ void __launch_bounds__(256) mma_peak_bf16(float* sums, u32 seed, int rounds) {
    mma_peak<Bf16>(sums, seed, rounds);
}
extern "C" __global__ void __launch_bounds__(256) mma_peak_f16(float* sums, u32 seed, int rounds) {
    mma_peak<F16>(sums, seed, rounds);
}
