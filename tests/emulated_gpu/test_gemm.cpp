// gemm_tiled and gemm_stream against sums in double precision.
#include "harness.h"

#include "gemm.cu"
#include "synthetic.cu"

using namespace test;

struct Shape {
    int M, N, K;
};

template <class T, class Y>
using Kernel = void (*)(Y*, const T*, const T*, float*, int*, int, int, int);

/// The entries of a streaming product, for at most 8, 16, 32 and 64 tokens.
template <class T, class Y>
struct Entries {
    Kernel<T, Y> of[4];
    Kernel<T, Y> for_tokens(int tokens) const { return of[tokens <= 8 ? 0 : tokens <= 16 ? 1 : tokens <= 32 ? 2 : 3]; }
};
#define ENTRIES(t, e, T, Y) Entries<T, Y>{{gemm_stream_##t##_##e##_8, gemm_stream_##t##_##e##_16, gemm_stream_##t##_##e##_32, gemm_stream_##t##_##e##_64}}
const auto STORE_BF16 = ENTRIES(bf16, store_f32, Bf16, float), RESIDUAL_BF16 = ENTRIES(bf16, residual, Bf16, float);
const auto STORE_F16 = ENTRIES(f16, store_f32, F16, float), RESIDUAL_F16 = ENTRIES(f16, residual, F16, float);
const auto SILU_BF16 = ENTRIES(bf16, silu, Bf16, Bf16);
const auto SILU_F16 = ENTRIES(f16, silu, F16, F16);

/// `grid` 0: tiled.
template <class T, Epilogue E, class Y>
std::vector<Y> test_gemm(Kernel<T, Y> kernel, Shape c, int grid) {
    auto [M, N, K] = c;
    const char* epilogue = E == STORE_F32 ? "store_f32" : E == RESIDUAL ? "residual" : "silu";
    std::string name = text("gemm_%s_%s_%s", grid ? "stream" : "tiled", NAME<T>, epilogue);
    current_case() = text("%s M=%d N=%d K=%d grid=%d", name.c_str(), M, N, K, grid);
    const int rows = E == SILU ? 2 * N : N, columns = E == SILU ? 64 : 128, tiles = (N + columns - 1) / columns;
    Buffer<T> a(size_t(M) * K), w(size_t(rows) * K);
    // Values are drawn row by row from a seed of their own, so that a row does not depend on how many there are.
    random_bits().seed(M + 0u);
    w.random(1.0f);
    random_bits().seed(1);
    w.random(1.0f), a.random(1.0f, 0.1f);
    Buffer<Y> y(size_t(M) * N);
    Buffer<float> before(size_t(M) * N);
    before.random();
    if constexpr (E == RESIDUAL) memcpy(y.get(), before.get(), y.size * 4);
    const int tokens = M <= 8 ? 8 : M <= 16 ? 16 : M <= 32 ? 32 : 64;
    Buffer<float> workspace(grid ? size_t(2) * grid * 128 * tokens : 1);
    Buffer<int> tickets(tiles);
    tickets.fill(0);
    std::vector<Produced> inputs{a};
    if (E == RESIDUAL) inputs.push_back(y);
    emu::Dim shape = grid ? emu::Dim{unsigned(grid)} : emu::Dim{unsigned(tiles), unsigned((M + 127) / 128)};
    launch(name.c_str(), shape, 256, grid ? 4 * (16384 + 128 * tokens) : 0, inputs,
           [&] { kernel(y.get(), a.get(), w.get(), workspace.get(), tickets.get(), M, N, K); });
    tickets_are_zero(tickets);
    for (int m = 0; m < M; m++) {
        for (int n = 0; n < N; n++) {
            double sum[2] = {}, size[2] = {};
            for (int half = 0; half < (E == SILU ? 2 : 1); half++) {
                for (int k = 0; k < K; k++) {
                    double product = wide(a[size_t(m) * K + k]) * wide(w[size_t(n + half * N) * K + k]);
                    sum[half] += product, size[half] += std::fabs(product);
                }
            }
            const double f32 = 1.0 / (1 << 20);  // of the sum of magnitudes
            double want = sum[0], tolerance = f32 * size[0] + 1e-6;
            if (E == RESIDUAL) want += before[size_t(m) * N + n];
            if (E == SILU) {
                double gate = sum[0] / (1 + std::exp(-sum[0]));
                want = gate * sum[1];
                tolerance = std::fabs(want) * (HALF_ULP<T> + 1e-5) + f32 * (1.1 * size[0] * std::fabs(sum[1]) + size[1] * std::fabs(gate)) + 1e-6;
            }
            close(name, size_t(m) * N + n, wide(y[size_t(m) * N + n]), want, tolerance);
        }
    }
    return std::vector<Y>(y.get(), y.get() + y.size);
}

template <class T>
void tiled_with(Kernel<T, float> store, Kernel<T, float> residual, Kernel<T, T> silu, Shape c, int which) {
    if (which % 3 == 0) test_gemm<T, STORE_F32, float>(store, c, 0);
    if (which % 3 == 1) test_gemm<T, RESIDUAL, float>(residual, c, 0);
    if (which % 3 == 2) test_gemm<T, SILU, T>(silu, c, 0);
}
template <class T>
void stream_with(Entries<T, float> store, Entries<T, float> residual, Entries<T, T> silu, Shape c, int grid, int which) {
    if (which % 3 == 0) test_gemm<T, STORE_F32, float>(store.for_tokens(c.M), c, grid);
    if (which % 3 == 1) test_gemm<T, RESIDUAL, float>(residual.for_tokens(c.M), c, grid);
    if (which % 3 == 2) test_gemm<T, SILU, T>(silu.for_tokens(c.M), c, grid);
}

/// A weight that the grid before makes: what is fetched ahead of the wait must be there when that grid lets this one begin.
void test_weight_just_made() {
    current_case() = "gemm_stream after synthetic";
    const int N = 300, K = 200, grid = 5;
    Buffer<Bf16> a(K), w(size_t(N) * K);
    Buffer<float> y(N), workspace(size_t(2) * grid * 128 * 8);
    Buffer<int> tickets(3);
    a.random(), tickets.fill(0);
    emu::run({emu::Launch{"synthetic_bf16", {4}, {256}, 0, false, [&] { synthetic_bf16(w.get(), 7, 0.0f, 1.0f, 0, w.size); }},
              emu::Launch{"gemm_stream_bf16_store_f32_8", {grid}, {256}, 4 * (16384 + 128 * 8), true,
                          [&] { gemm_stream_bf16_store_f32_8(y.get(), a.get(), w.get(), workspace.get(), tickets.get(), 1, N, K); }}});
    for (int n = 0; n < N; n++) {
        double want = 0, size = 0;
        for (int k = 0; k < K; k++) want += wide(a[k]) * wide(w[size_t(n) * K + k]), size += std::fabs(wide(a[k]) * wide(w[size_t(n) * K + k]));
        close("stream after synthetic", n, y[n], want, size / (1 << 20) + 1e-6);
    }
}

void cases() {
    int which = 0;
    for (Shape c : {Shape{1, 8, 8}, {3, 130, 72}, {127, 24, 96}, {128, 128, 32}, {129, 136, 40}, {200, 72, 104}, {65, 257, 264}, {17, 64, 8}, {1300, 257, 8}}) {
        for (int i = 0; i < 3; i++, which++) {
            tiled_with<Bf16>(gemm_tiled_bf16_store_f32, gemm_tiled_bf16_residual, gemm_tiled_bf16_silu, c, which);
            if (c.M < 100) tiled_with<F16>(gemm_tiled_f16_store_f32, gemm_tiled_f16_residual, gemm_tiled_f16_silu, c, which);
        }
    }
    const int M[] = {1, 2, 7, 8, 9, 16, 17, 31, 32, 33, 64}, N[] = {8, 136, 24, 200, 64, 321, 128}, K[] = {8, 72, 520, 64, 136, 264}, grids[] = {1, 5, 3, 16, 2, 40};
    for (int i = 0; i < 42; i++) {
        Shape c{M[i % 11], N[i % 7], K[(i + i / 6) % 6]};
        int grid = grids[(i / 2) % 6];
        stream_with<Bf16>(STORE_BF16, RESIDUAL_BF16, SILU_BF16, c, grid, i);
        if (i % 3 == 0) stream_with<F16>(STORE_F16, RESIDUAL_F16, SILU_F16, c, grid, i / 3);
    }
    // A token's result depends neither on how many others there are nor on the entry, with as many parts as one tile may have.
    for (int grid : {3, 8, 34}) {
        auto one = test_gemm<Bf16, STORE_F32, float>(STORE_BF16.of[0], {1, 200, 1048}, grid);
        for (int others : {12, 20, 40}) {
            auto many = test_gemm<Bf16, STORE_F32, float>(STORE_BF16.for_tokens(others), {others, 200, 1048}, grid);
            for (int n = 0; n < 200; n++) same("stream batch invariance", n, emu::bits_of(many[n]), emu::bits_of(one[n]));
        }
    }
    test_weight_just_made();
}
int main(int argc, char** argv) { return main_of(argc, argv, cases); }
