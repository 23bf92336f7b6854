// All inline PTX, one wrapper an instruction, and under CUDA_EMU the CPU model of each.
#pragma once

#ifdef CUDA_EMU
#define HERE emu::Site at = emu::Site::here()

/// Waits until the grids before this one have ended and their writes are visible.
inline void pdl_wait(HERE) { emu::wait_for_producer(at); }
/// The grid after this one may start as soon as one thread of each block has come here (it still waits before it reads
/// what this one writes).
inline void pdl_launch() { emu::launch_dependents(); }

inline float widen_f16(u16 bits) { return emu::f16_to_f32(bits); }
template <class T> u32 pack(float low, float high);
template <> inline u32 pack<Bf16>(float low, float high) { return u32(emu::f32_to_bf16(high)) << 16 | emu::f32_to_bf16(low); }
template <> inline u32 pack<F16>(float low, float high) { return u32(emu::f32_to_f16(high)) << 16 | emu::f32_to_f16(low); }
inline float exp2_approx(float x) { return std::exp2(x); }

inline Vec16 load128(const void* p, HERE) { emu::need_aligned(p, 16, at, "128-bit load"); return *static_cast<const Vec16*>(p); }
inline Vec16 load128_once(const void* p, HERE) { return load128(p, at); }
inline Vec16 load128_l2(const void* p, HERE) { return load128(p, at); }
inline void store128(void* p, Vec16 v, HERE) { emu::need_aligned(p, 16, at, "128-bit store"); *static_cast<Vec16*>(p) = v; }
inline Vec16 shared_load128(const void* p, HERE) { return load128(p, at); }
inline float load_l2(const float* p) { return *p; }
inline void add_to(float* p, float x, HERE) { emu::reduce(p, x, at); }

/// An address in shared memory, worked out once.
typedef unsigned char* Shared;
inline Shared shared_place(void* p) { return static_cast<Shared>(p); }
inline void copy_async16(void* shared, const void* global, HERE) { emu::copy_async(shared, global, 16, at); }
inline void copy_async16_or_zero(void* shared, const void* global, bool valid, HERE) { emu::copy_async(shared, global, valid ? 16 : 0, at); }
inline void copy_commit() { emu::copy_commit(); }
template <int PENDING> void copy_wait() { emu::copy_wait(PENDING); }

inline void ldmatrix_x4(u32 (&r)[4], const void* row, HERE) { emu::ldmatrix_x4(r, row, false, at); }
inline void ldmatrix_x4_transposed(u32 (&r)[4], const void* row, HERE) { emu::ldmatrix_x4(r, row, true, at); }
template <class T> void mma16816(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], HERE);
template <> inline void mma16816<Bf16>(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], emu::Site at) { emu::mma_m16n8k16(d, a, b, emu::bf16_to_f32, at); }
template <> inline void mma16816<F16>(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], emu::Site at) { emu::mma_m16n8k16(d, a, b, emu::f16_to_f32, at); }

#else  // the device

DEVICE void pdl_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
DEVICE void pdl_launch() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

DEVICE float widen_f16(u16 bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}
/// Two f32 rounded to nearest even, `low` in the low half.
template <class T> DEVICE u32 pack(float low, float high);
template <> DEVICE u32 pack<Bf16>(float low, float high) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
template <> DEVICE u32 pack<F16>(float low, float high) {
    u32 pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
/// 2^x to about 2 units in the last place; 0 at minus infinity.
DEVICE float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

DEVICE Vec16 load128(const void* p) {
    Vec16 v;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3]) : "l"(p) : "memory");
    return v;
}
/// Read once by this grid and written by none in it: does not displace what L1 holds.
DEVICE Vec16 load128_once(const void* p) {
    Vec16 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3]) : "l"(p));
    return v;
}
/// Past L1: what another block of this grid wrote.
DEVICE Vec16 load128_l2(const void* p) {
    Vec16 v;
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3]) : "l"(p) : "memory");
    return v;
}
DEVICE float load_l2(const float* p) {
    float x;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(x) : "l"(p) : "memory");
    return x;
}
/// Adds x without reading back. One grid adds to a value at most once, so that the order of sums is fixed.
DEVICE void add_to(float* p, float x) { asm volatile("red.global.add.f32 [%0], %1;" ::"l"(p), "f"(x) : "memory"); }
DEVICE void store128(void* p, Vec16 v) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.word[0]), "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3]) : "memory");
}

DEVICE u32 shared_address(const void* p) { return u32(__cvta_generic_to_shared(p)); }
/// An address in shared memory, worked out once: the compiler would derive it from the block's place in its cluster anew
/// wherever it is used.
typedef u32 Shared;
DEVICE Shared shared_place(void* p) {
    Shared place;
    asm volatile("mov.u32 %0, %1;" : "=r"(place) : "r"(shared_address(p)));
    return place;
}
DEVICE Vec16 shared_load128(const void* p) {
    Vec16 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3]) : "r"(shared_address(p)) : "memory");
    return v;
}
DEVICE void copy_async16(void* shared, const void* global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}
/// Sixteen bytes, or zeros without reading.
DEVICE void copy_async16_or_zero(Shared shared, const void* global, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(valid ? 16 : 0) : "memory");
}
DEVICE void copy_async16_or_zero(void* shared, const void* global, bool valid) { copy_async16_or_zero(shared_address(shared), global, valid); }
DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/// All but the newest PENDING groups of this thread have landed; other threads see them after a barrier.
template <int PENDING> DEVICE void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }

DEVICE void ldmatrix_x4(u32 (&r)[4], Shared row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row) : "memory");
}
DEVICE void ldmatrix_x4(u32 (&r)[4], const void* row) { ldmatrix_x4(r, shared_address(row)); }
DEVICE void ldmatrix_x4_transposed(u32 (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
/// d[16, 8] += a[16, 16] b[16, 8] over f32 sums.
template <class T> DEVICE void mma16816(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]);
template <> DEVICE void mma16816<Bf16>(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <> DEVICE void mma16816<F16>(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif
