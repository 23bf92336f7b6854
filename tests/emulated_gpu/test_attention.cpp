// attention_decode and attention_prefill against softmax in double precision. Pages are shuffled, slots that hold no
// token are NaN. Tolerance: weights rounded to T once and the output once, each by half a unit in the last place.
#include "harness.h"

#include "attention.cu"

using namespace test;

struct Case {
    int heads, kv_heads;
    std::vector<int> contexts, queries;  // queries empty: decode
    int splits = 1;
    bool far_below_zero = false;  // all scores near -200
};

template <class T, int HD>
struct Attention {
    Case c;
    int sequences;
    std::vector<int> page_start{0}, query_start{0}, pages;
    std::unique_ptr<Buffer<T>> k, v, q, out;

    Attention(Case what) : c(std::move(what)), sequences(int(c.contexts.size())) {
        int total = 0;
        for (int context : c.contexts) total += (context + 15) / 16;
        std::vector<int> ids(total + 3);
        for (size_t i = 0; i < ids.size(); i++) ids[i] = int(i);
        std::shuffle(ids.begin(), ids.end(), random_bits());
        k = std::make_unique<Buffer<T>>(ids.size() * c.kv_heads * 16 * HD), v = std::make_unique<Buffer<T>>(k->size);
        for (int s = 0, used = 0; s < sequences; s++) {
            for (int i = 0; i < (c.contexts[s] + 15) / 16; i++) pages.push_back(ids[used++]);
            page_start.push_back(int(pages.size()));
            query_start.push_back(query_start.back() + (c.queries.empty() ? 1 : c.queries[s]));
            for (int p = 0; p < c.contexts[s]; p++)
                for (int h = 0; h < c.kv_heads; h++)
                    for (int d = 0; d < HD; d++) {
                        float key = normal();
                        (*k)[at(s, p, h) + d] = narrow<T>(c.far_below_zero && d == 0 ? 8.0f : key);
                        (*v)[at(s, p, h) + d] = narrow<T>(normal());
                    }
        }
        q = std::make_unique<Buffer<T>>(size_t(query_start.back()) * c.heads * HD), out = std::make_unique<Buffer<T>>(q->size);
        q->random(1.5f);
        if (c.far_below_zero)
            for (size_t i = 0; i < q->size; i += HD) (*q)[i] = narrow<T>(-25.0f * std::sqrt(float(HD)));
        if (pages.empty()) pages.push_back(0);
    }
    size_t at(int s, int p, int h) const { return ((size_t(pages[page_start[s] + p / 16]) * c.kv_heads + h) * 16 + p % 16) * HD; }

    void check(const std::string& name) {
        for (int s = 0; s < sequences; s++) {
            int rows = query_start[s + 1] - query_start[s];
            for (int r = 0; r < rows; r++)
                for (int h = 0; h < c.heads; h++) check_row(name, s, query_start[s] + r, h, c.contexts[s] - rows + r + 1);
        }
    }
    void check_row(const std::string& name, int s, int row, int h, int visible) {
        const int kv = h / (c.heads / c.kv_heads);
        const size_t base = (size_t(row) * c.heads + h) * HD;
        std::vector<double> weight(std::max(visible, 0)), sum(HD), size(HD);
        double largest = -INFINITY, total = 0;
        for (int p = 0; p < visible; p++) {
            double score = 0;
            for (int d = 0; d < HD; d++) score += wide((*q)[base + d]) * wide((*k)[at(s, p, kv) + d]);
            weight[p] = score / std::sqrt(double(HD));
            largest = std::max(largest, weight[p]);
        }
        for (int p = 0; p < visible; p++) {
            weight[p] = std::exp(weight[p] - largest);
            total += weight[p];
            for (int d = 0; d < HD; d++) {
                double term = weight[p] * wide((*v)[at(s, p, kv) + d]);
                sum[d] += term, size[d] += std::fabs(term);
            }
        }
        for (int d = 0; d < HD; d++) {
            double want = visible > 0 ? sum[d] / total : 0, magnitude = visible > 0 ? size[d] / total : 0;
            double f32 = c.far_below_zero ? 2e-4 : 3e-5;  // an f32 score of -200 is known to 2^-17
            close(name, base + d, wide((*out)[base + d]), want, 1.02 * HALF_ULP<T> * (magnitude + std::fabs(want)) + f32);
        }
    }

    void decode(auto kernel) {
        std::string name = text("attention_decode_%s_%d", NAME<T>, HD);
        current_case() = text("%s heads=%d kv=%d splits=%d first context=%d", name.c_str(), c.heads, c.kv_heads, c.splits, c.contexts[0]);
        Buffer<int> context = ints(c.contexts), list = ints(pages), start = ints(page_start), tickets(size_t(sequences) * c.kv_heads);
        Buffer<float> partial(c.splits > 1 ? size_t(sequences) * c.heads * c.splits * (HD + 2) : 1);
        tickets.fill(0);
        launch(name.c_str(), {unsigned(sequences), unsigned(c.kv_heads), unsigned(c.splits)}, HD == 256 ? 64 : 128, HD <= 32 ? 32768 : HD == 96 ? 49152 : 65536, {*q, *k, *v}, [&] {
            kernel(out->get(), q->get(), k->get(), v->get(), context.get(), list.get(), start.get(), partial.get(), tickets.get(), c.heads, c.kv_heads, c.splits);
        });
        tickets_are_zero(tickets);
        check(name);
    }
    void prefill(auto kernel) {
        std::string name = text("attention_prefill_%s_%d", NAME<T>, HD);
        current_case() = text("%s heads=%d kv=%d first context=%d queries=%d", name.c_str(), c.heads, c.kv_heads, c.contexts[0], c.queries[0]);
        std::vector<int> sequence, first;
        for (int s = 0; s < sequences; s++)
            for (int r = 0; r < c.queries[s]; r += 64) sequence.push_back(s), first.push_back(r);
        Buffer<int> rows = ints(query_start), context = ints(c.contexts), list = ints(pages), start = ints(page_start), tile_seq = ints(sequence), tile_first = ints(first);
        launch(name.c_str(), {unsigned(sequence.size()), unsigned(c.heads)}, 128, HD <= 32 ? 16384 : HD == 64 || HD == 256 ? 32768 : HD == 96 ? 49152 : 65536, {*q, *k, *v}, [&] {
            kernel(out->get(), q->get(), k->get(), v->get(), rows.get(), context.get(), list.get(), start.get(), tile_seq.get(), tile_first.get(), c.heads, c.kv_heads);
        });
        check(name);
    }
};

template <class T, int HD>
void both(auto decode, auto prefill) {
    for (const Case& c : {Case{1, 1, {1}, {}}, {4, 1, {15, 16, 17, 100}, {}, 1}, {16, 2, {1, 33, 129}, {}, 3}, {16, 1, {70, 257}, {}, 2}, {6, 2, {5, 200, 0}, {}, 7},
                          {2, 2, {40}, {}, 2, true}}) {
        Attention<T, HD>(c).decode(decode);
    }
    for (const Case& c : {Case{1, 1, {1}, {1}}, {4, 1, {17, 64, 5}, {17, 64, 2}}, {6, 2, {130, 81, 16}, {70, 1, 15}}, {2, 1, {193}, {129}}, {1, 1, {40}, {20}, 1, true}}) {
        Attention<T, HD>(c).prefill(prefill);
    }
}

void cases() {
    both<Bf16, 16>(attention_decode_bf16_16, attention_prefill_bf16_16);
    both<Bf16, 32>(attention_decode_bf16_32, attention_prefill_bf16_32);
    both<Bf16, 64>(attention_decode_bf16_64, attention_prefill_bf16_64);
    both<Bf16, 96>(attention_decode_bf16_96, attention_prefill_bf16_96);
    both<Bf16, 128>(attention_decode_bf16_128, attention_prefill_bf16_128);
    both<Bf16, 256>(attention_decode_bf16_256, attention_prefill_bf16_256);
    both<F16, 16>(attention_decode_f16_16, attention_prefill_f16_16);
    both<F16, 32>(attention_decode_f16_32, attention_prefill_f16_32);
    both<F16, 64>(attention_decode_f16_64, attention_prefill_f16_64);
    both<F16, 96>(attention_decode_f16_96, attention_prefill_f16_96);
    both<F16, 128>(attention_decode_f16_128, attention_prefill_f16_128);
    both<F16, 256>(attention_decode_f16_256, attention_prefill_f16_256);
}
int main(int argc, char** argv) { return main_of(argc, argv, cases); }
