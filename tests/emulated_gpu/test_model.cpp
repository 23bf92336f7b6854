// The emulation itself: what it must refuse, each in a process of its own, with the line it must name; and the layouts
// of mma and ldmatrix against the definition.
#include <sys/wait.h>
#include <unistd.h>

#include "harness.h"

using namespace test;

/// Runs `body` in a child that must abort after saying `words` and this file's `line`.
void must_refuse(const char* what, int line, const std::string& words, std::function<void()> body) {
    current_case() = what;
    int ends[2];
    if (pipe(ends)) wrong("no pipe");
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        dup2(ends[1], 2);
        body();
        _Exit(0);
    }
    ::close(ends[1]);
    std::string said;
    char buffer[4096];
    for (ssize_t n; (n = read(ends[0], buffer, sizeof buffer)) > 0;) said.append(buffer, size_t(n));
    ::close(ends[0]);
    int status = 0;
    waitpid(child, &status, 0);
    std::string place = text("test_model.cpp:%d", line);
    if (status == 0) wrong("was not refused");
    if (said.find(words) == std::string::npos || (line && said.find(place) == std::string::npos)) wrong("said \"" + said + "\", expected \"" + words + "\" at " + place);
    worst()["refusals"].values++;
}
void go(unsigned threads, std::function<void()> body) { emu::run({emu::Launch{"kernel", {2}, {threads}, 256, false, std::move(body)}}); }

void refusals() {
    must_refuse("divergent barriers", __LINE__, "deadlock", [] { go(64, [] { if (threadIdx.x < 31) __syncwarp(); else __syncthreads(); }); });
    must_refuse("barrier after an exit", __LINE__, "have left", [] { emu::order().set("forward"); go(64, [] { if (threadIdx.x < 32) return; __syncthreads(); }); });
    must_refuse("lane outside its mask", __LINE__, "outside its mask", [] { go(32, [] { __shfl_sync(0xFFFFu, 1, 0); }); });
    must_refuse("source outside the mask", __LINE__, "outside the mask", [] { go(32, [] { if (threadIdx.x < 16) __shfl_sync(0xFFFFu, 1, 20); }); });
    must_refuse("lanes at different lines", __LINE__ + 3, "meets", [] {
        go(32, [] {
            if (threadIdx.x % 2) __syncwarp();
            else __syncwarp();
        });
    });
    must_refuse("misaligned vector", __LINE__, "misaligned", [] { go(32, [] { DYNAMIC_SHARED(shared); load128(shared + 8); }); });
    must_refuse("misaligned copy", __LINE__, "misaligned", [] { go(32, [] { DYNAMIC_SHARED(shared); alignas(16) static char from[32]; copy_async16(shared, from + 2); }); });
    must_refuse("a source that changes", __LINE__ + 1, "changed while it was on its way", [] {
        go(1, [] { DYNAMIC_SHARED(shared); alignas(16) static char from[16] = {}; copy_async16(shared, from), copy_commit(), from[3]++, copy_wait<0>(); });
    });
    must_refuse("two reductions to one value", __LINE__, "two reductions to one value", [] { static float x = 0; go(1, [] { add_to(&x, 1.0f); }); });
    must_refuse("waiting for a warp that left", __LINE__, "deadlock", [] { go(32, [] { if (threadIdx.x < 31) __syncwarp(); }); });
#if defined(__SANITIZE_ADDRESS__)
    must_refuse("past the end of global memory", __LINE__, "heap-buffer-overflow", [] { Buffer<float> x(8); go(32, [&] { x.get()[threadIdx.x] = 1.0f; }); });
    must_refuse("past the end of shared memory", __LINE__, "heap-buffer-overflow", [] { go(32, [] { SHARED(float, x, 8); x[threadIdx.x] = 1.0f; }); });
    must_refuse("past the end of dynamic shared memory", 0, "use-after-poison", [] {
        emu::run({emu::Launch{"kernel", {1}, {32}, 100, false, [] { DYNAMIC_SHARED(x); reinterpret_cast<float*>(x)[threadIdx.x] = 1.0f; }}});
    });
#endif
}

/// D = A B over whole numbers, through ldmatrix (plain and transposed) and mma.
void matrices() {
    current_case() = "mma and ldmatrix layouts";
    int a[16][16], b[16][8];
    for (auto& row : a) for (int& x : row) x = below(15) - 7;
    for (auto& row : b) for (int& x : row) x = below(15) - 7;
    for (bool transposed : {false, true}) {
        float d[16][8];
        emu::run({emu::Launch{"mma", {1}, {32}, 0, false, [&] {
            SHARED(Bf16, left, 256);
            SHARED(Bf16, right, 128);  // [k][n] when transposed, else [n][k]
            const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
            for (int i = lane; i < 256; i += 32) left[i] = narrow<Bf16>(float(a[i / 16][i % 16]));
            for (int i = lane; i < 128; i += 32) right[i] = narrow<Bf16>(float(transposed ? b[i / 8][i % 8] : b[i % 16][i / 16]));
            __syncwarp();
            u32 x[4], y[4];
            ldmatrix_x4(x, left + (lane % 16) * 16 + lane / 16 * 8);
            if (transposed) ldmatrix_x4_transposed(y, right + (lane % 16) * 8);
            else ldmatrix_x4(y, right + (lane % 8) * 16 + lane / 8 % 2 * 8);
            float sum[4] = {0.5f, 0.5f, 0.5f, 0.5f};
            mma16816<Bf16>(sum, x, {y[0], y[1]});
            for (int v = 0; v < 4; v++) d[g + v / 2 * 8][2 * t + v % 2] = sum[v];
        }}});
        for (int i = 0; i < 16; i++)
            for (int j = 0; j < 8; j++) {
                double want = 0.5;
                for (int k = 0; k < 16; k++) want += a[i][k] * b[k][j];
                close("mma", i * 8 + j, d[i][j], want, 0);
            }
    }
}

void copies_and_poison() {
    current_case() = "cp.async lands at its wait";
    Buffer<float> from(8), seen(4);
    from.random();
    go(1, [&] {
        DYNAMIC_SHARED(shared);
        float* x = reinterpret_cast<float*>(shared);
        if (x[0] == x[0]) wrong("shared memory was not poisoned");
        copy_async16(x, from.get()), copy_commit();
        copy_async16(x + 4, from.get() + 4), copy_commit();
        if (x[0] == x[0]) wrong("a copy landed before its wait");
        copy_wait<1>();
        seen[0] = x[0], seen[1] = x[4];
        copy_wait<0>();
        seen[2] = x[4];
    });
    same("cp.async", 0, seen[0] == from[0] && seen[1] != seen[1] && seen[2] == from[4], 1);
    current_case() = "PDL: a grid begins as early as one thread of each block before it allows";
    const char* names[] = {"trigger first", "trigger after one store", "trigger after a barrier", "no trigger"};
    for (int way = 0; way < 4; way++) {
        int stored[64] = {}, before = 0, after = 0;
        emu::run({emu::Launch{"producer", {2}, {32}, 0, false, [&] {
            if (way == 0) pdl_launch();
            stored[blockIdx.x * 32 + threadIdx.x] = 1;
            if (way == 1) pdl_launch();
            __syncthreads();
            if (way == 2) pdl_launch();
        }}, emu::Launch{"consumer", {1}, {1}, 0, true, [&] {
            for (int one : stored) before += one;
            pdl_wait();
            for (int one : stored) after += one;
        }}});
        const bool right[] = {before < 64, before < 64, before == 64, before == 64};
        same(names[way], 0, right[way] * 100 + after, 164);
    }
    current_case() = "a reduction lands when its grid has ended";
    float sum = 1.0f, within = 0.0f;
    emu::run({emu::Launch{"adds", {1}, {1}, 0, false, [&] { add_to(&sum, 2.0f), within = sum; }}});
    same("reduction", 0, within == 1.0f && sum == 3.0f, 1);
}

void cases() { refusals(), matrices(), copies_and_poison(); }
int main(int argc, char** argv) { return main_of(argc, argv, cases); }
