// embed, rms_norm, rope_kv, sample, silu_mul, synthetic, peaks against plain code in double precision (or, where the
// definition says so, to the bit).
#include "harness.h"

#include "embed.cu"
#include "norm.cu"
#include "peaks.cu"
#include "rope.cu"
#include "sample.cu"
#include "silu.cu"
#include "synthetic.cu"

using namespace test;

template <class T>
void test_embed(void (*kernel)(float*, const T*, const int*, const int*, int), int n, int d) {
    std::string name = text("embed_%s", NAME<T>);
    current_case() = text("%s n=%d d=%d", name.c_str(), n, d);
    const int vocab = 37;
    Buffer<T> table(size_t(vocab) * d);
    table.random();
    Buffer<float> x(size_t(n) * d);
    Buffer<int> previous = ints({5, 36, -1, 0}), tokens(n);
    for (int t = 0; t < n; t++) tokens[t] = t % 3 == 2 ? ~below(4) : below(vocab);
    launch(name.c_str(), {unsigned(n)}, 256, 0, {tokens, previous}, [&] { kernel(x.get(), table.get(), tokens.get(), previous.get(), d); });
    for (int t = 0; t < n; t++) {
        int id = std::max(tokens[t] >= 0 ? tokens[t] : previous[~tokens[t]], 0);
        for (int i = 0; i < d; i++) close(name, size_t(t) * d + i, x[size_t(t) * d + i], wide(table[size_t(id) * d + i]), 0);
    }
}

template <class T>
void test_norm(void (*kernel)(T*, const float*, const float*, const int*, int, float), int n, int d, bool gather) {
    std::string name = text("rms_norm_%s", NAME<T>);
    current_case() = text("%s n=%d d=%d gather=%d", name.c_str(), n, d, gather);
    const float eps = 1e-5f;
    Buffer<float> x(size_t(n + 3) * d), gain(d);
    x.random(3.0f), gain.random(0.2f, 1.0f);
    Buffer<int> rows(n);
    for (int t = 0; t < n; t++) rows[t] = gather ? below(n + 3) : t;
    Buffer<T> out(size_t(n) * d);
    launch(name.c_str(), {unsigned(n)}, 256, 0, {x, rows}, [&] { kernel(out.get(), x.get(), gain.get(), gather ? rows.get() : nullptr, d, eps); });
    for (int t = 0; t < n; t++) {
        double sum = 0;
        for (int i = 0; i < d; i++) sum += double(x[size_t(rows[t]) * d + i]) * x[size_t(rows[t]) * d + i];
        for (int i = 0; i < d; i++) {
            double want = x[size_t(rows[t]) * d + i] / std::sqrt(sum / d + eps) * gain[i];
            close(name, size_t(t) * d + i, wide(out[size_t(t) * d + i]), want, std::fabs(want) * (HALF_ULP<T> + 1e-5) + 1e-7);
        }
    }
}

struct Rope {
    int heads, kv_heads, hd, n, threads;
    bool bias, norms;
};
template <class T>
void test_rope(decltype(&rope_kv_bf16) as_bf16, decltype(&rope_kv_f16) as_f16, Rope c) {
    std::string name = text("rope_kv_%s", NAME<T>);
    current_case() = text("%s heads=%d kv=%d hd=%d n=%d threads=%d bias=%d norms=%d", name.c_str(), c.heads, c.kv_heads, c.hd, c.n, c.threads, c.bias, c.norms);
    const int width = (c.heads + 2 * c.kv_heads) * c.hd, pages = 7;
    const float eps = 1e-6f;
    Buffer<float> qkv(size_t(c.n) * width), bias(width), q_norm(c.hd), k_norm(c.hd), frequency(c.hd / 2);
    qkv.random(), bias.random(0.5f), q_norm.random(0.1f, 1.0f), k_norm.random(0.1f, 1.0f);
    for (int i = 0; i < c.hd / 2; i++) frequency[i] = float(std::pow(500000.0, -2.0 * i / c.hd));
    Buffer<int> positions(c.n), slots(c.n);
    std::vector<int> order(pages * 16);
    for (int i = 0; i < pages * 16; i++) order[i] = i;
    std::shuffle(order.begin(), order.end(), random_bits());
    for (int t = 0; t < c.n; t++) positions[t] = t == 0 ? 0 : t == 1 ? 131071 : below(4000), slots[t] = t == 3 ? -1 : order[t];
    Buffer<T> q(size_t(c.n) * c.heads * c.hd), k(size_t(pages) * c.kv_heads * 16 * c.hd), v(k.size);
    launch(name.c_str(), {unsigned(c.n), unsigned(c.heads + 2 * c.kv_heads)}, c.threads, 0, {qkv, positions, slots}, [&] {
        auto go = [&](auto kernel) {
            kernel(q.get(), k.get(), v.get(), qkv.get(), c.bias ? bias.get() : nullptr, c.norms ? q_norm.get() : nullptr, c.norms ? k_norm.get() : nullptr,
                   frequency.get(), positions.get(), slots.get(), c.heads, c.kv_heads, c.hd, eps);
        };
        if constexpr (std::is_same_v<T, Bf16>) go(as_bf16);
        else go(as_f16);
    });
    size_t written = 0;
    for (int t = 0; t < c.n; t++) {
        for (int row = 0; row < c.heads + 2 * c.kv_heads; row++) {
            bool query = row < c.heads, value = row >= c.heads + c.kv_heads;
            if (!query && slots[t] < 0) continue;
            std::vector<double> x(c.hd), out(c.hd);
            double sum = 0;
            for (int i = 0; i < c.hd; i++) {
                x[i] = qkv[size_t(t) * width + row * c.hd + i] + (c.bias ? double(bias[row * c.hd + i]) : 0.0);
                sum += x[i] * x[i];
            }
            if (c.norms && !value)
                for (int i = 0; i < c.hd; i++) x[i] *= (query ? q_norm : k_norm)[i] / std::sqrt(sum / c.hd + eps);
            for (int i = 0; i < c.hd / 2; i++) {
                double angle = double(positions[t]) * frequency[i];
                double cosine = value ? 1 : std::cos(angle), sine = value ? 0 : std::sin(angle);
                out[i] = x[i] * cosine - x[i + c.hd / 2] * sine;
                out[i + c.hd / 2] = x[i + c.hd / 2] * cosine + x[i] * sine;
            }
            int kv_head = row - c.heads - (value ? c.kv_heads : 0);
            T* got = query ? &q[(size_t(t) * c.heads + row) * c.hd] : &(value ? v : k)[((size_t(slots[t] / 16) * c.kv_heads + kv_head) * 16 + slots[t] % 16) * c.hd];
            for (int i = 0; i < c.hd; i++) close(name, i, wide(got[i]), out[i], std::fabs(out[i]) * HALF_ULP<T> + 4e-6);
            if (!query) written += c.hd;
        }
    }
    size_t untouched = 0;
    for (size_t i = 0; i < k.size; i++) untouched += (k[i].bits == 0xFFFF) + (v[i].bits == 0xFFFF);
    same(name, 0, untouched, 2 * k.size - written);
}

/// The definition in src/backend/sampling.rs, again.
float reference_noise(u64 seed, u32 position, u32 id) {
    auto mix = [](u64 z) {
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
        return z ^ (z >> 31);
    };
    const u64 golden = 0x9E3779B97F4A7C15ull, key = mix(mix(seed + golden) ^ position);
    auto ln = [](float x) {
        u32 bits = emu::bits_of(x), shifted = bits + (0x3F800000u - 0x3F3504F3u);
        float e = float(int(shifted >> 23) - 127), f = emu::float_of((shifted & 0x7FFFFF) + 0x3F3504F3u) - 1.0f, square = f * f;
        const float t[9] = {7.0376836e-2f, -1.151461e-1f, 1.1676999e-1f, -1.2420141e-1f, 1.4249323e-1f, -1.6668057e-1f, 2.0000715e-1f, -2.4999994e-1f, 3.3333331e-1f};
        float series = t[0];
        for (int i = 1; i < 9; i++) series = std::fmaf(series, f, t[i]);
        float tail = std::fmaf(e, -2.1219444e-4f, series * (f * square));
        return std::fmaf(e, 0.6933594f, f + std::fmaf(square, -0.5f, tail));
    };
    float u = float(2 * (mix(key + golden * (u64(id) + 1)) >> 41) + 1) * (1.0f / 16777216.0f);
    return -ln(-ln(u));
}

void test_sample(int rows, int vocab, int chunks, int threads, int kind) {
    current_case() = text("sample rows=%d vocab=%d chunks=%d threads=%d kind=%d", rows, vocab, chunks, threads, kind);
    Buffer<float> logits(size_t(rows) * vocab), temperature(rows), best_value(size_t(rows) * chunks);
    Buffer<u32> lo(rows), hi(rows);
    Buffer<int> positions(rows), best_id(size_t(rows) * chunks), samples(rows);
    logits.random(3.0f);
    for (int r = 0; r < rows; r++) {
        temperature[r] = r % 2 ? 0.8f : 0.0f, lo[r] = random_bits()(), hi[r] = random_bits()(), positions[r] = below(5000);
        float* row = &logits[size_t(r) * vocab];
        if (kind == 1) for (int i = 0; i < 4; i++) row[below(vocab)] = 50.0f;               // ties
        if (kind == 2 && r == rows / 2) row[below(vocab)] = NAN;
        if (kind == 3) for (int i = 0; i < vocab; i++) row[i] = -INFINITY;
    }
    launch("sample_stage1", {unsigned(chunks), unsigned(rows)}, 256, 0, {logits},
           [&] { sample_stage1(logits.get(), temperature.get(), lo.get(), hi.get(), positions.get(), best_value.get(), best_id.get(), vocab); });
    launch("sample_stage2", {unsigned(rows)}, threads, 0, {best_value, best_id}, [&] { sample_stage2(samples.get(), best_value.get(), best_id.get(), chunks); });
    for (int r = 0; r < rows; r++) {
        int want = -1;
        float best = 0;
        for (int i = 0; i < vocab; i++) {
            float x = logits[size_t(r) * vocab + i];
            if (temperature[r] > 0) x = x / temperature[r] + reference_noise(u64(hi[r]) << 32 | lo[r], positions[r], i);
            if (x != x) { want = -1; break; }
            if (want < 0 || x > best) want = i, best = x;
        }
        same("sample", r, samples[r], want);
    }
}

template <class T>
void test_silu(void (*kernel)(T*, const T*, int), int n, int f) {
    std::string name = text("silu_mul_%s", NAME<T>);
    current_case() = text("%s n=%d f=%d", name.c_str(), n, f);
    Buffer<T> in(size_t(n) * 2 * f), out(size_t(n) * f);
    in.random(3.0f);
    in[0] = narrow<T>(-60.0f), in[f - 1] = narrow<T>(60.0f);  // both ends of the sigmoid
    launch(name.c_str(), {unsigned(n), unsigned(f + 2047) / 2048}, 256, 0, {in}, [&] { kernel(out.get(), in.get(), f); });
    for (int t = 0; t < n; t++) {
        for (int i = 0; i < f; i++) {
            double gate = wide(in[size_t(t) * 2 * f + i]), up = wide(in[size_t(t) * 2 * f + f + i]);
            double want = gate / (1 + std::exp(-gate)) * up;
            close(name, size_t(t) * f + i, wide(out[size_t(t) * f + i]), want, std::fabs(want) * (HALF_ULP<T> + 1e-5) + 1e-7);
        }
    }
}

template <class T>
void test_synthetic(void (*kernel)(T*, u64, float, float, u64, u64), u64 first, u64 count) {
    current_case() = text("synthetic_%s first=%llu count=%llu", NAME<T>, first, count);
    Buffer<T> out(count);
    const u64 key = 0x1234567890ABCDEFull;
    const float center = 1.0f, scale = 0.1f;
    launch("synthetic", {3}, 256, 0, {}, [&] { kernel(out.get(), key, center, scale, first, count); });
    for (u64 i = 0; i < count; i++) {
        u64 z = key + (first + i + 1) * 0x9E3779B97F4A7C15ull;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
        z ^= z >> 31;
        float unit = float(2 * int(z >> 40) + 1 - (1 << 24)) * (1.0f / (1 << 24));
        T want = narrow<T>(center + scale * unit);
        same(text("synthetic_%s", NAME<T>), i, memcmp(&out[i], &want, sizeof(T)), 0);
    }
}

void test_peaks(u64 vectors) {
    current_case() = text("peaks vectors=%llu", vectors);
    Buffer<u32> from(vectors * 4), to(vectors * 4), sink(2);
    for (size_t i = 0; i < from.size; i++) from[i] = random_bits()();
    sink.fill(7);
    launch("copy_bandwidth", {2}, 256, 0, {from}, [&] { copy_bandwidth(reinterpret_cast<Vec16*>(to.get()), reinterpret_cast<Vec16*>(from.get()), vectors); });
    for (size_t i = 0; i < from.size; i++) same("copy_bandwidth", i, to[i], from[i]);
    // The one sum that is written: give it to thread 3 of block 1, which reads every 512th vector.
    u32 sum = 0x9E3779B9u;
    for (u64 i = 259; i < vectors; i += 512)
        for (int j = 0; j < 4; j++) sum ^= from[4 * i + j];
    from[4 * 259] ^= sum;
    launch("read_bandwidth", {2}, 256, 0, {from}, [&] { read_bandwidth(reinterpret_cast<Vec16*>(from.get()), vectors, sink.get()); });
    same("read_bandwidth", 0, sink[0], 7);
    same("read_bandwidth", 1, sink[1], 0x9E3779B9u);
    launch("empty", {1}, 32, 0, {}, [] { empty(); });
}

/// The product of the fragments as the instruction set's manual lays them out: a is row-major, b column-major, and
/// element (row, column) of the 16 x 8 result is in thread (row % 8) * 4 + column / 2.
template <class T>
void test_mma_peak(void (*kernel)(float*, u32, int), int rounds) {
    std::string name = text("mma_peak_%s", NAME<T>);
    current_case() = text("%s rounds=%d", name.c_str(), rounds);
    const int blocks = 2, threads = 64;
    const u32 seed = 77;
    Buffer<float> sums(blocks * threads);
    launch(name.c_str(), {blocks}, threads, 0, {}, [&] { kernel(sums.get(), seed, rounds); });
    auto mixed = [](u64 z) {
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
        return z ^ (z >> 31);
    };
    for (int warp = 0; warp < blocks * threads / 32; warp++) {
        auto value = [&](int lane, int index, int half) {
            u64 bits = mixed(mixed(u64(seed) << 32 | u64(warp * 32 + lane)) + u64(index + 1) * 0x9E3779B97F4A7C15ull);
            return double(wide(narrow<T>(float(int(u32(half ? bits >> 32 : bits) | 1u)) / 2147483648.0f)));
        };
        for (int lane = 0; lane < 32; lane++) {
            double want = 0, size = 0;
            for (int chain = 0; chain < 8; chain++) {
                for (int v = 0; v < 4; v++) {
                    const int row = lane / 4 + (v >> 1) * 8, column = (lane % 4) * 2 + (v & 1);
                    for (int k = 0; k < 16; k++) {
                        double a = value((row % 8) * 4 + k % 8 / 2, row / 8 + k / 8 * 2, k & 1);
                        double b = value(column * 4 + k % 8 / 2, 4 + 2 * chain + k / 8, k & 1);
                        want += rounds * a * b, size += rounds * std::fabs(a * b);
                    }
                }
            }
            close(name, warp * 32 + lane, sums[warp * 32 + lane], want, size * 1e-5);
        }
    }
}

void cases() {
    for (auto [n, f] : {std::pair{1, 8}, {3, 2048}, {2, 2056}, {5, 576}, {70, 104}}) test_silu(silu_mul_bf16, n, f), test_silu(silu_mul_f16, n, f);
    for (auto [n, d] : {std::pair{1, 8}, {5, 576}, {3, 2056}, {2, 4096}}) {
        test_embed(embed_bf16, n, d), test_embed(embed_f16, n, d);
        for (bool gather : {false, true}) test_norm(rms_norm_bf16, n, d, gather), test_norm(rms_norm_f16, n, d, gather);
    }
    for (Rope c : {Rope{1, 1, 64, 1, 32, false, false}, {8, 2, 128, 5, 64, true, false}, {4, 4, 96, 4, 128, false, true}, {3, 1, 64, 6, 96, true, true}, {4, 2, 256, 4, 32, true, true}, {4, 2, 16, 4, 64, false, true}}) {
        test_rope<Bf16>(rope_kv_bf16, rope_kv_f16, c), test_rope<F16>(rope_kv_bf16, rope_kv_f16, c);
    }
    for (int kind = 0; kind < 4; kind++) {
        test_sample(3, 1, 1, 32, kind), test_sample(4, 1000, 7, 64, kind), test_sample(2, 513, 300, 256, kind), test_sample(1, 4099, 2, 32, kind);
    }
    for (u64 first : {0ull, 123456789012ull}) test_synthetic(synthetic_bf16, first, 3001), test_synthetic(synthetic_f16, first, 1000), test_synthetic(synthetic_f32, first, 777);
    test_peaks(300), test_peaks(512 * 8 + 77), test_peaks(512 * 19);
    for (int rounds : {1, 5}) test_mma_peak<Bf16>(mma_peak_bf16, rounds), test_mma_peak<F16>(mma_peak_f16, rounds);
}
int main(int argc, char** argv) { return main_of(argc, argv, cases); }
