// A stand-in libcuda.so.1: the driver calls that the host code makes, with kernels run by emulation.h. The order of
// events is the worst that CUDA allows: work of a stream runs only when someone synchronises, asks an event or copies
// back; an asynchronous copy to the host shows poison until then; a copy from pinned memory reads it late. When the primary
// context is released for the last time, everything that was made in it is gone.
//
//   g++ -std=c++20 -O1 -ffp-contract=off -fno-strict-aliasing -DCUDA_EMU -shared -fPIC -I tests/emulated_gpu -I kernels
//       tests/emulated_gpu/driver.cpp -o libcuda.so.1            (-g -fsanitize=address: out of bounds at the kernel's
//       line, with LD_PRELOAD=libasan; -DEMU_OLD_DRIVER: no symbol newer than CUDA 12.2)
//
// Kernels are found by name, whatever the image; intermediate code must hold them, too. A stand-in library (cublaslt.cpp)
// queues its own work with emu_queue, which a graph captures like a kernel, and asks emu_is_device what is device memory. Settings, all environment variables:
//   EMU_ORDER forward | reverse | seed · EMU_NO_DEVICE=1 · EMU_MEMORY_BYTES (512 MiB) · EMU_OTHER_BYTES: held by someone
//   else · EMU_COMPUTE_CAPABILITY (90) · EMU_MULTIPROCESSORS (4) · EMU_DRIVER_VERSION (13000; 12020 with EMU_OLD_DRIVER) ·
//   EMU_LOSE_AFTER=n: the device fails at the n-th embed · EMU_L2_BYTES (16384: probes of the memory stay small) ·
//   EMU_TRACE=1: each operation as it runs, to stderr; EMU_TRACE=loads: only contexts, modules, refusals ·
//   EMU_NAME: of the device (one without `emulated` is given compiled kernels, whose code is ignored) ·
//   EMU_MODULE_ERROR=code: the answer to every image · EMU_REFUSE_PDL: of the launches that may overlap, refuses the
//   =first of a capture, those of a =capture, or =all · EMU_REFUSE_CAPTURE=1: none begins ·
//   EMU_UPLOADS=1: the bytes of each copy from the host, to stderr
#include <mutex>
#include <string>
#include <set>
#include <tuple>
#include <atomic>
#include <chrono>

#include "common.cuh"

#include "attention.cu"
#include "embed.cu"
#include "gemm.cu"
#include "norm.cu"
#include "peaks.cu"
#include "rope.cu"
#include "sample.cu"
#include "silu.cu"
#include "synthetic.cu"

namespace {
enum Result {
    SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, NO_DEVICE = 100, INVALID_DEVICE = 101, INVALID_IMAGE = 200,
    INVALID_CONTEXT = 201, INVALID_PTX = 218, INVALID_HANDLE = 400, NOT_FOUND = 500, NOT_READY = 600, LAUNCH_OUT_OF_RESOURCES = 701, CONTEXT_IS_DESTROYED = 709, LAUNCH_FAILED = 719,
    NOT_SUPPORTED = 801, CAPTURE_UNSUPPORTED = 900, CAPTURE_INVALIDATED = 901, CAPTURE_UNMATCHED = 903,
};
struct Name {
    int code;
    const char *name, *text;
};
constexpr Name NAMES[] = {
    {0, "CUDA_SUCCESS", "no error"},
    {1, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {2, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {3, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {100, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {101, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {200, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {201, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {400, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {209, "CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available for execution on the device"},
    {218, "CUDA_ERROR_INVALID_PTX", "a PTX JIT compilation failed"},
    {222, "CUDA_ERROR_UNSUPPORTED_PTX_VERSION", "the provided PTX was compiled with an unsupported toolchain."},
    {500, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {600, "CUDA_ERROR_NOT_READY", "device not ready"},
    {701, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", "too many resources requested for launch"},
    {709, "CUDA_ERROR_CONTEXT_IS_DESTROYED", "context is destroyed"},
    {719, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {801, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {900, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "operation not permitted when stream is capturing"},
    {901, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", "operation failed due to a previous error during capture"},
    {903, "CUDA_ERROR_STREAM_CAPTURE_UNMATCHED", "capture was not ended in the same stream as it began"},
};

u64 setting(const char* name, u64 otherwise) {
    const char* text = getenv(name);
    return text ? strtoull(text, nullptr, 10) : otherwise;
}
bool is_set_to(const char* name, const char* value) {
    const char* text = getenv(name);
    return text && !strcmp(text, value);
}
#ifdef EMU_OLD_DRIVER
constexpr int DRIVER_VERSION = 12020;
#else
constexpr int DRIVER_VERSION = 13000;
#endif

// ---- Kernels by name ----------------------------------------------------------------------------------------------
/// Copies the arguments now and gives what runs them later.
using Bind = std::function<std::function<void()>(void**)>;
template <class... A, size_t... I>
std::function<void()> bind_arguments(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
    auto values = std::make_tuple(*static_cast<std::remove_const_t<A>*>(arguments[I])...);
    return [=] { std::apply(kernel, values); };
}
std::function<void()> bind_arguments(void (*kernel)(), void**, std::index_sequence<>) { return kernel; }
template <class... A>
Bind binder(void (*kernel)(A...)) {
    return [=](void** arguments) { return bind_arguments(kernel, arguments, std::index_sequence_for<A...>{}); };
}
struct Function {
    std::string name;
    int most_threads;
    Bind bind;
    int dynamic_shared = 48 << 10;
    int carveout = -1;  // percent of a multiprocessor's memory that it prefers as shared memory; -1: the driver's choice
};
std::map<std::string, Function>& functions() {
    static std::map<std::string, Function> it = {
#define KERNEL(name, threads) {#name, Function{#name, threads, binder(name)}},
#include "entries.inc"
#undef KERNEL
    };
    return it;
}

// ---- State --------------------------------------------------------------------------------------------------------
struct Stream;
struct Event {
    Stream* stream = nullptr;
    u64 recorded = 0, done = 0;
    std::chrono::steady_clock::time_point time;
};
struct Operation {
    std::function<void()> work;  // empty: a kernel
    emu::Launch launch;
    int carveout = -1;  // of the kernel
};
struct Graph {
    std::vector<Operation> operations;
};
struct Capture {
    Graph graph;
    Stream* origin = nullptr;
    std::set<Event*> events;
    bool broken = false;
};
struct Stream {
    std::deque<Operation> waiting;
    std::shared_ptr<Capture> capture;
};
struct Context {
    unsigned retained = 0;
};
struct State {
    std::recursive_mutex lock;
    bool initialized = false;
    int lost = 0;  // sticky
    u64 embeds_run = 0, allocated = 0;
    std::map<u64, size_t> memory;
    std::map<void*, size_t> pinned;
    std::set<Stream*> streams;
    Stream legacy;
    Context* primary = nullptr;
    std::set<const void*> live;  // streams, events, modules, kernels and graphs of the primary context
    std::set<const void*> dead;  // and what is gone: it keeps its memory, so that a late use of it is seen
};
State& state() {
    static State* it = new State;  // outlives whoever calls at exit
    return *it;
}
thread_local void* current_context = nullptr;

bool tracing() {
    static bool it = getenv("EMU_TRACE") && !is_set_to("EMU_TRACE", "loads");
    return it;
}
void trace_load(const char* what) {
    static bool it = getenv("EMU_TRACE") != nullptr;
    if (it) fprintf(stderr, "emulated GPU: %s\n", what);
}

template <class T>
T* made(T* object) {
    state().live.insert(object);
    return object;
}
bool is_live(const void* object) { return state().live.count(object); }
bool is_stream(const void* handle) { return reinterpret_cast<u64>(handle) <= 2 || is_live(handle); }

/// Time that kernels have run, and since when one runs; 0 while none does.
std::atomic<uint64_t> busy_ns{0}, busy_since{0};
uint64_t host_ns() {
    return uint64_t(std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count());
}

void drain(Stream& stream) {
    while (!stream.waiting.empty() && !state().lost) {
        if (stream.waiting.front().work) {
            Operation operation = std::move(stream.waiting.front());
            stream.waiting.pop_front();
            operation.work();
            continue;
        }
        std::vector<emu::Launch> launches;
        while (!stream.waiting.empty() && !stream.waiting.front().work) {
            const Operation& next = stream.waiting.front();
            if (tracing()) fprintf(stderr, "emulated GPU: %s, carve-out %d\n", next.launch.name.c_str(), next.carveout);
            launches.push_back(std::move(stream.waiting.front().launch));
            stream.waiting.pop_front();
            const bool is_embed = launches.back().name.rfind("embed", 0) == 0;
            if (is_embed && ++state().embeds_run == setting("EMU_LOSE_AFTER", 0)) {
                state().lost = LAUNCH_FAILED;
                return;
            }
        }
        busy_since = host_ns();
        emu::run(std::move(launches));
        busy_ns += host_ns() - busy_since.exchange(0);
    }
}
void drain_all() {
    drain(state().legacy);
    for (Stream* stream : state().streams) drain(*stream);
}

Stream& stream_of(void* handle) {
    // 0 and 1 are the legacy stream, 2 a thread's own.
    return reinterpret_cast<u64>(handle) <= 2 ? state().legacy : *static_cast<Stream*>(handle);
}
int queue(void* handle, Operation operation) {
    if (!is_stream(handle)) return INVALID_HANDLE;
    Stream& stream = stream_of(handle);
    if (stream.capture) {
        if (stream.capture->broken) return CAPTURE_INVALIDATED;
        stream.capture->graph.operations.push_back(std::move(operation));
    } else {
        stream.waiting.push_back(std::move(operation));
    }
    return SUCCESS;
}
/// What no capturing stream may do; it spoils the capture.
int forbidden_in_capture() {
    int result = SUCCESS;
    for (Stream* stream : state().streams) {
        if (stream->capture) stream->capture->broken = true, result = CAPTURE_UNSUPPORTED;
    }
    return result;
}
bool is_device_range(u64 address, size_t bytes) {
    auto next = state().memory.upper_bound(address);
    if (next == state().memory.begin()) return false;
    auto [start, size] = *std::prev(next);
    return address + bytes <= start + size;
}
bool is_pinned(const void* address) {
    auto next = state().pinned.upper_bound(const_cast<void*>(address));
    if (next == state().pinned.begin()) return false;
    auto [start, size] = *std::prev(next);
    return static_cast<const char*>(address) < static_cast<char*>(start) + size;
}
int allocate(u64* address, size_t bytes) {
    if (bytes == 0) return INVALID_VALUE;
    size_t rounded = (bytes + 511) / 512 * 512;
    if (state().allocated + rounded + setting("EMU_OTHER_BYTES", 0) > setting("EMU_MEMORY_BYTES", 512ull << 20)) return OUT_OF_MEMORY;
    void* memory = nullptr;
    if (posix_memalign(&memory, 512, bytes)) return OUT_OF_MEMORY;
    memset(memory, emu::POISON, bytes);
    *address = reinterpret_cast<u64>(memory);
    state().memory[*address] = bytes;
    state().allocated += rounded;
    return SUCCESS;
}
int release(u64 address) {
    auto found = state().memory.find(address);
    if (found == state().memory.end()) return INVALID_VALUE;
    state().allocated -= (found->second + 511) / 512 * 512;
    memset(reinterpret_cast<void*>(address), emu::POISON, found->second);
    free(reinterpret_cast<void*>(address));
    state().memory.erase(found);
    return SUCCESS;
}

/// The end of the primary context and of all that was made in it.
void tear_down() {
    state().dead.merge(state().live);
    state().dead.insert(state().primary);
    state().primary = nullptr;
    state().live.clear();
    state().streams.clear();
    state().legacy.waiting.clear();
    while (!state().memory.empty()) release(state().memory.begin()->first);
    for (auto [address, size] : state().pinned) free(address);
    state().pinned.clear();
}

int capability() { return int(setting("EMU_COMPUTE_CAPABILITY", 90)); }
int shared_limit() { return capability() == 90 || capability() / 10 == 10 ? 232448 : capability() == 80 ? 166912 : 101376; }

int attribute(int which) {
    switch (which) {
        case 1: return 1024;                          // threads per block
        case 2: case 3: return 1024;
        case 4: return 64;
        case 5: return 2147483647;                    // grid
        case 6: case 7: return 65535;
        case 8: return 48 << 10;                      // shared memory per block
        case 10: return 32;
        case 12: case 82: return 65536;               // registers
        case 13: return 1000000;                      // kHz
        case 16: return int(setting("EMU_MULTIPROCESSORS", 4));
        case 36: return 1000000;                      // memory clock, kHz
        case 37: return 64;                           // bus width, bits
        case 38: return int(setting("EMU_L2_BYTES", 16 << 10));
        case 39: return 2048;                         // threads per multiprocessor
        case 40: return 2;
        case 41: return 1;
        case 75: return capability() / 10;
        case 76: return capability() % 10;
        case 81: return shared_limit() + 1024;
        case 95: return 1;
        case 97: return shared_limit();               // opt-in
        case 111: return 1024;
        case 115: return 1;                           // memory pools
        default: return 0;
    }
}

/// Common beginning of a call that needs a context.
#define NEEDS_CONTEXT \
    std::lock_guard guard(state().lock); \
    if (!state().initialized) return NOT_INITIALIZED; \
    if (!current_context) return INVALID_CONTEXT; \
    if (current_context != state().primary) return CONTEXT_IS_DESTROYED; \
    if (state().lost) return state().lost

/// And a stream of this context.
#define NEEDS_STREAM \
    NEEDS_CONTEXT; \
    if (!is_stream(stream)) return INVALID_HANDLE

int launch(Function* function, emu::Dim grid, emu::Dim block, unsigned shared, void* stream, void** arguments, bool pdl) {
    if (!is_live(function)) return INVALID_HANDLE;
    if (grid.count() == 0 || block.count() == 0 || grid.y > 65535 || grid.z > 65535) return INVALID_VALUE;
    if (block.count() > size_t(function->most_threads)) return LAUNCH_OUT_OF_RESOURCES;
    if (int(shared) > function->dynamic_shared) return INVALID_VALUE;
    Operation operation;
    operation.launch = {function->name, grid, block, shared, pdl && capability() >= 90, function->bind(arguments)};
    operation.carveout = function->carveout;
    return queue(stream, std::move(operation));
}
}  // namespace

#define API extern "C" __attribute__((visibility("default"))) int

/// Nanoseconds that kernels have run so far: what a stand-in for a power sensor makes its power of.
extern "C" __attribute__((visibility("default"))) uint64_t emu_busy_ns() {
    const uint64_t since = busy_since;
    return busy_ns + (since ? host_ns() - since : 0);
}

// ---- Device and context -------------------------------------------------------------------------------------------
API cuInit(unsigned) {
    if (getenv("EMU_NO_DEVICE")) return NO_DEVICE;
    state().initialized = true;
    return SUCCESS;
}
API cuDriverGetVersion(int* version) { return *version = int(setting("EMU_DRIVER_VERSION", DRIVER_VERSION)), SUCCESS; }
API cuDeviceGetCount(int* count) { return *count = 1, state().initialized ? SUCCESS : NOT_INITIALIZED; }
API cuDeviceGet(int* device, int ordinal) { return *device = ordinal, !state().initialized ? NOT_INITIALIZED : ordinal == 0 ? SUCCESS : INVALID_DEVICE; }
API cuDeviceGetName(char* name, int size, int) {
    if (const char* given = getenv("EMU_NAME")) snprintf(name, size_t(size), "%s", given);
    else snprintf(name, size_t(size), "emulated GPU (sm_%d)", capability());
    return SUCCESS;
}
API cuDeviceGetUuid(unsigned char* uuid, int) { return memset(uuid, 0xE0, 16), SUCCESS; }
API cuDeviceGetUuid_v2(unsigned char* uuid, int) { return memset(uuid, 0xE0, 16), SUCCESS; }
API cuDeviceGetPCIBusId(char* text, int size, int) { return snprintf(text, size_t(size), "0000:00:00.0"), SUCCESS; }
API cuDeviceTotalMem_v2(size_t* bytes, int) { return *bytes = setting("EMU_MEMORY_BYTES", 512ull << 20), SUCCESS; }
API cuDeviceGetAttribute(int* value, int which, int) { return *value = attribute(which), SUCCESS; }
API cuDevicePrimaryCtxRetain(void** context, int) {
    std::lock_guard guard(state().lock);
    if (!state().initialized) return NOT_INITIALIZED;
    if (!state().primary) state().primary = new Context;
    trace_load("context retained");
    return ++state().primary->retained, *context = state().primary, SUCCESS;
}
API cuDevicePrimaryCtxRelease_v2(int) {
    std::lock_guard guard(state().lock);
    if (!state().primary) return INVALID_CONTEXT;
    trace_load("context released");
    if (--state().primary->retained == 0) tear_down();
    return SUCCESS;
}
API cuCtxSetCurrent(void* context) { return current_context = context, SUCCESS; }
API cuCtxGetCurrent(void** context) { return *context = current_context, SUCCESS; }
API cuCtxGetDevice(int* device) { return *device = 0, SUCCESS; }
API cuCtxSetFlags(unsigned) { return SUCCESS; }
API cuCtxSetLimit(int, size_t) { return SUCCESS; }
API cuCtxGetLimit(size_t* value, int) { return *value = 0, SUCCESS; }
API cuCtxGetStreamPriorityRange(int* least, int* greatest) { return *least = 0, *greatest = -5, SUCCESS; }
API cuCtxSynchronize() {
    NEEDS_CONTEXT;
    if (int error = forbidden_in_capture()) return error;
    drain_all();
    return state().lost;
}

// ---- Memory -------------------------------------------------------------------------------------------------------
API cuMemGetInfo_v2(size_t* free_bytes, size_t* total) {
    NEEDS_CONTEXT;
    *total = setting("EMU_MEMORY_BYTES", 512ull << 20);
    u64 used = state().allocated + setting("EMU_OTHER_BYTES", 0);
    *free_bytes = used < *total ? *total - used : 0;
    return SUCCESS;
}
API cuMemAlloc_v2(u64* address, size_t bytes) {
    NEEDS_CONTEXT;
    if (int error = forbidden_in_capture()) return error;
    return allocate(address, bytes);
}
API cuMemFree_v2(u64 address) {
    NEEDS_CONTEXT;
    drain_all();  // waits for the device
    return release(address);
}
API cuMemAllocAsync(u64* address, size_t bytes, void* stream) {
    NEEDS_STREAM;
    if (stream_of(stream).capture) return forbidden_in_capture();
    return allocate(address, bytes);
}
API cuMemFreeAsync(u64 address, void* stream) {
    NEEDS_STREAM;
    if (stream_of(stream).capture) return forbidden_in_capture();
    return queue(stream, {[=] { release(address); }, {}});
}
API cuMemHostAlloc(void** address, size_t bytes, unsigned) {
    NEEDS_CONTEXT;
    *address = aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
    memset(*address, emu::POISON, bytes);
    state().pinned[*address] = bytes;
    return SUCCESS;
}
API cuMemAllocHost_v2(void** address, size_t bytes) { return cuMemHostAlloc(address, bytes, 0); }
API cuMemFreeHost(void* address) {
    NEEDS_CONTEXT;
    drain_all();
    if (!state().pinned.erase(address)) return INVALID_VALUE;
    free(address);
    return SUCCESS;
}
API cuMemcpyHtoDAsync_v2(u64 to, const void* from, size_t bytes, void* stream) {
    NEEDS_STREAM;
    if (!is_device_range(to, bytes)) return INVALID_VALUE;
    static const bool is_told = getenv("EMU_UPLOADS") != nullptr;
    if (is_told) fprintf(stderr, "emulated GPU: %zu bytes from the host\n", bytes);
    if (is_pinned(from) || stream_of(stream).capture) return queue(stream, {[=] { memcpy(reinterpret_cast<void*>(to), from, bytes); }, {}});
    auto staged = std::make_shared<std::string>(static_cast<const char*>(from), bytes);  // pageable: the call takes a copy
    return queue(stream, {[=] { memcpy(reinterpret_cast<void*>(to), staged->data(), bytes); }, {}});
}
API cuMemcpyDtoHAsync_v2(void* to, u64 from, size_t bytes, void* stream) {
    NEEDS_STREAM;
    if (!is_device_range(from, bytes)) return INVALID_VALUE;
    if (!stream_of(stream).capture) memset(to, emu::POISON, bytes);
    return queue(stream, {[=] { memcpy(to, reinterpret_cast<void*>(from), bytes); }, {}});
}
API cuMemcpyDtoDAsync_v2(u64 to, u64 from, size_t bytes, void* stream) {
    NEEDS_CONTEXT;
    if (!is_device_range(to, bytes) || !is_device_range(from, bytes)) return INVALID_VALUE;
    return queue(stream, {[=] { memmove(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), bytes); }, {}});
}
/// A blocking copy is ordered after the legacy stream only: other streams are not waited for.
int blocking(int queued) {
    if (queued) return queued;
    drain(state().legacy);
    return state().lost;
}
API cuMemcpyHtoD_v2(u64 to, const void* from, size_t bytes) { return blocking(cuMemcpyHtoDAsync_v2(to, from, bytes, nullptr)); }
API cuMemcpyDtoH_v2(void* to, u64 from, size_t bytes) { return blocking(cuMemcpyDtoHAsync_v2(to, from, bytes, nullptr)); }
API cuMemcpyDtoD_v2(u64 to, u64 from, size_t bytes) { return blocking(cuMemcpyDtoDAsync_v2(to, from, bytes, nullptr)); }
API cuMemsetD8Async(u64 to, unsigned char value, size_t bytes, void* stream) {
    NEEDS_CONTEXT;
    if (!is_device_range(to, bytes)) return INVALID_VALUE;
    return queue(stream, {[=] { memset(reinterpret_cast<void*>(to), value, bytes); }, {}});
}
API cuMemsetD32Async(u64 to, unsigned value, size_t count, void* stream) {
    NEEDS_CONTEXT;
    if (!is_device_range(to, count * 4)) return INVALID_VALUE;
    return queue(stream, {[=] { std::fill_n(reinterpret_cast<unsigned*>(to), count, value); }, {}});
}
API cuMemsetD8_v2(u64 to, unsigned char value, size_t bytes) { return blocking(cuMemsetD8Async(to, value, bytes, nullptr)); }

// ---- Streams and events -------------------------------------------------------------------------------------------
API cuStreamCreate(void** stream, unsigned) {
    NEEDS_CONTEXT;
    Stream* it = made(new Stream);
    state().streams.insert(it);
    *stream = it;
    return SUCCESS;
}
API cuStreamCreateWithPriority(void** stream, unsigned flags, int) { return cuStreamCreate(stream, flags); }
API cuStreamDestroy_v2(void* stream) {
    std::lock_guard guard(state().lock);
    Stream* gone = static_cast<Stream*>(stream);
    if (!state().live.erase(gone)) return INVALID_HANDLE;
    drain(*gone);
    state().streams.erase(gone);
    delete gone;
    return SUCCESS;
}
API cuStreamSynchronize(void* stream) {
    NEEDS_STREAM;
    if (stream_of(stream).capture) return forbidden_in_capture();
    drain(stream_of(stream));
    return state().lost;
}
API cuStreamQuery(void* stream) {
    NEEDS_STREAM;
    if (stream_of(stream).capture) return forbidden_in_capture();
    bool busy = !stream_of(stream).waiting.empty();
    drain(stream_of(stream));
    return state().lost ? state().lost : busy ? NOT_READY : SUCCESS;
}
API cuStreamGetCtx(void* stream, void** context) {
    NEEDS_STREAM;
    return *context = state().primary, SUCCESS;
}
API cuEventCreate(void** event, unsigned) {
    NEEDS_CONTEXT;
    *event = made(new Event);
    return SUCCESS;
}
API cuEventDestroy_v2(void* event) {
    std::lock_guard guard(state().lock);
    Event* gone = static_cast<Event*>(event);
    if (!state().live.erase(gone)) return INVALID_HANDLE;
    if (gone->stream && gone->done < gone->recorded) drain(*gone->stream);
    delete gone;
    return SUCCESS;
}
API cuEventRecord(void* event, void* stream) {
    NEEDS_STREAM;
    if (!is_live(event)) return INVALID_HANDLE;
    Event* e = static_cast<Event*>(event);
    Stream& s = stream_of(stream);
    if (s.capture) {
        s.capture->events.insert(e);
        return SUCCESS;
    }
    e->stream = &s;
    u64 turn = ++e->recorded;
    return queue(stream, {[=] { e->done = turn, e->time = std::chrono::steady_clock::now(); }, {}});
}
API cuEventRecordWithFlags(void* event, void* stream, unsigned) { return cuEventRecord(event, stream); }
API cuEventSynchronize(void* event) {
    NEEDS_CONTEXT;
    if (!is_live(event)) return INVALID_HANDLE;
    Event* e = static_cast<Event*>(event);
    if (e->done < e->recorded) drain(*e->stream);
    return state().lost;
}
API cuEventQuery(void* event) {
    NEEDS_CONTEXT;
    if (!is_live(event)) return INVALID_HANDLE;
    Event* e = static_cast<Event*>(event);
    bool busy = e->done < e->recorded;
    if (busy) drain(*e->stream);
    return state().lost ? state().lost : busy ? NOT_READY : SUCCESS;
}
API cuEventElapsedTime(float* milliseconds, void* start, void* end) {
    NEEDS_CONTEXT;
    if (!is_live(start) || !is_live(end)) return INVALID_HANDLE;
    Event *a = static_cast<Event*>(start), *b = static_cast<Event*>(end);
    if (!a->recorded || !b->recorded) return INVALID_HANDLE;
    if (a->done < a->recorded || b->done < b->recorded) return NOT_READY;
    *milliseconds = std::chrono::duration<float, std::milli>(b->time - a->time).count();
    return SUCCESS;
}
#ifndef EMU_OLD_DRIVER
API cuEventElapsedTime_v2(float* milliseconds, void* start, void* end) { return cuEventElapsedTime(milliseconds, start, end); }
#endif
API cuStreamWaitEvent(void* stream, void* event, unsigned) {
    NEEDS_STREAM;
    if (!is_live(event)) return INVALID_HANDLE;
    Event* e = static_cast<Event*>(event);
    Stream& s = stream_of(stream);
    for (Stream* other : state().streams) {
        if (other->capture && other->capture->events.count(e)) return s.capture = other->capture, SUCCESS;  // joins the capture
    }
    u64 turn = e->recorded;
    return queue(stream, {[=] { if (e->done < turn) drain(*e->stream); }, {}});
}
API cuLaunchHostFunc(void* stream, void (*function)(void*), void* data) {
    NEEDS_CONTEXT;
    return queue(stream, {[=] { function(data); }, {}});
}

// ---- Capture and graphs -------------------------------------------------------------------------------------------
API cuStreamBeginCapture_v2(void* stream, int) {
    NEEDS_STREAM;
    if (setting("EMU_REFUSE_CAPTURE", 0)) return CAPTURE_UNSUPPORTED;
    Stream& s = stream_of(stream);
    if (&s == &state().legacy || s.capture) return CAPTURE_UNSUPPORTED;
    s.capture = std::make_shared<Capture>();
    s.capture->origin = &s;
    return SUCCESS;
}
API cuStreamIsCapturing(void* stream, int* status) {
    NEEDS_STREAM;
    auto& capture = stream_of(stream).capture;
    *status = !capture ? 0 : capture->broken ? 2 : 1;
    return SUCCESS;
}
API cuStreamEndCapture(void* stream, void** graph) {
    NEEDS_STREAM;
    *graph = nullptr;
    auto capture = stream_of(stream).capture;
    if (!capture || capture->origin != &stream_of(stream)) return CAPTURE_UNMATCHED;
    for (Stream* s : state().streams) {
        if (s->capture == capture) s->capture = nullptr;
    }
    if (capture->broken) return CAPTURE_INVALIDATED;
    *graph = new Graph(std::move(capture->graph));
    return SUCCESS;
}
API cuGraphInstantiateWithFlags(void** executable, void* graph, u64) {
    NEEDS_CONTEXT;
    *executable = made(new Graph(*static_cast<Graph*>(graph)));
    return SUCCESS;
}
API cuGraphUpload(void*, void*) { return SUCCESS; }
API cuGraphLaunch(void* executable, void* stream) {
    NEEDS_STREAM;
    if (!is_live(executable)) return INVALID_HANDLE;
    for (const Operation& operation : static_cast<Graph*>(executable)->operations) {
        if (int error = queue(stream, operation)) return error;
    }
    return SUCCESS;
}
API cuGraphGetNodes(void* graph, void**, size_t* count) { return *count = static_cast<Graph*>(graph)->operations.size(), SUCCESS; }
API cuGraphExecDestroy(void* executable) {
    std::lock_guard guard(state().lock);
    if (!state().live.erase(executable)) return INVALID_HANDLE;
    return delete static_cast<Graph*>(executable), SUCCESS;
}
API cuGraphDestroy(void* graph) { return delete static_cast<Graph*>(graph), SUCCESS; }

// ---- Modules and launches -----------------------------------------------------------------------------------------
struct Module {
    /// Intermediate code; empty for any other image.
    std::string ptx;
    /// Those that were asked for.
    std::map<std::string, Function> functions;
};
int loaded(void** module, std::string ptx) {
    trace_load("module loaded");
    *module = made(new Module{std::move(ptx), {}});
    return SUCCESS;
}
API cuModuleLoadData(void** module, const void* image) {
    NEEDS_CONTEXT;
    if (int error = int(setting("EMU_MODULE_ERROR", 0))) return error;
    if (!image || !*static_cast<const char*>(image)) return INVALID_IMAGE;
    return loaded(module, "");
}
/// Intermediate code must look like it, and be for this device's architecture or an older one. What it says is not run.
API cuModuleLoadDataEx(void** module, const void* image, unsigned count, int* options, void** values) {
    NEEDS_CONTEXT;
    char* log = nullptr;
    size_t size = 0;
    for (unsigned i = 0; i < count; ++i) {
        if (options[i] == 5) log = static_cast<char*>(values[i]);
        if (options[i] == 6) size = size_t(values[i]);
    }
    auto fail = [&](int error, const char* why) {
        if (log && size) snprintf(log, size, "%s", why);
        return error;
    };
    if (int error = int(setting("EMU_MODULE_ERROR", 0))) return fail(error, "ptxas: asked to fail\nby the test");
    if (!image) return INVALID_IMAGE;
    std::string ptx = static_cast<const char*>(image);
    size_t target = ptx.find("\n.target sm_");
    if (ptx.find("\n.version ") == std::string::npos || target == std::string::npos) return fail(INVALID_PTX, "ptxas: no intermediate code");
    if (atoi(ptx.c_str() + target + 12) > capability()) return fail(INVALID_PTX, "ptxas: for a newer device");
    return loaded(module, ptx);
}
API cuModuleUnload(void* module) {
    NEEDS_CONTEXT;
    if (!state().live.erase(module)) return INVALID_HANDLE;
    trace_load("module unloaded");
    state().dead.insert(module);
    for (auto& [name, function] : static_cast<Module*>(module)->functions) state().live.erase(&function);
    return SUCCESS;
}
API cuModuleGetFunction(void** function, void* module, const char* name) {
    NEEDS_CONTEXT;
    if (!is_live(module)) return INVALID_HANDLE;
    const std::string& ptx = static_cast<Module*>(module)->ptx;
    if (!ptx.empty() && ptx.find(".entry " + std::string(name) + "(") == std::string::npos) return NOT_FOUND;
    auto found = functions().find(name);
    if (found == functions().end()) return NOT_FOUND;
    *function = made(&static_cast<Module*>(module)->functions.insert(*found).first->second);
    return SUCCESS;
}
API cuModuleGetGlobal_v2(u64*, size_t*, void*, const char*) { return NOT_FOUND; }
API cuFuncGetAttribute(int* value, int which, void* function) {
    NEEDS_CONTEXT;
    if (!is_live(function)) return INVALID_HANDLE;
    Function* f = static_cast<Function*>(function);
    switch (which) {
        case 0: *value = f->most_threads; break;
        case 4: *value = f->most_threads > 128 ? 96 : 168; break;
        case 5: case 6: *value = capability(); break;
        case 8: *value = f->dynamic_shared; break;
        default: *value = 0;
    }
    return SUCCESS;
}
API cuFuncSetAttribute(void* function, int which, int value) {
    NEEDS_CONTEXT;
    if (!is_live(function)) return INVALID_HANDLE;
    if (which == 8 && (value < 0 || value > shared_limit())) return INVALID_VALUE;
    if (which == 8) static_cast<Function*>(function)->dynamic_shared = std::max(value, 48 << 10);
    if (which == 9 && (value < -1 || value > 100)) return INVALID_VALUE;
    if (which == 9) static_cast<Function*>(function)->carveout = value;
    return SUCCESS;
}
API cuFuncSetCacheConfig(void*, int) { return SUCCESS; }
API cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void* function, int threads, size_t shared) {
    int registers = 0;
    if (int error = cuFuncGetAttribute(&registers, 4, function)) return error;
    *blocks = std::min({2048 / threads, 65536 / (registers * threads), int(size_t(shared_limit() + 1024) / (shared + 1024))});
    return SUCCESS;
}
API cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, void* function, int threads, size_t shared, unsigned) {
    return cuOccupancyMaxActiveBlocksPerMultiprocessor(blocks, function, threads, shared);
}
API cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, void* stream, void** arguments, void**) {
    NEEDS_CONTEXT;
    return launch(static_cast<Function*>(function), {gx, gy, gz}, {bx, by, bz}, shared, stream, arguments, false);
}
struct LaunchAttribute {
    int id;
    char pad[4];
    union {
        char bytes[64];
        int programmatic;
    };
};
struct LaunchConfig {
    unsigned gx, gy, gz, bx, by, bz, shared;
    void* stream;
    LaunchAttribute* attributes;
    unsigned count;
};
/// As EMU_REFUSE_PDL says. A launch that is refused spoils the capture.
bool refuses_pdl(Stream& stream) {
    if (is_set_to("EMU_REFUSE_PDL", "all")) return true;
    if (!stream.capture) return false;
    const bool is_first = stream.capture->graph.operations.empty();
    const bool refuses = is_set_to("EMU_REFUSE_PDL", "capture") || (is_first && is_set_to("EMU_REFUSE_PDL", "first"));
    if (refuses) trace_load("overlapping launch refused");
    stream.capture->broken |= refuses;
    return refuses;
}
API cuLaunchKernelEx(const LaunchConfig* c, void* function, void** arguments, void**) {
    NEEDS_CONTEXT;
    bool pdl = false;
    for (unsigned i = 0; i < c->count; i++) {
        if (c->attributes[i].id != 6) return NOT_SUPPORTED;  // programmatic stream serialization
        pdl = c->attributes[i].programmatic != 0;
    }
    if (pdl && capability() < 90) return NOT_SUPPORTED;
    if (pdl && is_stream(c->stream) && refuses_pdl(stream_of(c->stream))) return INVALID_HANDLE;
    return launch(static_cast<Function*>(function), {c->gx, c->gy, c->gz}, {c->bx, c->by, c->bz}, c->shared, c->stream, arguments, pdl);
}

// ---- For stand-in libraries ---------------------------------------------------------------------------------------
API emu_queue(void* stream, const char* name, const std::function<void()>& work) {
    NEEDS_CONTEXT;
    return queue(stream, {[text = std::string(name), work] {
        if (tracing()) fprintf(stderr, "emulated GPU: %s\n", text.c_str());
        work();
    }, {}});
}
API emu_is_device(u64 address, size_t bytes) {
    std::lock_guard guard(state().lock);
    return is_device_range(address, bytes);
}

// ---- Errors and the rest ------------------------------------------------------------------------------------------
API cuGetErrorName(int code, const char** name) {
    for (const Name& n : NAMES)
        if (n.code == code) return *name = n.name, SUCCESS;
    return *name = nullptr, INVALID_VALUE;
}
API cuGetErrorString(int code, const char** text) {
    for (const Name& n : NAMES)
        if (n.code == code) return *text = n.text, SUCCESS;
    return *text = nullptr, INVALID_VALUE;
}
/// NVRTC asks for tables of private functions, without looking at the result: each begins with its size, and has none.
API cuGetExportTable(const void** table, const void*) {
    static const size_t empty[] = {sizeof(size_t)};
    return *table = empty, SUCCESS;
}
API cuProfilerStart() { return SUCCESS; }
API cuProfilerStop() { return SUCCESS; }
