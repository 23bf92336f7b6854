// What the self-tests share: seeded values, launches as a stream would do them, comparisons that name the case.
// Every kernel is launched with PDL after a producer that writes its inputs: until then they hold poison.
#pragma once
#include <cstdarg>
#include <random>

#include "common.cuh"

namespace test {

struct Worst {
    double share = 0;  // of the tolerance
    double error = 0;
    long values = 0;
};
inline std::map<std::string, Worst>& worst() {
    static std::map<std::string, Worst> it;
    return it;
}
inline std::string text(const char* format, ...) {
    char buffer[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(buffer, sizeof buffer, format, arguments);
    va_end(arguments);
    return buffer;
}
inline std::string& current_case() {
    static std::string it;
    return it;
}
[[noreturn]] inline void wrong(const std::string& message) {
    printf("FAILED %s: %s\n", current_case().c_str(), message.c_str());
    fflush(stdout);
    _Exit(1);
}

inline std::mt19937& random_bits() {
    static std::mt19937 it(20260101);
    return it;
}
inline float normal(float scale = 1.0f) { return std::normal_distribution<float>(0.0f, scale)(random_bits()); }
inline int below(int n) { return int(random_bits()() % unsigned(n)); }

template <class T> inline T narrow(float x);
template <> inline float narrow<float>(float x) { return x; }
template <> inline Bf16 narrow<Bf16>(float x) { return Bf16{emu::f32_to_bf16(x)}; }
template <> inline F16 narrow<F16>(float x) { return F16{emu::f32_to_f16(x)}; }
inline double wide(float x) { return x; }
inline double wide(Bf16 x) { return emu::bf16_to_f32(x.bits); }
inline double wide(F16 x) { return emu::f16_to_f32(x.bits); }
/// Half a unit in the last place, relative.
template <class T> constexpr double HALF_ULP = 0;
template <> inline constexpr double HALF_ULP<Bf16> = 1.0 / 256;
template <> inline constexpr double HALF_ULP<F16> = 1.0 / 2048;
template <class T> constexpr const char* NAME = "f32";
template <> inline constexpr const char* NAME<Bf16> = "bf16";
template <> inline constexpr const char* NAME<F16> = "f16";

/// Device memory: exactly its size (the sanitizer sees the end), poisoned.
template <class T>
struct Buffer {
    std::unique_ptr<T[]> data;
    size_t size;
    explicit Buffer(size_t n) : data(new T[n]), size(n) { memset(static_cast<void*>(data.get()), emu::POISON, n * sizeof(T)); }
    T* get() { return data.get(); }
    T& operator[](size_t i) { return data[i]; }
    Buffer& random(float scale = 1.0f, float center = 0.0f) {
        for (size_t i = 0; i < size; i++) data[i] = narrow<T>(center + normal(scale));
        return *this;
    }
    Buffer& fill(T value) {
        std::fill(data.get(), data.get() + size, value);
        return *this;
    }
    Buffer& set(const std::vector<T>& values) {
        std::copy(values.begin(), values.end(), data.get());
        return *this;
    }
};
inline Buffer<int> ints(const std::vector<int>& values) { return std::move(Buffer<int>(values.size()).set(values)); }

/// An input that the grid before this one writes.
struct Produced {
    void* address;
    size_t bytes;
    template <class T>
    Produced(Buffer<T>& buffer) : address(buffer.get()), bytes(buffer.size * sizeof(T)) {}
};

inline void launch(const char* name, emu::Dim grid, unsigned threads, size_t shared, std::vector<Produced> inputs, std::function<void()> body) {
    std::vector<std::string> contents;
    for (Produced& input : inputs) {
        contents.emplace_back(static_cast<char*>(input.address), input.bytes);
        memset(input.address, emu::POISON, input.bytes);
    }
    emu::Launch producer{"producer", {1}, {1}, 0, false, [&] {
        pdl_launch();
        for (size_t i = 0; i < inputs.size(); i++) memcpy(inputs[i].address, contents[i].data(), inputs[i].bytes);
    }};
    emu::run({producer, emu::Launch{name, grid, {threads}, shared, true, std::move(body)}});
}

/// |got - want| <= tolerance, and not NaN.
inline void close(const std::string& kernel, size_t index, double got, double want, double tolerance) {
    double error = std::fabs(got - want);
    Worst& w = worst()[kernel];
    w.values++;
    if (!(error <= tolerance)) wrong(text("value %zu is %g, expected %g within %g", index, got, want, tolerance));
    w.error = std::max(w.error, error);
    if (tolerance > 0) w.share = std::max(w.share, error / tolerance);
}
inline void same(const std::string& kernel, size_t index, long long got, long long want) {
    worst()[kernel].values++;
    if (got != want) wrong(text("value %zu is %lld, expected %lld", index, got, want));
}
inline void tickets_are_zero(Buffer<int>& tickets) {
    for (size_t i = 0; i < tickets.size; i++)
        if (tickets[i] != 0) wrong(text("ticket %zu is %d after the kernel, expected 0", i, tickets[i]));
}

/// Runs the cases in every order named on the command line, or four.
inline int main_of(int argc, char** argv, void (*cases)()) {
    std::vector<std::string> orders(argv + 1, argv + argc);
    if (orders.empty()) orders = {"forward", "reverse", "7", "12"};
    for (const std::string& name : orders) {
        emu::order().set(name.c_str());
        random_bits().seed(20260101);
        cases();
    }
    printf("%-28s %10s %12s %10s\n", "kernel", "values", "worst error", "of limit");
    for (auto& [kernel, w] : worst()) printf("%-28s %10ld %12.3g %9.0f%%\n", kernel.c_str(), w.values, w.error, 100 * w.share);
    printf("passed in %zu thread orders\n", orders.size());
    return 0;
}
}  // namespace test
