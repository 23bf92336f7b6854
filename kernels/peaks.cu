// Ceilings of the device.
// read_bandwidth(const void* from, u64 vectors, u32* sink): reads `vectors` * 16 bytes. The xor of all words goes to
//   sink[block] only where it is a value that random data practically never has, so that the reads are not removed.
// copy_bandwidth(void* to, const void* from, u64 vectors): reads and writes `vectors` * 16 bytes.
// empty(): what a launch costs.
// Grid: a multiple of the SM count, block 256. Each thread keeps eight 128-bit loads in flight.
#include "common.cuh"

constexpr int IN_FLIGHT = 8;

extern "C" __global__ void __launch_bounds__(256) read_bandwidth(const Vec16* from, u64 vectors, u32* sink) {
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

extern "C" __global__ void __launch_bounds__(256) copy_bandwidth(Vec16* to, const Vec16* from, u64 vectors) {
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
