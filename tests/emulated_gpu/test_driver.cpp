// The stand-in driver: what is late is late, what is refused is refused, graphs replay what they captured.
#include "driver.cpp"
#include "harness.h"

using namespace test;

void expect(int got, int want, const char* what) {
    worst()["driver"].values++;
    if (got != want) wrong(text("%s gave %d, expected %d", what, got, want));
}
#define EXPECT(call, want) expect(call, want, #call)

struct Device {
    void* stream = nullptr;
    u64 table = 0, tokens = 0, previous = 0, x = 0, gain = 0, normed = 0;
    void *embed = nullptr, *norm = nullptr;
};

/// embed (2 tokens, d = 8), then rms_norm after it with PDL.
void step(Device& d) {
    int width = 8;
    float eps = 0.0f;
    u64 none = 0;
    void* first[] = {&d.x, &d.table, &d.tokens, &d.previous, &width};
    EXPECT(cuLaunchKernel(d.embed, 2, 1, 1, 256, 1, 1, 0, d.stream, first, nullptr), 0);
    void* second[] = {&d.normed, &d.x, &d.gain, &none, &width, &eps};
    LaunchAttribute pdl{};
    pdl.id = 6, pdl.programmatic = 1;
    LaunchConfig config{2, 1, 1, 256, 1, 1, 0, d.stream, &pdl, 1};
    EXPECT(cuLaunchKernelEx(&config, d.norm, second, nullptr), 0);
    d.x = d.table = 0, width = 0;  // arguments were taken by value
}

/// rms_norm of no address, which must not run, with PDL.
int overlapping(Device& d) {
    u64 none = 0;
    int width = 8;
    float eps = 0.0f;
    void* arguments[] = {&none, &none, &none, &none, &width, &eps};
    LaunchAttribute pdl{};
    pdl.id = 6, pdl.programmatic = 1;
    LaunchConfig config{1, 1, 1, 256, 1, 1, 0, d.stream, &pdl, 1};
    return cuLaunchKernelEx(&config, d.norm, arguments, nullptr);
}

void cases() {
    current_case() = "driver";
    Device d;
    u64 address = 0;
    EXPECT(cuInit(0), 0);
    current_context = nullptr;
    EXPECT(cuMemAlloc_v2(&address, 16), INVALID_CONTEXT);
    void* context = nullptr;
    EXPECT(cuDevicePrimaryCtxRelease_v2(0), INVALID_CONTEXT);
    EXPECT(cuDevicePrimaryCtxRetain(&context, 0), 0);
    EXPECT(cuCtxSetCurrent(context), 0);
    EXPECT(cuStreamCreate(&d.stream, 1), 0);

    current_case() = "memory";
    size_t free_before = 0, free_after = 0, total = 0;
    EXPECT(cuMemGetInfo_v2(&free_before, &total), 0);
    EXPECT(cuMemAlloc_v2(&address, total + 1), OUT_OF_MEMORY);
    EXPECT(cuMemAlloc_v2(&address, 1 << 20), 0);
    EXPECT(cuMemGetInfo_v2(&free_after, &total), 0);
    EXPECT(free_before - free_after == 1 << 20, 1);
    int word = 0;
    EXPECT(cuMemcpyDtoH_v2(&word, address, 4), 0);
    EXPECT(word, -1);  // poison
    EXPECT(cuMemcpyHtoD_v2(address + (1 << 20) - 2, &word, 4), INVALID_VALUE);
    EXPECT(cuMemFree_v2(address), 0);
    EXPECT(cuMemFree_v2(address), INVALID_VALUE);

    current_case() = "late copies";
    EXPECT(cuMemAlloc_v2(&address, 4), 0);
    int* pinned = nullptr;
    EXPECT(cuMemHostAlloc(reinterpret_cast<void**>(&pinned), 64, 0), 0);
    int pageable = 5, back = 0;
    *pinned = 1;
    EXPECT(cuMemcpyHtoDAsync_v2(address, pinned, 4, d.stream), 0);
    *pinned = 2;  // too early: the copy has not run
    EXPECT(cuMemcpyDtoHAsync_v2(&back, address, 4, d.stream), 0);
    EXPECT(back, -1);
    EXPECT(cuStreamQuery(d.stream), NOT_READY);
    EXPECT(cuStreamQuery(d.stream), 0);
    EXPECT(back, 2);
    EXPECT(cuMemcpyHtoDAsync_v2(address, &pageable, 4, d.stream), 0);
    pageable = 6;  // allowed: the call took a copy
    EXPECT(cuMemcpyDtoH_v2(&back, address, 4), 0);
    EXPECT(back, 2);  // a blocking copy does not wait for other streams
    void *other = nullptr, *event = nullptr;
    EXPECT(cuStreamCreate(&other, 1), 0);
    EXPECT(cuEventCreate(&event, 0), 0);
    EXPECT(cuEventRecord(event, d.stream), 0);
    EXPECT(cuEventQuery(event), NOT_READY);
    EXPECT(cuMemcpyHtoDAsync_v2(address, pinned, 4, d.stream), 0);
    EXPECT(cuEventRecord(event, d.stream), 0);
    EXPECT(cuStreamWaitEvent(other, event, 0), 0);
    EXPECT(cuMemcpyDtoHAsync_v2(&back, address, 4, other), 0);
    EXPECT(cuStreamSynchronize(other), 0);
    EXPECT(back, 2);

    current_case() = "kernels, capture, replay";
    void* module = nullptr;
    EXPECT(cuModuleLoadData(&module, "__global__"), 0);
    EXPECT(cuModuleGetFunction(&d.embed, module, "no_such_kernel"), NOT_FOUND);
    EXPECT(cuModuleGetFunction(&d.embed, module, "embed_bf16"), 0);
    EXPECT(cuModuleGetFunction(&d.norm, module, "rms_norm_bf16"), 0);
    for (u64* p : {&d.table, &d.tokens, &d.previous, &d.x, &d.gain, &d.normed}) EXPECT(cuMemAlloc_v2(p, 256), 0);
    u64 x = d.x, table = d.table;
    Buffer<Bf16> values(32), result(16);
    Buffer<float> ones(8);
    values.random(), ones.fill(1.0f);
    int tokens[2] = {3, ~0}, previous[1] = {1};
    EXPECT(cuMemcpyHtoD_v2(d.table, values.get(), 64), 0);
    EXPECT(cuMemcpyHtoD_v2(d.gain, ones.get(), 32), 0);
    EXPECT(cuMemcpyHtoD_v2(d.tokens, tokens, 8), 0);
    EXPECT(cuMemcpyHtoD_v2(d.previous, previous, 4), 0);
    EXPECT(cuLaunchKernel(d.embed, 1, 1, 1, 512, 1, 1, 0, d.stream, nullptr, nullptr), LAUNCH_OUT_OF_RESOURCES);
    EXPECT(cuLaunchKernel(d.embed, 0, 1, 1, 32, 1, 1, 0, d.stream, nullptr, nullptr), INVALID_VALUE);
    EXPECT(cuLaunchKernel(d.embed, 1, 1, 1, 32, 1, 1, 65536, d.stream, nullptr, nullptr), INVALID_VALUE);
    EXPECT(cuStreamBeginCapture_v2(d.stream, 1), 0);
    step(d);
    void *graph = nullptr, *executable = nullptr;
    EXPECT(cuStreamEndCapture(d.stream, &graph), 0);
    EXPECT(cuGraphInstantiateWithFlags(&executable, graph, 0), 0);
    EXPECT(cuGraphDestroy(graph), 0);
    for (int replay = 0; replay < 2; replay++) {
        tokens[0] = 3 - replay;
        EXPECT(cuMemcpyHtoDAsync_v2(d.tokens, tokens, 8, d.stream), 0);
        EXPECT(cuGraphLaunch(executable, d.stream), 0);
        EXPECT(cuMemcpyDtoHAsync_v2(result.get(), d.normed, 32, d.stream), 0);
        EXPECT(result[0].bits, 0xFFFF);
        EXPECT(cuStreamSynchronize(d.stream), 0);
        for (int t = 0; t < 2; t++) {
            const int row = t ? 1 : tokens[0];
            double sum = 0;
            for (int i = 0; i < 8; i++) sum += wide(values[row * 8 + i]) * wide(values[row * 8 + i]);
            for (int i = 0; i < 8; i++) close("driver step", t * 8 + i, wide(result[t * 8 + i]), wide(values[row * 8 + i]) / std::sqrt(sum / 8), 0.02);
        }
    }
    EXPECT(cuGraphExecDestroy(executable), 0);
    d.x = x, d.table = table;

    current_case() = "work of a stand-in library";
    int ran = 0;
    EXPECT(emu_queue(d.stream, "work", [&] { ran++; }), 0);
    EXPECT(ran, 0);
    EXPECT(cuStreamSynchronize(d.stream), 0);
    EXPECT(ran, 1);
    EXPECT(cuStreamBeginCapture_v2(d.stream, 1), 0);
    EXPECT(emu_queue(d.stream, "work", [&] { ran++; }), 0);
    EXPECT(cuStreamEndCapture(d.stream, &graph), 0);
    EXPECT(cuGraphInstantiateWithFlags(&executable, graph, 0), 0);
    EXPECT(cuGraphDestroy(graph), 0);
    for (int replay = 0; replay < 2; replay++) EXPECT(cuGraphLaunch(executable, d.stream), 0);
    EXPECT(ran, 1);
    EXPECT(cuStreamSynchronize(d.stream), 0);
    EXPECT(ran, 3);
    EXPECT(cuGraphExecDestroy(executable), 0);
    EXPECT(emu_is_device(d.x, 256) && emu_is_device(d.x + 200, 56), 1);
    EXPECT(emu_is_device(d.x + 200, 57) || emu_is_device(reinterpret_cast<u64>(&ran), 4), 0);

    current_case() = "what a capture may not do";
    EXPECT(cuStreamBeginCapture_v2(d.stream, 1), 0);
    EXPECT(cuMemAlloc_v2(&address, 16), CAPTURE_UNSUPPORTED);
    EXPECT(cuMemcpyHtoDAsync_v2(d.tokens, tokens, 8, d.stream), CAPTURE_INVALIDATED);
    EXPECT(cuStreamEndCapture(d.stream, &graph), CAPTURE_INVALIDATED);
    EXPECT(cuStreamEndCapture(d.stream, &graph), CAPTURE_UNMATCHED);

    current_case() = "a lost device";
    setenv("EMU_LOSE_AFTER", std::to_string(state().embeds_run + 1).c_str(), 1);
    step(d);
    EXPECT(cuStreamSynchronize(d.stream), LAUNCH_FAILED);
    EXPECT(cuMemAlloc_v2(&address, 16), LAUNCH_FAILED);
    unsetenv("EMU_LOSE_AFTER");
    state().lost = 0;
    stream_of(d.stream).waiting.clear();
    EXPECT(cuStreamDestroy_v2(other), 0);
    EXPECT(cuEventDestroy_v2(event), 0);
    EXPECT(cuModuleUnload(module), 0);
    EXPECT(cuModuleUnload(module), INVALID_HANDLE);
    EXPECT(cuLaunchKernel(d.embed, 1, 1, 1, 32, 1, 1, 0, d.stream, nullptr, nullptr), INVALID_HANDLE);
    for (u64 p : {table, d.tokens, d.previous, x, d.gain, d.normed}) EXPECT(cuMemFree_v2(p), 0);

    current_case() = "refusals";
    EXPECT(cuModuleLoadData(&module, "__global__"), 0);
    EXPECT(cuModuleGetFunction(&d.norm, module, "rms_norm_bf16"), 0);
    for (const char* refused : {"", "first", "capture", "all"}) {
        setenv("EMU_REFUSE_PDL", refused, 1);
        const bool all = *refused == 'a', first = *refused == 'f', captures = *refused == 'c';
        EXPECT(overlapping(d), all ? INVALID_HANDLE : 0);
        EXPECT(cuStreamBeginCapture_v2(d.stream, 1), 0);
        EXPECT(overlapping(d), *refused ? INVALID_HANDLE : 0);
        EXPECT(cuStreamEndCapture(d.stream, &graph), first || captures ? CAPTURE_INVALIDATED : 0);
        EXPECT(cuGraphDestroy(graph), 0);
        EXPECT(cuStreamBeginCapture_v2(d.stream, 1), 0);
        EXPECT(emu_queue(d.stream, "work", [] {}), 0);
        EXPECT(overlapping(d), all || captures ? INVALID_HANDLE : 0);
        EXPECT(cuStreamEndCapture(d.stream, &graph), captures ? CAPTURE_INVALIDATED : 0);
        EXPECT(cuGraphDestroy(graph), 0);
    }
    unsetenv("EMU_REFUSE_PDL");
    setenv("EMU_REFUSE_CAPTURE", "1", 1);
    EXPECT(cuStreamBeginCapture_v2(d.stream, 1), CAPTURE_UNSUPPORTED);
    unsetenv("EMU_REFUSE_CAPTURE");
    stream_of(d.stream).waiting.clear();

    current_case() = "the end of a context";
    void* again = nullptr;
    EXPECT(cuDevicePrimaryCtxRetain(&again, 0), 0);
    EXPECT(again == context, 1);
    EXPECT(cuMemAlloc_v2(&address, 4), 0);
    EXPECT(cuEventCreate(&event, 0), 0);
    EXPECT(cuDevicePrimaryCtxRelease_v2(0), 0);
    EXPECT(cuStreamSynchronize(d.stream), 0);
    EXPECT(cuDevicePrimaryCtxRelease_v2(0), 0);
    EXPECT(cuStreamSynchronize(d.stream), CONTEXT_IS_DESTROYED);
    EXPECT(cuDevicePrimaryCtxRetain(&again, 0), 0);
    EXPECT(again == context, 0);
    EXPECT(cuCtxSetCurrent(again), 0);
    EXPECT(cuStreamSynchronize(d.stream), INVALID_HANDLE);
    EXPECT(cuEventSynchronize(event), INVALID_HANDLE);
    EXPECT(cuModuleGetFunction(&d.norm, module, "rms_norm_bf16"), INVALID_HANDLE);
    EXPECT(cuMemFree_v2(address), INVALID_VALUE);
    EXPECT(cuStreamDestroy_v2(d.stream), INVALID_HANDLE);
    EXPECT(cuDevicePrimaryCtxRelease_v2(0), 0);
}
int main(int argc, char** argv) { return main_of(argc, argv, cases); }
