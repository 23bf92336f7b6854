// Causal attention over a paged KV cache, T [pages, kv_heads, 16, HD], with online softmax, sums and weights' sums in f32.
//   q, out T [n, heads HD] · context_len i32 [s] · pages i32 (all sequences' pages one after another) · page_start [s + 1]
// attention_decode_T_HD: one query token a sequence (row s of q). All heads / kv_heads (1..16) query heads of a group
//   share one read of K and V: they are the rows of the mma.
//   Grid (s, kv_heads, splits), block 128 (64 at HD 256), dynamic shared memory 65536 (49152 at HD 96, 32768 at 16, 32).
//   Split i takes pages [i P / splits, (i + 1) P / splits) of the sequence's P; a split may be empty. splits > 1:
//   partial f32 [s, kv_heads, splits, G (HD + 2)] with G = heads / kv_heads: o [G, HD] unscaled, m [G] (log2), l [G];
//   tickets i32 [s, kv_heads], zero before and after; the block that comes last combines, in the splits' order.
//   splits == 1 touches neither. A context of 0 gives zeros. Bytes: 4 HD kv_heads context; flops 4 HD heads context.
// attention_prefill_T_HD: ragged; sequence s has query rows query_start[s] .. query_start[s + 1], the last ones of its
//   context. Tile t takes the rows query_start[tile_seq[t]] + tile_first[t] and up to 63 more (tile_first counts within
//   the sequence: 0, 64, ..). Grid (tiles, heads), block 128, dynamic shared memory 65536 (49152 at HD 96, 32768 at 64
//   and 256, 16384 at 16 and 32).
//   Flops 4 HD heads sum over rows of the visible positions.
//
// The order of dimensions within q . k is free: sixteen consecutive bytes of a row of q or of k are one thread's
// fragments of two mma. V goes through ldmatrix with transposition.
#include "common.cuh"

namespace {
constexpr float LOG2_E = 1.4426950408889634f;

/// 16-byte chunks of a row in shared memory; at HD 16, the upper half is zeros.
template <int HD>
constexpr int CHUNKS = HD < 32 ? 4 : HD / 8;

/// Places of a row's 16-byte chunks in shared memory, such that a quarter warp meets all banks once: keys are read as
/// four chunks of two rows, values as one chunk of eight rows.
template <int HD>
DEVICE int key_place(int row, int chunk) {
    return (row * CHUNKS<HD> + (CHUNKS<HD> % 8 ? chunk : chunk ^ ((row & 1) << 2))) * 16;
}
template <int HD>
DEVICE int value_place(int row, int chunk) {
    return (row * CHUNKS<HD> + (CHUNKS<HD> % 8 ? chunk ^ ((row >> 1) & 3) : chunk ^ (row & 7))) * 16;
}

/// Query fragments of 16 rows: lane (g, t) holds rows g and g + 8, read where the pointers say, or zeros.
template <int HD>
struct Query {
    const unsigned char* row[2];  // null: zeros

    DEVICE void fragment(int block, u32 (&first)[4], u32 (&second)[4]) const {
        Vec16 v[2] = {};
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int chunk = block * 4 + (threadIdx.x & 3);
            if (row[i] && chunk < HD / 8) v[i] = load128(row[i] + chunk * 16);
        }
        first[0] = v[0].word[0], first[1] = v[1].word[0], first[2] = v[0].word[1], first[3] = v[1].word[1];
        second[0] = v[0].word[2], second[1] = v[1].word[2], second[2] = v[0].word[3], second[3] = v[1].word[3];
    }
};

/// One warp's 16 query rows: running maximum m (log2 units) and sum l of rows g and g + 8, and their outputs.
template <class T, int HD>
struct Online {
    /// With more, the fragments are read again from L1 for each tile of keys.
    static constexpr bool KEEP_QUERY = HD <= 128;
    float m[2] = {MINUS_INFINITY, MINUS_INFINITY}, l[2] = {};
    float o[HD / 8][4] = {};
    Query<HD> query;
    u32 kept[KEEP_QUERY ? CHUNKS<HD> / 4 : 1][2][4];

    DEVICE explicit Online(Query<HD> q) : query(q) {
        if constexpr (KEEP_QUERY) {
#pragma unroll
            for (int block = 0; block < CHUNKS<HD> / 4; block++) query.fragment(block, kept[block][0], kept[block][1]);
        }
    }

    /// s[j] = q . keys 8 j .. 8 j + 7, for 8 TILES keys in shared memory.
    template <int TILES>
    DEVICE void scores(const unsigned char* keys, float (&s)[TILES][4]) const {
        const int g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
#pragma unroll
        for (int j = 0; j < TILES; j++) s[j][0] = s[j][1] = s[j][2] = s[j][3] = 0.0f;
#pragma unroll
        for (int block = 0; block < CHUNKS<HD> / 4; block++) {
            u32 fresh[2][4];
            if constexpr (!KEEP_QUERY) query.fragment(block, fresh[0], fresh[1]);
            const auto& q = pick(fresh, block);
#pragma unroll
            for (int j = 0; j < TILES; j++) {
                const Vec16 k = shared_load128(keys + key_place<HD>(j * 8 + g, block * 4 + t));
                mma16816<T>(s[j], q[0], {k.word[0], k.word[1]});
                mma16816<T>(s[j], q[1], {k.word[2], k.word[3]});
            }
        }
    }
    DEVICE const u32 (&pick(const u32 (&fresh)[2][4], int block) const)[2][4] {
        if constexpr (KEEP_QUERY) return kept[block];
        else return fresh;
    }

    /// Takes in 8 TILES keys' scores (in log2 units, minus infinity where masked) and their values.
    template <int TILES>
    DEVICE void accumulate(float (&s)[TILES][4], const unsigned char* values) {
        const int lane = threadIdx.x & 31;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float largest = m[r];
#pragma unroll
            for (int j = 0; j < TILES; j++) largest = fmaxf(largest, fmaxf(s[j][2 * r], s[j][2 * r + 1]));
            largest = fmaxf(largest, __shfl_xor_sync(WHOLE_WARP, largest, 1));
            largest = fmaxf(largest, __shfl_xor_sync(WHOLE_WARP, largest, 2));
            // While all keys so far are masked, the difference of two infinities must not be formed.
            const float base = largest == MINUS_INFINITY ? 0.0f : largest;
            const float shrink = exp2_approx(m[r] - base);
            m[r] = largest;
            float sum = 0.0f;
#pragma unroll
            for (int j = 0; j < TILES; j++) {
                s[j][2 * r] = exp2_approx(s[j][2 * r] - base);
                s[j][2 * r + 1] = exp2_approx(s[j][2 * r + 1] - base);
                sum += s[j][2 * r] + s[j][2 * r + 1];
            }
            l[r] = l[r] * shrink + sum;
#pragma unroll
            for (int d = 0; d < HD / 8; d++) {
                o[d][2 * r] *= shrink;
                o[d][2 * r + 1] *= shrink;
            }
        }
#pragma unroll
        for (int j = 0; j < TILES; j += 2) {
            const u32 p[4] = {pack<T>(s[j][0], s[j][1]), pack<T>(s[j][2], s[j][3]), pack<T>(s[j + 1][0], s[j + 1][1]), pack<T>(s[j + 1][2], s[j + 1][3])};
#pragma unroll
            for (int d = 0; d < HD / 8; d += 2) {
                u32 v[4];
                ldmatrix_x4_transposed(v, values + value_place<HD>(j * 8 + (lane & 15), d + (lane >> 4)));
                mma16816<T>(o[d], p, {v[0], v[1]});
                mma16816<T>(o[d + 1], p, {v[2], v[3]});
            }
        }
    }

    /// l was summed over this lane's keys only.
    DEVICE void finish_sums() {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            l[r] += __shfl_xor_sync(WHOLE_WARP, l[r], 1);
            l[r] += __shfl_xor_sync(WHOLE_WARP, l[r], 2);
        }
    }
};

/// Starts copies of KEYS tokens from `first` on to shared memory by 128 threads; tokens from `end` on become zero.
template <class T, int HD, int KEYS>
DEVICE void load_tokens(unsigned char* keys, unsigned char* values, const T* k_cache, const T* v_cache, const int* pages, int first, int end, int kv_head, int kv_heads) {
    for (int i = threadIdx.x; i < KEYS * CHUNKS<HD>; i += 128) {
        const int token = i / CHUNKS<HD>, chunk = i % CHUNKS<HD>, position = first + token;
        const bool valid = position < end && chunk < HD / 8;
        const u64 from = valid ? cache_offset(pages[position / PAGE_SIZE], position % PAGE_SIZE, kv_head, kv_heads, HD) + chunk * 8 : 0;
        copy_async16_or_zero(keys + key_place<HD>(token, chunk), k_cache + from, valid);
        copy_async16_or_zero(values + value_place<HD>(token, chunk), v_cache + from, valid);
    }
}

// ---- Decode -------------------------------------------------------------------------------------------------------
template <class T, int HD>
struct Decode {
    static constexpr int WARPS = HD == 256 ? 2 : 4;
    static constexpr int STAGES = HD <= 64 ? 4 : 2;
    static constexpr int HALF_BYTES = PAGE_SIZE * CHUNKS<HD> * 16;  // a page's keys, or its values

    T* out;
    float* partial;
    int* tickets;
    int heads, kv_heads, splits, group;

    DEVICE float* part(int split) const {
        return partial + ((u64(blockIdx.x) * kv_heads + blockIdx.y) * splits + split) * group * (HD + 2);
    }
    DEVICE T* out_head(int h) const { return out + (u64(blockIdx.x) * heads + blockIdx.y * group + h) * HD; }

    /// Starts a warp's copies of a page, of which `count` tokens exist; the others become zero. A head's tokens in a page lie
    /// one after another.
    DEVICE void load_page(unsigned char* keys, const T* k_cache, const T* v_cache, int page, int count) const {
        const int lane = threadIdx.x & 31;
        const u64 first = cache_offset(page, 0, blockIdx.y, kv_heads, HD);
#pragma unroll 4
        for (int i = 0; i < PAGE_SIZE * CHUNKS<HD> / 32; i++) {
            const int token = (lane + i * 32) / CHUNKS<HD>, chunk = (lane + i * 32) % CHUNKS<HD>;
            const bool valid = token < count && chunk < HD / 8;
            const u64 from = first + (valid ? token * HD + chunk * 8 : 0);
            copy_async16_or_zero(keys + key_place<HD>(token, chunk), k_cache + from, valid);
            copy_async16_or_zero(keys + HALF_BYTES + value_place<HD>(token, chunk), v_cache + from, valid);
        }
    }

    /// One warp's pages: `first`, `first + WARPS`, .. below `end`, through a ring of its own.
    DEVICE void walk(Online<T, HD>& online, unsigned char* ring, const T* k_cache, const T* v_cache, const int* pages, int context, int first, int end) const {
        const int lane = threadIdx.x & 31;
        const float scale = LOG2_E * rsqrtf(float(HD));
        auto load = [&](int page, int stage) {
            if (page < end) load_page(ring + stage * 2 * HALF_BYTES, k_cache, v_cache, pages[page], context - page * PAGE_SIZE);
            copy_commit();
        };
        for (int s = 0; s < STAGES - 1; s++) load(first + s * WARPS, s);
        for (int page = first, stage = 0; page < end; page += WARPS) {
            load(page + (STAGES - 1) * WARPS, (stage + STAGES - 1) % STAGES);
            copy_wait<STAGES - 1>();
            __syncwarp();
            const unsigned char* keys = ring + stage * 2 * HALF_BYTES;
            float s[2][4];
            online.template scores<2>(keys, s);
#pragma unroll
            for (int j = 0; j < 2; j++) {
#pragma unroll
                for (int v = 0; v < 4; v++) {
                    const int position = page * PAGE_SIZE + j * 8 + (lane & 3) * 2 + (v & 1);
                    s[j][v] = position < context ? s[j][v] * scale : MINUS_INFINITY;
                }
            }
            online.template accumulate<2>(s, keys + HALF_BYTES);
            __syncwarp();
            stage = (stage + 1) % STAGES;
        }
        copy_wait<0>();
    }

    /// Sum over parts of outputs and weights, each at its own maximum; `of(part, i)` with i < HD: o, HD: m, HD + 1: l.
    template <class Of>
    DEVICE static float merged(int parts, int d, float* m_out, float* l_out, Of of) {
        float m = MINUS_INFINITY, l = 0.0f, o = 0.0f;
        for (int i = 0; i < parts; i++) m = fmaxf(m, of(i, HD));
        const float base = m == MINUS_INFINITY ? 0.0f : m;
        for (int i = 0; i < parts; i++) {
            const float weight = exp2_approx(of(i, HD) - base);
            l += weight * of(i, HD + 1);
            o += weight * of(i, d);
        }
        *m_out = m;
        *l_out = l;
        return o;
    }
    DEVICE static T quotient(float o, float l) { return from_f32<T>(l == 0.0f ? 0.0f : o / l); }

    /// Brings the warps' results together: to `out`, or to this split's part.
    DEVICE void merge_warps(Online<T, HD>& online, float* shared) const {
        constexpr int ROW = HD + 2;
        const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, g = lane >> 2, t = lane & 3;
        online.finish_sums();
        __syncthreads();  // all warps are done with the rings
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float* row = shared + (warp * 16 + g + r * 8) * ROW;
#pragma unroll
            for (int d = 0; d < HD / 8; d++) {
                row[d * 8 + 2 * t] = online.o[d][2 * r];
                row[d * 8 + 2 * t + 1] = online.o[d][2 * r + 1];
            }
            if (t == 0) row[HD] = online.m[r], row[HD + 1] = online.l[r];
        }
        __syncthreads();
        float* mine = part(blockIdx.z);
        for (int i = threadIdx.x; i < group * HD; i += WARPS * 32) {
            const int h = i / HD, d = i % HD;
            float m, l;
            const float o = merged(WARPS, d, &m, &l, [&](int w, int field) { return shared[(w * 16 + h) * ROW + field]; });
            if (splits == 1) {
                out_head(h)[d] = quotient(o, l);
            } else {
                mine[i] = o;
                if (d == 0) mine[group * HD + h] = m, mine[group * (HD + 1) + h] = l;
            }
        }
    }

    /// The last block of a (sequence, KV head) brings the splits together.
    DEVICE void merge_splits() const {
        SHARED(int, arrived, 1);
        int* ticket = tickets + blockIdx.x * kv_heads + blockIdx.y;
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) *arrived = atomicAdd(ticket, 1);
        __syncthreads();
        if (*arrived != splits - 1) return;
        __threadfence();
        if (threadIdx.x == 0) *ticket = 0;
        for (int i = threadIdx.x; i < group * HD; i += WARPS * 32) {
            const int h = i / HD, d = i % HD;
            float m, l;
            const float o = merged(splits, d, &m, &l, [&](int split, int field) {
                return load_l2(part(split) + (field < HD ? h * HD + field : group * field + h));
            });
            out_head(h)[d] = quotient(o, l);
        }
    }

    DEVICE void run(const T* q, const T* k_cache, const T* v_cache, const int* context_len, const int* pages, const int* page_start) const {
        DYNAMIC_SHARED(shared);
        pdl_wait();
        pdl_launch();
        const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, g = lane >> 2;
        const int context = context_len[blockIdx.x], count = (context + PAGE_SIZE - 1) / PAGE_SIZE;
        const int first = int(u64(count) * blockIdx.z / splits), end = int(u64(count) * (blockIdx.z + 1) / splits);
        const T* heads_of_group = q + (u64(blockIdx.x) * heads + blockIdx.y * group) * HD;
        Query<HD> query;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int h = g + r * 8;
            query.row[r] = h < group ? reinterpret_cast<const unsigned char*>(heads_of_group + h * HD) : nullptr;
        }
        Online<T, HD> online(query);
        walk(online, shared + warp * STAGES * 2 * HALF_BYTES, k_cache, v_cache, pages + page_start[blockIdx.x], context, first + warp, end);
        merge_warps(online, reinterpret_cast<float*>(shared));
        if (splits > 1) merge_splits();
    }
};

// ---- Prefill ------------------------------------------------------------------------------------------------------
template <class T, int HD>
struct Prefill {
    static constexpr int ROWS = 64, KEYS = HD == 256 ? 16 : 64;  // registers allow no more
    static constexpr int HALF_BYTES = KEYS * CHUNKS<HD> * 16;

    DEVICE static void run(T* out, const T* q, const T* k_cache, const T* v_cache, const int* query_start, const int* context_len, const int* pages,
                           const int* page_start, const int* tile_seq, const int* tile_first, int heads, int kv_heads) {
        DYNAMIC_SHARED(shared);
        pdl_wait();
        pdl_launch();
        const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, g = lane >> 2, t = lane & 3;
        const int sequence = tile_seq[blockIdx.x], first = tile_first[blockIdx.x], head = blockIdx.y, kv_head = head / (heads / kv_heads);
        const int rows = query_start[sequence + 1] - query_start[sequence], past = context_len[sequence] - rows;
        const int* own_pages = pages + page_start[sequence];
        const int visible = past + min(first + ROWS, rows);  // to the tile's last row
        const int row0 = first + warp * 16 + g;              // of the sequence's query rows: this lane's are row0, row0 + 8

        auto at = [&](int row) { return (u64(query_start[sequence] + row) * heads + head) * HD; };
        Query<HD> query;
#pragma unroll
        for (int r = 0; r < 2; r++) query.row[r] = row0 + r * 8 < rows ? reinterpret_cast<const unsigned char*>(q + at(row0 + r * 8)) : nullptr;
        Online<T, HD> online(query);

        auto load = [&](int key, int stage) {
            unsigned char* keys = shared + stage * 2 * HALF_BYTES;
            if (key < visible) load_tokens<T, HD, KEYS>(keys, keys + HALF_BYTES, k_cache, v_cache, own_pages, key, visible, kv_head, kv_heads);
            copy_commit();
        };
        const float scale = LOG2_E * rsqrtf(float(HD));
        load(0, 0);
        for (int key = 0, stage = 0; key < visible; key += KEYS, stage ^= 1) {
            copy_wait<0>();
            __syncthreads();
            load(key + KEYS, stage ^ 1);
            const unsigned char* keys = shared + stage * 2 * HALF_BYTES;
            float s[KEYS / 8][4];
            online.template scores<KEYS / 8>(keys, s);
            // Only keys after the first row's own position can be masked.
            const bool masked = key + KEYS > past + first + warp * 16 + 1;
#pragma unroll
            for (int j = 0; j < KEYS / 8; j++) {
#pragma unroll
                for (int v = 0; v < 4; v++) {
                    const bool seen = !masked || key + j * 8 + 2 * t + (v & 1) <= past + row0 + (v >> 1) * 8;
                    s[j][v] = seen ? s[j][v] * scale : MINUS_INFINITY;
                }
            }
            online.template accumulate<KEYS / 8>(s, keys + HALF_BYTES);
        }

        online.finish_sums();
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int row = row0 + r * 8;
            if (row >= rows) continue;
            const float scale_out = 1.0f / online.l[r];
            u32* to = reinterpret_cast<u32*>(out + at(row));
#pragma unroll
            for (int d = 0; d < HD / 8; d++) to[d * 4 + t] = pack<T>(online.o[d][2 * r] * scale_out, online.o[d][2 * r + 1] * scale_out);
        }
    }
};
}  // namespace

#define ATTENTION(T, name, HD) \
    extern "C" __global__ void __launch_bounds__(Decode<T, HD>::WARPS * 32) attention_decode_##name( \
        T* out, const T* q, const T* k_cache, const T* v_cache, const int* context_len, const int* pages, const int* page_start, \
        float* partial, int* tickets, int heads, int kv_heads, int splits) { \
        Decode<T, HD>{out, partial, tickets, heads, kv_heads, splits, heads / kv_heads}.run(q, k_cache, v_cache, context_len, pages, page_start); \
    } \
    extern "C" __global__ void __launch_bounds__(128) attention_prefill_##name( \
        T* out, const T* q, const T* k_cache, const T* v_cache, const int* query_start, const int* context_len, const int* pages, \
        const int* page_start, const int* tile_seq, const int* tile_first, int heads, int kv_heads) { \
        Prefill<T, HD>::run(out, q, k_cache, v_cache, query_start, context_len, pages, page_start, tile_seq, tile_first, heads, kv_heads); \
    }

ATTENTION(Bf16, bf16_16, 16)
ATTENTION(Bf16, bf16_32, 32)
ATTENTION(Bf16, bf16_64, 64)
ATTENTION(Bf16, bf16_96, 96)
ATTENTION(Bf16, bf16_128, 128)
ATTENTION(Bf16, bf16_256, 256)
ATTENTION(F16, f16_16, 16)
ATTENTION(F16, f16_32, 32)
ATTENTION(F16, f16_64, 64)
ATTENTION(F16, f16_96, 96)
ATTENTION(F16, f16_128, 128)
ATTENTION(F16, f16_256, 256)
