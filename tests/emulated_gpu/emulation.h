// A CUDA device on the CPU, without kindness: the unmodified kernels compile against this header with g++ -std=c++20.
// One fiber per CUDA thread; a fiber runs until it must wait, then the next one does, in an order that EMU_ORDER sets
// (forward, reverse, or a seed that shuffles). Everything starts poisoned with NaN; a copy that was not waited for is
// NaN; lanes that meet at different lines, threads that left before a barrier, misaligned vectors and deadlocks are
// reported at the kernel's line. A grid launched with PDL begins as early as it may: when one thread of each block of the
// grid before has triggered it. A reduction lands when its grid has ended, and two to one value are reported: their order
// would not be fixed. Owns no streams and no driver API: those are in driver.cpp.
#pragma once
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict

namespace emu {

constexpr unsigned char POISON = 0xFF;  // NaN as f32, bf16 and f16; -1 as an integer
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t STACK_BYTES = 256 << 10;
#else
constexpr size_t STACK_BYTES = 64 << 10;
#endif

struct Dim {
    unsigned x = 1, y = 1, z = 1;
    size_t count() const { return size_t(x) * y * z; }
};

/// The kernel's line that made a call.
struct Site {
    const char* file;
    int line;
    static Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
    bool operator==(const Site& other) const { return line == other.line && (file == other.file || !strcmp(file, other.file)); }
};

// ---- Fibers: a context switch and nothing else -----------------------------------------------------------------
#if defined(__x86_64__)
using Context = void*;
extern "C" void emu_switch(void** save, void* load);
__asm__(R"(
.text
.weak emu_switch
.type emu_switch,@function
emu_switch:
  push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
  ret
)");
inline void switch_to(Context& save, Context& load) { emu_switch(&save, load); }
inline void prepare(Context& context, char* stack, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack + STACK_BYTES - 72);  // as after a call: 8 past a multiple of 16
    top[0] = nullptr;  // the entry's return address: it never returns
    top[-1] = reinterpret_cast<void*>(entry);
    for (int i = 2; i < 8; i++) top[-i] = nullptr;
    context = top - 7;
}
#else
using Context = ucontext_t;
inline void switch_to(Context& save, Context& load) { swapcontext(&save, &load); }
inline void prepare(Context& context, char* stack, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = STACK_BYTES;
    makecontext(&context, entry, 0);
}
#endif

inline char* take_stack(bool give = false, char* stack = nullptr) {
    static std::vector<char*> pool;
    if (give) {
        pool.push_back(stack);
        return nullptr;
    }
    if (pool.empty()) {
        void* fresh = mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        return static_cast<char*>(fresh);
    }
    char* last = pool.back();
    pool.pop_back();
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(last, STACK_BYTES);
#endif
    return last;
}

// ---- Order of threads and blocks --------------------------------------------------------------------------------
struct Order {
    enum Kind { Forward, Reverse, Shuffled } kind = Forward;
    uint64_t state = 0;
    void set(const char* text) {
        std::string name = text ? text : "forward";
        kind = name == "forward" || name == "0" ? Forward : name == "reverse" ? Reverse : Shuffled;
        state = kind == Shuffled ? strtoull(text, nullptr, 10) * 0x9E3779B97F4A7C15ull + 1 : 0;
    }
    unsigned below(unsigned n) {
        state = state * 6364136223846793005ull + 1442695040888963407ull;
        return unsigned((state >> 33) * n >> 31);
    }
    void arrange(std::vector<unsigned>& indices) {
        if (kind == Shuffled)
            for (size_t i = indices.size(); i > 1; i--) std::swap(indices[i - 1], indices[below(unsigned(i))]);
    }
    std::vector<unsigned> first(size_t n) {
        std::vector<unsigned> indices(n);
        for (size_t i = 0; i < n; i++) indices[i] = unsigned(kind == Reverse ? n - 1 - i : i);
        arrange(indices);
        return indices;
    }
};
inline Order& order() {
    static Order it = [] { Order o; o.set(getenv("EMU_ORDER")); return o; }();
    return it;
}

// ---- Threads, warps, blocks -------------------------------------------------------------------------------------
struct Block;
struct Run;
struct Copy {
    unsigned char* to;
    const unsigned char* from;
    unsigned bytes;  // of 16; the rest becomes zero
    Site at;
    unsigned char seen[16];  // at the source when the copy began
};
struct Fiber {
    Context context{};
    char* stack = nullptr;
    Block* block = nullptr;
    Dim tid;
    unsigned lane = 0, warp = 0;
    bool done = false;
    const uint64_t* gate = nullptr;  // waits until *gate differs from seen
    uint64_t seen = 0;
    Site at{"", 0};
    const char* what = "";
    std::vector<Copy> copies;          // issued, not landed
    std::vector<size_t> groups;        // sizes of the committed groups, oldest first
    size_t committed = 0;              // copies that belong to a group
};
struct Lane {
    uint32_t in[12];
    uint32_t out[4];
};
/// One warp collective in progress among the lanes of a mask.
struct Meeting {
    uint32_t mask = 0, arrived = 0;
    uint64_t generation = 0;
    Site at{"", 0};
    const char* what = "";
    Lane lanes[2][32];
};
struct Warp {
    std::deque<Meeting> meetings;
    Meeting& meeting(uint32_t mask) {
        for (Meeting& m : meetings)
            if (m.mask == mask) return m;
        meetings.emplace_back();
        meetings.back().mask = mask;
        return meetings.back();
    }
};
struct Block {
    Run* run = nullptr;
    Dim id;
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    unsigned slow_warp = ~0u;  // in shuffled orders: one that rarely gets its turn
    bool triggered = false;    // its dependents may begin
    size_t arrived = 0, left = 0;
    uint64_t generation = 0;
    Site barrier{"", 0};
    unsigned char* dynamic = nullptr;
    std::map<const void*, unsigned char*> statics;
};
struct Launch {
    std::string name;
    Dim grid, block;
    size_t shared = 0;
    bool pdl = false;
    std::function<void()> body;
};

inline Fiber* current = nullptr;
inline Context scheduler{};
inline bool moved = false;  // some fiber did something in this pass

[[noreturn]] inline void fail(Site at, const std::string& message);

inline void wait_on(const uint64_t* gate, Site at, const char* what) {
    Fiber& me = *current;
    me.gate = gate;
    me.seen = *gate;
    me.at = at;
    me.what = what;
    switch_to(me.context, scheduler);
}
/// Lets others run here, in shuffled orders only.
inline void maybe_yield() {
    if (order().kind == Order::Shuffled && order().below(4) == 0) {
        current->gate = nullptr;
        moved = true;
        switch_to(current->context, scheduler);
    }
}

struct Reduction {
    float* to;
    float value;
    Site at;
};
/// A grid on its way: blocks that are resident, blocks to come.
struct Run {
    Launch launch;
    size_t untriggered;               // blocks that have neither triggered their dependents nor left
    std::function<void()> dependent;  // lets the next grid begin; empty once it has
    std::vector<Reduction> reductions;
    std::vector<unsigned> blocks;
    size_t next = 0;
    std::vector<unsigned> turns;  // of all threads of the resident blocks
    std::vector<std::unique_ptr<Block>> resident;
    uint64_t released = 0;  // 1 once the producer has ended

    explicit Run(Launch what) : launch(std::move(what)), untriggered(launch.grid.count()) {
        blocks = order().first(launch.grid.count());
        fill();
    }
    ~Run() {
        for (auto& block : resident) close(*block);
    }
    bool fill() {
        bool added = false;
        size_t room = order().kind == Order::Shuffled ? 4 : 2;
        while (resident.size() < room && next < blocks.size()) {
            resident.push_back(std::make_unique<Block>());
            open(*resident.back(), blocks[next++]);
            added = true;
        }
        return added;
    }
    void open(Block& block, unsigned index);
    void close(Block& block);
    bool pass();
    /// As far as the blocks that are resident get before the producer has ended.
    void prologue() {
        while (pass()) {
        }
    }
    void finish() {
        released = 1;
        if (resident.empty()) fill();
        trigger();
        prologue();
        if (!resident.empty()) deadlock();
        reduce();
    }
    void trigger() {
        if (untriggered || !dependent) return;
        std::exchange(dependent, nullptr)();
        moved = true;
    }
    void reduce();
    [[noreturn]] void deadlock();
};

inline void enter() {
    Fiber& me = *current;
    me.block->run->launch.body();
    me.done = true;
    me.block->left++;
    moved = true;
    switch_to(me.context, scheduler);
    __builtin_unreachable();
}

inline void Run::open(Block& block, unsigned index) {
    block.run = this;
    const Dim& grid = launch.grid;
    block.id = {index % grid.x, index / grid.x % grid.y, index / (grid.x * grid.y)};
    size_t threads = launch.block.count();
    block.fibers.resize(threads);
    block.warps.resize((threads + 31) / 32);
    if (order().kind == Order::Shuffled && order().below(2)) block.slow_warp = order().below(unsigned(block.warps.size()));
    if (launch.shared) {
        block.dynamic = static_cast<unsigned char*>(aligned_alloc(128, (launch.shared + 127) / 128 * 128));
        memset(block.dynamic, POISON, (launch.shared + 127) / 128 * 128);
#if defined(__SANITIZE_ADDRESS__)
        size_t rest = (launch.shared + 127) / 128 * 128 - launch.shared;
        if (rest) __asan_poison_memory_region(block.dynamic + launch.shared, rest);
#endif
    }
    for (size_t i = 0; i < threads; i++) {
        Fiber& fiber = block.fibers[i];
        const Dim& d = launch.block;
        fiber.tid = {unsigned(i % d.x), unsigned(i / d.x % d.y), unsigned(i / (size_t(d.x) * d.y))};
        fiber.lane = i % 32;
        fiber.warp = unsigned(i / 32);
        fiber.block = &block;
        fiber.stack = take_stack();
        prepare(fiber.context, fiber.stack, enter);
    }
}

inline void Run::close(Block& block) {
    for (Fiber& fiber : block.fibers) take_stack(true, fiber.stack);
#if defined(__SANITIZE_ADDRESS__)
    if (block.dynamic) __asan_unpoison_memory_region(block.dynamic, (launch.shared + 127) / 128 * 128);
#endif
    free(block.dynamic);
    for (auto& [tag, memory] : block.statics) free(memory);
}

/// Runs every fiber that can go on, once each. False when none could.
inline bool Run::pass() {
    moved = false;
    const size_t threads = launch.block.count();
    if (turns.size() != resident.size() * threads) turns = order().first(resident.size() * threads);
    else order().arrange(turns);
    std::vector<unsigned> stalled(resident.size(), ~0u);
    for (size_t b = 0; b < resident.size(); b++) {
        if (resident[b]->slow_warp != ~0u && order().below(8)) stalled[b] = resident[b]->slow_warp;
    }
    bool held_back = false, ran = false;
    auto every_turn = [&] {
        for (unsigned turn : turns) {
            Fiber& fiber = resident[turn / threads]->fibers[turn % threads];
            if (fiber.done || (fiber.gate && *fiber.gate == fiber.seen)) continue;
            if (fiber.warp == stalled[turn / threads]) {
                held_back = true;
                continue;
            }
            moved = ran = true;
            fiber.gate = nullptr;
            current = &fiber;
            switch_to(scheduler, fiber.context);
            trigger();
        }
    };
    every_turn();
    if (held_back && !ran) {  // all others wait for the slow warps
        stalled.assign(stalled.size(), ~0u);
        every_turn();
    }
    moved |= held_back;
    for (size_t b = 0; b < resident.size();) {
        if (resident[b]->left == resident[b]->fibers.size()) {
            untriggered -= !resident[b]->triggered;
            close(*resident[b]);
            resident.erase(resident.begin() + long(b));
        } else {
            b++;
        }
    }
    trigger();
    if (released && fill()) moved = true;  // before its producer has ended only the first blocks are resident
    return moved;
}

inline void print_waits(const Block& block) {
    std::map<std::string, unsigned> groups;
    for (const Fiber& fiber : block.fibers) {
        if (fiber.done) {
            groups["have left"]++;
            continue;
        }
        groups[std::string("wait at ") + fiber.at.file + ":" + std::to_string(fiber.at.line) + " (" + fiber.what + ")"]++;
    }
    for (const auto& [text, count] : groups) fprintf(stderr, "  %u threads %s\n", count, text.c_str());
}

inline void Run::deadlock() {
    const Block& block = *resident[0];
    fprintf(stderr, "emulated GPU: deadlock in %s, block (%u, %u, %u)\n", launch.name.c_str(), block.id.x, block.id.y, block.id.z);
    print_waits(block);
    fflush(stderr);
    abort();
}

[[noreturn]] inline void fail(Site at, const std::string& message) {
    const Fiber& me = *current;
    const Block& block = *me.block;
    fprintf(stderr, "emulated GPU: %s:%d: %s, in %s, block (%u, %u, %u), thread %u\n", at.file, at.line, message.c_str(),
            block.run->launch.name.c_str(), block.id.x, block.id.y, block.id.z, me.warp * 32 + me.lane);
    fflush(stderr);
    abort();
}

inline void Run::reduce() {
    auto before = [](const Reduction& a, const Reduction& b) { return a.to < b.to; };
    std::sort(reductions.begin(), reductions.end(), before);
    for (size_t i = 0; i < reductions.size(); i++) {
        if (i && reductions[i].to == reductions[i - 1].to) {
            fprintf(stderr, "emulated GPU: %s:%d: two reductions to one value, in %s\n", reductions[i].at.file, reductions[i].at.line, launch.name.c_str());
            fflush(stderr);
            abort();
        }
        *reductions[i].to += reductions[i].value;
    }
    reductions.clear();
}

/// Runs grids one after another as a stream does; the first part of one launched with PDL runs as early as it may.
inline void run(std::vector<Launch> launches) {
    std::unique_ptr<Run> now, next;
    for (size_t i = 0; i < launches.size(); i++) {
        if (!now) now = std::make_unique<Run>(launches[i]);
        if (i + 1 < launches.size() && launches[i + 1].pdl) {
            now->dependent = [&launches, &next, i] {
                next = std::make_unique<Run>(launches[i + 1]);
                next->prologue();
            };
        }
        now->finish();
        now = std::move(next);
    }
}

// ---- What kernels call ------------------------------------------------------------------------------------------
inline void barrier(Site at) {
    Block& block = *current->block;
    if (block.left) fail(at, "__syncthreads after threads of the block have left");
    if (block.arrived && !(block.barrier == at)) {
        fail(at, "__syncthreads meets another one at " + std::string(block.barrier.file) + ":" + std::to_string(block.barrier.line));
    }
    block.barrier = at;
    moved = true;
    if (++block.arrived == block.fibers.size()) {
        block.arrived = 0;
        block.generation++;
        return;
    }
    wait_on(&block.generation, at, "__syncthreads");
}

/// Each lane of the mask brings `in`; the last one to come runs `last` over all lanes.
template <class Last>
Lane* meet(uint32_t mask, const void* in, size_t bytes, Site at, const char* what, Last last) {
    Fiber& me = *current;
    if (!(mask >> me.lane & 1)) fail(at, std::string(what) + " by a lane outside its mask");
    Meeting& m = me.block->warps[me.warp].meeting(mask);
    if (m.arrived && (!(m.at == at) || m.what != what)) {
        fail(at, std::string(what) + " meets " + m.what + " at " + m.at.file + ":" + std::to_string(m.at.line));
    }
    m.at = at;
    m.what = what;
    Lane* lanes = m.lanes[m.generation & 1];
    memcpy(lanes[me.lane].in, in, bytes);
    m.arrived |= 1u << me.lane;
    moved = true;
    if (m.arrived == mask) {
        last(lanes);
        m.arrived = 0;
        m.generation++;
    } else {
        wait_on(&m.generation, at, what);
    }
    return lanes;
}

template <class T>
T exchange(uint32_t mask, T value, unsigned from, Site at, const char* what) {
    Lane* lanes = meet(mask, &value, sizeof(T), at, what, [](Lane*) {});
    if (!(mask >> (from & 31) & 1)) fail(at, std::string(what) + " from a lane outside the mask");
    T result;
    memcpy(&result, lanes[from & 31].in, sizeof(T));
    return result;
}

inline unsigned char* shared_array(const void* tag, size_t bytes) {
    unsigned char*& memory = current->block->statics[tag];
    if (!memory) {
        memory = static_cast<unsigned char*>(aligned_alloc(16, (bytes + 15) / 16 * 16));
        memset(memory, POISON, (bytes + 15) / 16 * 16);
    }
    return memory;
}

inline void need_aligned(const void* pointer, size_t bytes, Site at, const char* what) {
    if (reinterpret_cast<uintptr_t>(pointer) % bytes) fail(at, std::string(what) + " of a misaligned address");
}

/// The destination is poison until the group is waited for. The device reads the source somewhere in between: it must not
/// change.
inline void copy_async(void* to, const void* from, unsigned bytes, Site at) {
    need_aligned(to, 16, at, "cp.async");
    need_aligned(from, 16, at, "cp.async");
    memset(to, POISON, 16);
    Copy copy{static_cast<unsigned char*>(to), static_cast<const unsigned char*>(from), bytes, at, {}};
    memcpy(copy.seen, from, bytes);
    current->copies.push_back(copy);
    maybe_yield();
}
inline void copy_commit() {
    Fiber& me = *current;
    me.groups.push_back(me.copies.size() - me.committed);
    me.committed = me.copies.size();
}
inline void copy_wait(unsigned pending) {
    Fiber& me = *current;
    size_t landed = 0;
    const size_t done = me.groups.size() - std::min<size_t>(pending, me.groups.size());
    for (size_t i = 0; i < done; i++) landed += me.groups[i];
    me.groups.erase(me.groups.begin(), me.groups.begin() + long(done));
    for (size_t i = 0; i < landed; i++) {
        const Copy& copy = me.copies[i];
        if (memcmp(copy.from, copy.seen, copy.bytes)) fail(copy.at, "the source of this copy changed while it was on its way");
        memcpy(copy.to, copy.seen, copy.bytes);
        memset(copy.to + copy.bytes, 0, 16 - copy.bytes);
    }
    me.copies.erase(me.copies.begin(), me.copies.begin() + long(landed));
    me.committed -= landed;
}

/// The first thread of a block to come here counts for the block; others of it may be anywhere.
inline void launch_dependents() {
    Block& block = *current->block;
    if (std::exchange(block.triggered, true) || --block.run->untriggered) return;
    current->gate = nullptr;
    moved = true;
    switch_to(current->context, scheduler);
}

inline void reduce(float* to, float value, Site at) {
    need_aligned(to, 4, at, "reduction");
    current->block->run->reductions.push_back({to, value, at});
    maybe_yield();
}

inline void wait_for_producer(Site at) {
    Run& run = *current->block->run;
    if (!run.released) wait_on(&run.released, at, "griddepcontrol.wait");
}

// ---- Narrow floats ----------------------------------------------------------------------------------------------
inline uint32_t bits_of(float value) { uint32_t bits; memcpy(&bits, &value, 4); return bits; }
inline float float_of(uint32_t bits) { float value; memcpy(&value, &bits, 4); return value; }
inline float bf16_to_f32(uint16_t bits) { return float_of(uint32_t(bits) << 16); }
inline uint16_t f32_to_bf16(float value) {
    uint32_t bits = bits_of(value);
    if (value != value) return 0x7FFF;
    return uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
inline float f16_to_f32(uint16_t bits) {
    const uint32_t sign = uint32_t(bits & 0x8000) << 16, rest = bits & 0x7FFF;
    if (rest >= 0x7C00) return float_of(sign | 0x7F800000 | (rest & 1023) << 13);  // infinity, NaN
    if (rest >= 0x0400) return float_of(sign | ((rest << 13) + (112u << 23)));
    return float_of(sign | bits_of(float(rest) * 5.9604644775390625e-08f));  // subnormal: units of 2^-24
}
inline uint16_t f32_to_f16(float value) {
    uint16_t sign = uint16_t(bits_of(value) >> 16 & 0x8000);
    if (value != value) return 0x7FFF;
    float magnitude = std::fabs(value);
    if (magnitude >= 65520.0f) return sign | 0x7C00;
    if (magnitude < 6.103515625e-05f) return sign | uint16_t(std::nearbyint(magnitude * 16777216.0f));
    uint32_t bits = bits_of(magnitude);
    bits += 0xFFF + (bits >> 13 & 1);
    return sign | uint16_t((bits >> 13) - (112 << 10));
}

/// d[16, 8] += a[16, 16] b[16, 8] with the fragment layout of mma.sync.m16n8k16 (PTX ISA 9.7.14).
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], float (*widen)(uint16_t), Site at) {
    uint32_t in[10];
    memcpy(in, a, 16);
    memcpy(in + 4, b, 8);
    memcpy(in + 6, d, 16);
    Lane* lanes = meet(~0u, in, sizeof in, at, "mma.sync", [widen](Lane* lanes) {
        typedef float Row __attribute__((vector_size(32)));
        float left[16][16];
        Row right[16], sum[16];
        // A call by name can be inlined.
        auto wide = [widen](uint16_t bits) { return widen == f16_to_f32 ? f16_to_f32(bits) : bf16_to_f32(bits); };
        for (int lane = 0; lane < 32; lane++) {
            int g = lane / 4, t = lane % 4;
            const uint32_t* r = lanes[lane].in;
            for (int half = 0; half < 2; half++) {
                auto part = [half](uint32_t word) { return uint16_t(half ? word >> 16 : word); };
                left[g][2 * t + half] = wide(part(r[0]));
                left[g + 8][2 * t + half] = wide(part(r[1]));
                left[g][2 * t + 8 + half] = wide(part(r[2]));
                left[g + 8][2 * t + 8 + half] = wide(part(r[3]));
                right[2 * t + half][g] = wide(part(r[4]));
                right[2 * t + 8 + half][g] = wide(part(r[5]));
                sum[g][2 * t + half] = float_of(r[6 + half]);
                sum[g + 8][2 * t + half] = float_of(r[8 + half]);
            }
        }
        for (int k = 0; k < 16; k++)
            for (int row = 0; row < 16; row++) sum[row] += left[row][k] * right[k];
        for (int lane = 0; lane < 32; lane++)
            for (int i = 0; i < 4; i++)
                lanes[lane].out[i] = bits_of(sum[lane / 4 + (i & 2) * 4][lane % 4 * 2 + (i & 1)]);
    });
    memcpy(d, lanes[current->lane].out, 16);
}

/// Four 8x8 matrices of 16-bit values; lane 8 i + r brings the address of row r of matrix i.
inline void ldmatrix_x4(uint32_t (&out)[4], const void* row, bool transposed, Site at) {
    need_aligned(row, 16, at, "ldmatrix");
    Lane* lanes = meet(~0u, &row, sizeof row, at, "ldmatrix", [](Lane*) {});
    int g = int(current->lane) / 4, t = int(current->lane) % 4;
    for (int i = 0; i < 4; i++) {
        uint16_t pair[2];
        for (int half = 0; half < 2; half++) {
            int r = transposed ? 2 * t + half : g, c = transposed ? g : 2 * t + half;
            const uint16_t* address;
            memcpy(&address, lanes[8 * i + r].in, sizeof address);
            pair[half] = address[c];
        }
        out[i] = uint32_t(pair[1]) << 16 | pair[0];
    }
}

inline void atomic_point() { maybe_yield(); }

}  // namespace emu

#define threadIdx (emu::current->tid)
#define blockIdx (emu::current->block->id)
#define blockDim (emu::current->block->run->launch.block)
#define gridDim (emu::current->block->run->launch.grid)

inline void __syncthreads(emu::Site at = emu::Site::here()) { emu::barrier(at); }
inline void __syncwarp(unsigned mask = ~0u, emu::Site at = emu::Site::here()) {
    emu::meet(mask, &mask, 4, at, "__syncwarp", [](emu::Lane*) {});
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int = 32, emu::Site at = emu::Site::here()) {
    return emu::exchange(mask, value, emu::current->lane ^ unsigned(bits), at, "__shfl_xor_sync");
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int = 32, emu::Site at = emu::Site::here()) {
    return emu::exchange(mask, value, unsigned(lane), at, "__shfl_sync");
}
inline unsigned __ballot_sync(unsigned mask, int predicate, emu::Site at = emu::Site::here()) {
    uint32_t mine = predicate != 0;
    emu::Lane* lanes = emu::meet(mask, &mine, 4, at, "__ballot_sync", [](emu::Lane*) {});
    unsigned votes = 0;
    for (unsigned lane = 0; lane < 32; lane++)
        if (mask >> lane & 1) votes |= lanes[lane].in[0] << lane;
    return votes;
}
inline int __any_sync(unsigned mask, int predicate, emu::Site at = emu::Site::here()) {
    return __ballot_sync(mask, predicate, at) != 0;
}
template <class T>
T atomicAdd(T* address, T value) {
    emu::atomic_point();
    T old = *address;
    *address = old + value;
    emu::atomic_point();
    return old;
}
inline void __threadfence() { emu::atomic_point(); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fmaf(a, b, c); }
inline double __dadd_rn(double a, double b) { volatile double sum = a + b; return sum; }
inline double __dsub_rn(double a, double b) { volatile double difference = a - b; return difference; }
inline unsigned __float_as_uint(float value) { return emu::bits_of(value); }
inline float __uint_as_float(unsigned bits) { return emu::float_of(bits); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline void sincospif(float x, float* sine, float* cosine) {
    *sine = float(std::sin(3.14159265358979323846 * x));
    *cosine = float(std::cos(3.14159265358979323846 * x));
}
using std::max;
using std::min;
