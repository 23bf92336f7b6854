// gemm_tiled and gemm_stream against sums in double precision.
#include "harness.h"

#include "gemm.cu"

using namespace test;

struct Shape {
    int M, N, K;
};

/// `grid` 0: tiled.
template <class T, Epilogue E, class Y>
std::vector<Y> test_gemm(void (*kernel)(Y*, const T*, const T*, float*, int*, int, int, int), Shape c, int grid) {
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
void all_epilogues(decltype(&gemm_tiled_bf16_store_f32), auto store, auto residual, auto silu, Shape c, int grid, int which) {
    if (which % 3 == 0) test_gemm<T, STORE_F32, float>(store, c, grid);
    if (which % 3 == 1) test_gemm<T, RESIDUAL, float>(residual, c, grid);
    if (which % 3 == 2) test_gemm<T, SILU, T>(silu, c, grid);
}

void cases() {
    int which = 0;
    for (Shape c : {Shape{1, 8, 8}, {3, 130, 72}, {127, 24, 96}, {128, 128, 32}, {129, 136, 40}, {200, 72, 104}, {65, 257, 264}, {17, 64, 8}, {1300, 257, 8}}) {
        for (int i = 0; i < 3; i++, which++) {
            all_epilogues<Bf16>(nullptr, gemm_tiled_bf16_store_f32, gemm_tiled_bf16_residual, gemm_tiled_bf16_silu, c, 0, which);
            if (c.M < 100) all_epilogues<F16>(nullptr, gemm_tiled_f16_store_f32, gemm_tiled_f16_residual, gemm_tiled_f16_silu, c, 0, which);
        }
    }
    const int M[] = {1, 2, 7, 8, 9, 16, 17, 31, 32, 33, 64}, N[] = {8, 136, 24, 200, 64, 321, 128}, K[] = {8, 72, 520, 64, 136, 264}, grids[] = {1, 5, 3, 16, 2, 40};
    for (int i = 0; i < 42; i++) {
        Shape c{M[i % 11], N[i % 7], K[(i + i / 6) % 6]};
        int grid = grids[(i / 2) % 6];
        all_epilogues<Bf16>(nullptr, gemm_stream_bf16_store_f32, gemm_stream_bf16_residual, gemm_stream_bf16_silu, c, grid, i);
        if (i % 3 == 0) all_epilogues<F16>(nullptr, gemm_stream_f16_store_f32, gemm_stream_f16_residual, gemm_stream_f16_silu, c, grid, i / 3);
    }
    // A token's result does not depend on how many others there are.
    for (int grid : {3, 8}) {
        auto one = test_gemm<Bf16, STORE_F32, float>(gemm_stream_bf16_store_f32, {1, 200, 264}, grid);
        for (int others : {12, 40}) {
            auto many = test_gemm<Bf16, STORE_F32, float>(gemm_stream_bf16_store_f32, {others, 200, 264}, grid);
            for (int n = 0; n < 200; n++) same("stream batch invariance", n, emu::bits_of(many[n]), emu::bits_of(one[n]));
        }
    }
}
int main(int argc, char** argv) { return main_of(argc, argv, cases); }
