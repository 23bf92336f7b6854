// A stand-in libcublasLt.so.13: the part of cuBLASLt that the host code calls, on the stand-in driver. A product is only
// queued, so that it runs as late as the driver runs anything, and is captured into graphs. What a caller must not rely
// on is poisoned: the workspace before and after, and a result that is not read before it is written.
//
//   g++ -std=c++20 -O3 -fassociative-math -fno-signed-zeros -fno-trapping-math -shared -fPIC
//       -Wl,-soname,libcublasLt.so.13 tests/emulated_gpu/cublaslt.cpp -o libcublasLt.so.13 -ldl
//
// Products of bf16, f16 or f32 values with f32 sums; column- or row-major, transposed or not, any leading dimension,
// scaled by alpha, added to beta C. Everything else is refused. Algorithms, in the order in which they are guessed:
//   11  plain, and slow: 3 ms more than it needs
//   20  guessed, and refused by cublasLtMatmulAlgoCheck
//   66  the depth in two parts, which meet in the workspace: f32 [2, m n]; only where that fits
//   72  plain, for depths that are a multiple of 8
// Settings, environment variables: EMU_LT_REFUSE=id: cublasLtMatmul fails for this algorithm (0: for all) ·
// EMU_LT_BROKEN=1: cublasLtCreate fails · EMU_LT_NARROW=n: algorithm 66 refuses results of n columns or fewer
#include <dlfcn.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <thread>
#include <vector>

using u64 = uint64_t;
using std::vector;

namespace {
enum Status { SUCCESS = 0, NOT_INITIALIZED = 1, INVALID_VALUE = 7, EXECUTION_FAILED = 13, NOT_SUPPORTED = 15 };
enum Type { R_32F = 0, R_16F = 2, R_16BF = 14 };
constexpr int COMPUTE_32F = 68;
constexpr unsigned char POISON = 0xFF;

u64 setting(const char* name, u64 otherwise) {
    const char* text = getenv(name);
    return text ? strtoull(text, nullptr, 10) : otherwise;
}

// ---- The driver ---------------------------------------------------------------------------------------------------
template <class F>
F driver(const char* name) {
    void* library = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<F>(dlsym(library, name)) : nullptr;
}
int queue(void* stream, const char* name, const std::function<void()>& work) {
    static auto call = driver<int (*)(void*, const char*, const std::function<void()>&)>("emu_queue");
    return call ? call(stream, name, work) : NOT_INITIALIZED;
}
bool is_device(const void* address, size_t bytes) {
    static auto call = driver<int (*)(u64, size_t)>("emu_is_device");
    return call && call(reinterpret_cast<u64>(address), bytes);
}

// ---- Values -------------------------------------------------------------------------------------------------------
size_t bytes_of(int type) { return type == R_32F ? 4 : 2; }
float wide(const void* values, int type, size_t at) {
    if (type == R_32F) return static_cast<const float*>(values)[at];
    uint16_t bits = static_cast<const uint16_t*>(values)[at];
    uint32_t word = uint32_t(bits) << 16;
    if (type == R_16F) {
        uint32_t sign = uint32_t(bits & 0x8000) << 16, magnitude = bits & 0x7FFF;
        if (magnitude < 0x0400) {  // zero and the smallest values
            float value = float(magnitude) / 16777216.0f;
            memcpy(&word, &value, 4);
        } else {
            word = magnitude >= 0x7C00 ? 0x7F800000u | (magnitude & 0x3FF) << 13 : (magnitude << 13) + (112u << 23);
        }
        word |= sign;
    }
    float value;
    memcpy(&value, &word, 4);
    return value;
}
/// Rounded to nearest even.
void put(void* values, int type, size_t at, float value) {
    uint32_t word;
    memcpy(&word, &value, 4);
    uint32_t magnitude = word & 0x7FFFFFFF;
    uint16_t sign = uint16_t(word >> 16 & 0x8000), narrow;
    if (type == R_32F) return void(static_cast<float*>(values)[at] = value);
    if (magnitude > 0x7F800000u) narrow = 0x7FFF;
    else if (type == R_16BF) narrow = uint16_t((magnitude + 0x7FFF + (magnitude >> 16 & 1)) >> 16);
    else if (magnitude >= 0x477FF000u) narrow = 0x7C00;
    else if (magnitude < 0x38800000u) narrow = uint16_t(std::nearbyint(std::fabs(value) * 16777216.0f));
    else narrow = uint16_t((magnitude - (112u << 23) + 0xFFF + (magnitude >> 13 & 1)) >> 13);
    static_cast<uint16_t*>(values)[at] = sign | narrow;
}

// ---- Objects ------------------------------------------------------------------------------------------------------
struct Layout {
    uint32_t type = R_32F;
    int32_t order = 0;  // 0: columns, 1: rows
    u64 rows = 0, columns = 0;
    int64_t leading = 0;
    int32_t batch = 1;
    size_t at(u64 i, u64 j) const { return order == 0 ? i + j * u64(leading) : i * u64(leading) + j; }
    size_t bytes() const { return rows && columns ? (at(rows - 1, columns - 1) + 1) * bytes_of(int(type)) : 0; }
    bool good() const {
        bool known = type == R_32F || type == R_16F || type == R_16BF;
        return known && order <= 1 && rows && columns && batch == 1 && u64(leading) >= (order == 0 ? rows : columns);
    }
};
struct Description {
    int32_t compute = 0, scale = 0, pointers = 0, transposed[2] = {0, 0};
    uint32_t epilogue = 1;
};
struct Preference {
    u64 workspace = 0;
};
struct Algorithm {
    u64 mark, id, rest[6];
};
constexpr u64 MARK = 0x6D65746B6F740001ull;
struct Candidate {
    Algorithm algorithm;
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
};
struct Numbers {
    int id;
    uint32_t tile, stages;
    int split;
};
constexpr Numbers ALGORITHMS[] = {{11, 5, 2, 1}, {20, 6, 3, 1}, {66, 20, 8, 2}, {72, 18, 6, 1}};
const Numbers* find(const Algorithm& algorithm) {
    for (const Numbers& numbers : ALGORITHMS)
        if (algorithm.mark == MARK && algorithm.id == u64(numbers.id)) return &numbers;
    return nullptr;
}

struct Product {
    Description how;
    Layout a, b, c, d;
    u64 m() const { return d.rows; }
    u64 n() const { return d.columns; }
    u64 k() const { return how.transposed[0] ? a.rows : a.columns; }
    Status check() const {
        if (!a.good() || !b.good() || !c.good() || !d.good()) return INVALID_VALUE;
        if (how.compute != COMPUTE_32F || how.scale != R_32F || how.pointers || how.epilogue != 1) return NOT_SUPPORTED;
        u64 a_rows = how.transposed[0] ? a.columns : a.rows;
        u64 b_rows = how.transposed[1] ? b.columns : b.rows, b_columns = how.transposed[1] ? b.rows : b.columns;
        if (a_rows != m() || b_rows != k() || b_columns != n() || c.rows != m() || c.columns != n()) return INVALID_VALUE;
        return a.type != b.type || c.type != d.type ? NOT_SUPPORTED : SUCCESS;
    }
    size_t workspace(int id) const { return id == 66 ? 2 * m() * n() * 4 : 0; }
    Status check(int id) const {
        if (id == 72 && k() % 8) return NOT_SUPPORTED;
        if (id == 66 && n() <= setting("EMU_LT_NARROW", 0)) return NOT_SUPPORTED;
        return check();
    }
};

/// Rows of a matrix one after another, in f32.
vector<float> rows_of(const void* values, const Layout& layout, bool transposed) {
    u64 rows = transposed ? layout.columns : layout.rows, columns = transposed ? layout.rows : layout.columns;
    vector<float> out(rows * columns);
    for (u64 i = 0; i < rows; i++)
        for (u64 j = 0; j < columns; j++) out[i * columns + j] = wide(values, int(layout.type), transposed ? layout.at(j, i) : layout.at(i, j));
    return out;
}

void compute(const Product& p, int id, float alpha, const void* A, const void* B, float beta, const void* C, void* D, void* workspace, size_t bytes) {
    const u64 m = p.m(), n = p.n(), k = p.k();
    const bool in_place = C == D;
    bytes = std::min(bytes, p.workspace(id) + 4096);
    memset(workspace, POISON, bytes);
    if (id == 11) std::this_thread::sleep_for(std::chrono::milliseconds(3));
    const vector<float> a = rows_of(A, p.a, p.how.transposed[0]), b = rows_of(B, p.b, !p.how.transposed[1]);
    const u64 parts = id == 66 ? 2 : 1, half = parts == 2 ? k / 2 : k;
    vector<float> own(parts == 2 ? 0 : m * n);
    float* sums = parts == 2 ? static_cast<float*>(workspace) : own.data();
    for (u64 part = 0; part < parts; part++) {
        const u64 from = part * half, to = part + 1 == parts ? k : half;
        for (u64 j = 0; j < n; j++) {
            for (u64 i = 0; i < m; i++) {
                const float *left = &a[i * k], *right = &b[j * k];
                float sum = 0;
                for (u64 l = from; l < to; l++) sum += left[l] * right[l];
                sums[part * m * n + j * m + i] = sum;
            }
        }
    }
    for (u64 j = 0; j < n; j++) {
        for (u64 i = 0; i < m; i++) {
            float sum = sums[j * m + i];
            if (parts == 2) sum += sums[m * n + j * m + i];
            // What is scaled by zero is not read, so that NaN in it does no harm.
            float old = beta != 0 ? beta * wide(in_place ? D : C, int(p.c.type), p.c.at(i, j)) : 0;
            put(D, int(p.d.type), p.d.at(i, j), alpha * sum + old);
        }
    }
    memset(workspace, POISON, bytes);
}

template <class T>
Status set(T& field, const void* from, size_t bytes) {
    if (bytes != sizeof(T)) return INVALID_VALUE;
    return memcpy(&field, from, bytes), SUCCESS;
}
Status describe(void* how, void* a, void* b, void* c, void* d, Product& out) {
    if (!how || !a || !b || !c || !d) return INVALID_VALUE;
    out = {*static_cast<Description*>(how), *static_cast<Layout*>(a), *static_cast<Layout*>(b), *static_cast<Layout*>(c), *static_cast<Layout*>(d)};
    return out.check();
}
}  // namespace

#define API extern "C" __attribute__((visibility("default")))

API Status cublasLtCreate(void** handle) {
    if (setting("EMU_LT_BROKEN", 0)) return NOT_INITIALIZED;
    auto current = driver<int (*)(void**)>("cuCtxGetCurrent");
    void* context = nullptr;
    if (!current || current(&context) || !context) return NOT_INITIALIZED;
    return *handle = new char, SUCCESS;
}
API Status cublasLtDestroy(void* handle) { return delete static_cast<char*>(handle), SUCCESS; }
API size_t cublasLtGetVersion() { return 130199; }
API const char* cublasLtGetStatusString(Status status) {
    switch (status) {
        case SUCCESS: return "success";
        case NOT_INITIALIZED: return "the library was not initialized";
        case INVALID_VALUE: return "an unsupported value or parameter was passed to the function";
        case EXECUTION_FAILED: return "the GPU program failed to execute";
        case NOT_SUPPORTED: return "the functionality requested is not supported";
    }
    return "unknown";
}

API Status cublasLtMatmulDescCreate(void** made, int compute, int scale) {
    auto* it = new Description;
    it->compute = compute, it->scale = scale;
    return *made = it, SUCCESS;
}
API Status cublasLtMatmulDescDestroy(void* it) { return delete static_cast<Description*>(it), SUCCESS; }
API Status cublasLtMatmulDescSetAttribute(void* it, int which, const void* from, size_t bytes) {
    auto& d = *static_cast<Description*>(it);
    switch (which) {
        case 2: return set(d.pointers, from, bytes);
        case 3: return set(d.transposed[0], from, bytes);
        case 4: return set(d.transposed[1], from, bytes);
        case 7: return set(d.epilogue, from, bytes);
        default: return NOT_SUPPORTED;
    }
}
API Status cublasLtMatrixLayoutCreate(void** made, int type, u64 rows, u64 columns, int64_t leading) {
    auto* it = new Layout;
    it->type = uint32_t(type), it->rows = rows, it->columns = columns, it->leading = leading;
    return *made = it, SUCCESS;
}
API Status cublasLtMatrixLayoutDestroy(void* it) { return delete static_cast<Layout*>(it), SUCCESS; }
API Status cublasLtMatrixLayoutSetAttribute(void* it, int which, const void* from, size_t bytes) {
    auto& l = *static_cast<Layout*>(it);
    switch (which) {
        case 0: return set(l.type, from, bytes);
        case 1: return set(l.order, from, bytes);
        case 2: return set(l.rows, from, bytes);
        case 3: return set(l.columns, from, bytes);
        case 4: return set(l.leading, from, bytes);
        case 5: return set(l.batch, from, bytes);
        default: return NOT_SUPPORTED;
    }
}
API Status cublasLtMatmulPreferenceCreate(void** made) { return *made = new Preference, SUCCESS; }
API Status cublasLtMatmulPreferenceDestroy(void* it) { return delete static_cast<Preference*>(it), SUCCESS; }
API Status cublasLtMatmulPreferenceSetAttribute(void* it, int which, const void* from, size_t bytes) {
    return which == 1 ? set(static_cast<Preference*>(it)->workspace, from, bytes) : NOT_SUPPORTED;
}

API Status cublasLtMatmulAlgoGetHeuristic(void*, void* how, void* a, void* b, void* c, void* d, void* preference, int most, Candidate* found, int* count) {
    Product product;
    *count = 0;
    if (Status status = describe(how, a, b, c, d, product)) return status;
    for (const Numbers& numbers : ALGORITHMS) {
        size_t bytes = product.workspace(numbers.id);
        if (*count == most || bytes > static_cast<Preference*>(preference)->workspace || product.check(numbers.id)) continue;
        found[(*count)++] = {{MARK, u64(numbers.id), {}}, bytes, SUCCESS, 1.0f, {}};
    }
    return *count ? SUCCESS : NOT_SUPPORTED;
}
API Status cublasLtMatmulAlgoCheck(void*, void* how, void* a, void* b, void* c, void* d, const Algorithm* algorithm, Candidate* result) {
    Product product;
    if (Status status = describe(how, a, b, c, d, product)) return status;
    const Numbers* numbers = find(*algorithm);
    if (!numbers) return INVALID_VALUE;
    if (numbers->id == 20) return NOT_SUPPORTED;
    if (Status status = product.check(numbers->id)) return status;
    *result = {*algorithm, product.workspace(numbers->id), SUCCESS, 1.0f, {}};
    return SUCCESS;
}
API Status cublasLtMatmulAlgoConfigGetAttribute(const Algorithm* algorithm, int which, void* to, size_t bytes, size_t* written) {
    const Numbers* numbers = find(*algorithm);
    if (!numbers || bytes != 4) return INVALID_VALUE;
    const uint32_t values[] = {uint32_t(numbers->id), numbers->tile, uint32_t(numbers->split), 0, 0, 0, numbers->stages};
    if (which < 0 || which > 6) return NOT_SUPPORTED;
    return memcpy(to, &values[which], 4), *written = 4, SUCCESS;
}

API Status cublasLtMatmul(void*, void* how, const float* alpha, const void* A, void* a, const void* B, void* b, const float* beta, const void* C, void* c, void* D, void* d,
                          const Algorithm* algorithm, void* workspace, size_t bytes, void* stream) {
    Product product;
    if (Status status = describe(how, a, b, c, d, product)) return status;
    const Numbers* numbers = algorithm ? find(*algorithm) : nullptr;
    if (!numbers || !alpha || !beta) return INVALID_VALUE;
    const int id = numbers->id;
    if (id == 20) return NOT_SUPPORTED;
    if (Status status = product.check(id)) return status;
    if (getenv("EMU_LT_REFUSE") && (setting("EMU_LT_REFUSE", 0) == u64(id) || setting("EMU_LT_REFUSE", 0) == 0)) return EXECUTION_FAILED;
    if (product.workspace(id) > bytes) return INVALID_VALUE;
    for (const void* address : {A, B, C, static_cast<const void*>(D), static_cast<const void*>(workspace)})
        if (reinterpret_cast<u64>(address) % 16) return INVALID_VALUE;
    if (!is_device(A, product.a.bytes()) || !is_device(B, product.b.bytes()) || !is_device(D, product.d.bytes())) return INVALID_VALUE;
    if ((*beta != 0 && !is_device(C, product.c.bytes())) || (bytes && !is_device(workspace, bytes))) return INVALID_VALUE;
    auto work = [=, scale = *alpha, keep = *beta] { compute(product, id, scale, A, B, keep, C, D, workspace, bytes); };
    return queue(stream, ("cublasLt algorithm " + std::to_string(id)).c_str(), work) ? EXECUTION_FAILED : SUCCESS;
}
