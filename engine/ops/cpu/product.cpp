// Products with quantized weights take integer activations, int8 or 15 bits, with a float32 scale
// per 32 columns: dot products of a group are exact integers, groups are summed in float32.

#include "product.h"

#include <algorithm>

#include "k_block.h"

namespace gdn {
namespace {

// The integers that `dot_words` multiplies are larger than the weight's by so much.
template <typename F>
constexpr int offset_of() {
#if defined(__AVX512VNNI__)
    return F::ZERO + (F::SIGNED ? 128 : 0);
#else
    return F::ZERO;
#endif
}

// dot[t][p] += Σ word · x[t] over words FIRST … LAST - 1 of a k-block, for the W rows of each part
// p.
template <typename F, int FIRST, int LAST, bool FINE, int NT>
GDN_INLINE void dot_words(const uint8_t* planes, const int8_t* const* x, vi (*dot)[PARTS]) {
    // Where a k-block's low bytes lie, which int8 alone are.
    constexpr int LOW = FINE ? K_BLOCK : 0;
#if defined(__AVX512VNNI__)
    __m512i low[NT], high[NT];
    for (int t = 0; t < NT; t++) {
        low[t] = reinterpret_cast<__m512i>(dot[t][0]);
        high[t] = _mm512_setzero_si512();
    }
    const auto add = [](__m512i sum, __m512i w, const int8_t* x) __attribute__((always_inline)) {
        return _mm512_dpbusd_epi32(sum, w, _mm512_set1_epi32(load_as<int>(x)));
    };
    for_constants<FIRST, LAST>([&](auto i) __attribute__((always_inline)) {
        __m512i w = reinterpret_cast<__m512i>(word<F, i>(planes, 0));
        // The instruction takes unsigned weights: 128 is added, which `offset_of` subtracts.
        if (F::SIGNED) w = _mm512_xor_si512(w, _mm512_set1_epi8(-128));
#pragma GCC unroll 8
        for (int t = 0; t < NT; t++) {
            low[t] = add(low[t], w, x[t] + LOW + 4 * i);
            if (FINE) high[t] = add(high[t], w, x[t] + 4 * i);
        }
    });
    for (int t = 0; t < NT; t++)
        dot[t][0] = reinterpret_cast<vi>(low[t]) + (reinterpret_cast<vi>(high[t]) << 7);
#elif defined(__AVX2__)
    // The sum of so many words' products fits into 16 bits.
    constexpr int CHAIN = F::SIGNED ? 1 : F::WIDTH <= 4 ? 8 : F::WIDTH == 5 ? 4 : 2;
    constexpr int N = FINE ? 2 : 1;
    const __m256i units[2] = {_mm256_set1_epi16(1), _mm256_set1_epi16(128)};
    __m256i pairs[NT][PARTS][2];
    for_constants<FIRST, LAST>([&](auto i) __attribute__((always_inline)) {
        const bool begins = (i - FIRST) % CHAIN == 0;
        const bool ends = (i - FIRST) % CHAIN == CHAIN - 1 || i == LAST - 1;
#pragma GCC unroll 2
        for (int p = 0; p < PARTS; p++) {
            const __m256i w = reinterpret_cast<__m256i>(word<F, i>(planes, p));
            const __m256i size = F::SIGNED ? _mm256_abs_epi8(w) : w;
#pragma GCC unroll 16
            for (int j = 0; j < NT * N; j++) {
                const int t = j / N, high = j % N;
                const auto* at = x[t] + 4 * i + (high ? 0 : LOW);
                const __m256i a = _mm256_set1_epi32(load_as<int>(at));
                const __m256i signed_a = F::SIGNED ? _mm256_sign_epi8(a, w) : a;
                const __m256i product = _mm256_maddubs_epi16(size, signed_a);
                __m256i& sum = pairs[t][p][high];
                sum = begins ? product : _mm256_add_epi16(sum, product);
                if (ends) dot[t][p] += reinterpret_cast<vi>(_mm256_madd_epi16(sum, units[high]));
            }
        }
    });
#else
    for (int p = 0; p < PARTS; p++) {
        vi words[LAST - FIRST];
        for_constants<FIRST, LAST>([&](auto i) { words[i - FIRST] = word<F, i>(planes, p); });
        // Unrolled, this takes half a minute to compile.
#pragma GCC unroll 1
        for (int i = FIRST; i < LAST; i++)
            for (int j = 0; j < 4; j++) {
                // Byte j of each lane, with its sign or without.
                const vi w = words[i - FIRST];
                const vi b = F::SIGNED ? (w << (24 - 8 * j)) >> 24 : (w >> 8 * j) & 255;
                for (int t = 0; t < NT; t++) {
                    const int8_t* at = x[t] + 4 * i + j;
                    dot[t][p] += b * (at[LOW] + (FINE ? 128 * at[0] : 0));
                }
            }
    }
#endif
}

// K-blocks of a run: those of a super-block, or as many where there are none.
constexpr int64_t RUN = SUPER_K_BLOCKS;

// What products take from a row's sums, for all groups of a run. `start` is where a group's dot
// product begins: it takes the weight's offset away. `scaled` multiplies the group's min.
template <typename F>
struct RunSums {
    int32_t start[RUN * F::GROUPS];
    float scaled[RUN * F::GROUPS];

    GDN_INLINE void read(const Row& row, int64_t first, int64_t n) {
        for (int64_t r = 0; r < n; r++)
            for_constants<0, F::GROUPS>([&](auto g) __attribute__((always_inline)) {
                const int64_t at = r * F::GROUPS + g;
                if constexpr (offset_of<F>() != 0)
                    start[at] = -offset_of<F>() * sum_of<F, g>(row, first + r);
                if constexpr (F::HAS_MIN) scaled[at] = scaled_sum<F, g>(row, first + r);
            });
    }
};

// acc[t] += scale · (dot - ZERO · sum) for group G of k-block r of a run.
template <typename F, int G, bool FINE, int NT>
GDN_INLINE void add_group(const uint8_t* k_block, const Row* rows, int64_t first, int64_t r,
                          const RunSums<F>* sums, vf (*acc)[PARTS]) {
    constexpr int N = WORDS / F::GROUPS;
    const int64_t i = first + r;
    const int8_t* x[NT];
    vi dot[NT][PARTS];
    for (int t = 0; t < NT; t++) {
        x[t] = rows[t].q + i * (FINE ? 2 * K_BLOCK : K_BLOCK);
        const vi start = offset_of<F>() ? splat(sums[t].start[r * F::GROUPS + G]) : vi{};
        for (int p = 0; p < PARTS; p++) dot[t][p] = start;
    }
    dot_words<F, G * N, (G + 1) * N, FINE, NT>(k_block + F::HEAD_BYTES, x, dot);
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; p++) {
        const vf scale = scale_of<F, G>(k_block, p);
#pragma GCC unroll 8
        for (int t = 0; t < NT; t++) add_scaled(acc[t][p], dot[t][p], scale, rows[t].scale[i]);
    }
}

// acc[t] -= min · sum for one group of columns.
template <typename F, int G, int NT>
GDN_INLINE void subtract_mins(const uint8_t* k_block, int64_t r, const RunSums<F>* sums,
                              vf (*acc)[PARTS]) {
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; p++) {
        const vf min = min_of<F, G>(k_block, p);
#pragma GCC unroll 8
        for (int t = 0; t < NT; t++)
            subtract_min(acc[t][p], min, sums[t].scaled[r * F::GROUPS + G]);
    }
}

// Calls f with (k-block, its number, group) for all groups of the n k-blocks of a run.
template <typename F, typename Body>
GDN_INLINE void for_groups(const uint8_t* block, int64_t n, Body f) {
    block += F::SUPER_HEAD;
    for (int64_t r = 0; r < n; r++, block += F::K_BLOCK_BYTES)
        for_constants<0, F::GROUPS>([&](auto group)
                                        __attribute__((always_inline)) { f(block, r, group); });
}

// out[t] [16] = the panel's rows times row t. Sums in units of a super-block's scales are
// multiplied by those once per super-block.
template <int NT, bool FINE, typename F>
inline void panel_product(F, const uint8_t* panel, int64_t n_in, const Row* rows,
                          float (*out)[PANEL]) {
    vf acc[NT][PARTS] = {};
    for (int64_t i = 0; i < n_in / K_BLOCK; i += RUN, panel += F::SUPER_BYTES) {
        const int64_t n = std::min(RUN, n_in / K_BLOCK - i);
        RunSums<F> sums[NT];
        for (int t = 0; t < NT; t++) sums[t].read(rows[t], i, n);
        vf scaled[NT][PARTS] = {}, mins[NT][PARTS] = {};
        for_groups<F>(panel, n,
                      [&](const uint8_t* k_block, int64_t r, auto group)
                          __attribute__((always_inline)) {
                              if (group == 0) prefetch_ahead<F::K_BLOCK_BYTES>(k_block);
                              add_group<F, group, FINE, NT>(k_block, rows, i, r, sums,
                                                            F::IS_SUPER ? scaled : acc);
                              if constexpr (F::HAS_MIN && !F::IS_SUPER)
                                  subtract_mins<F, group, NT>(k_block, r, sums, acc);
                          });
        if constexpr (F::HAS_MIN && F::IS_SUPER)
            for_groups<F>(panel, n,
                          [&](const uint8_t* k_block, int64_t r, auto group)
                              __attribute__((always_inline)) {
                                  subtract_mins<F, group, NT>(k_block, r, sums, mins);
                              });
        if constexpr (F::IS_SUPER)
            for (int p = 0; p < PARTS; p++)
                for (int t = 0; t < NT; t++) {
                    acc[t][p] = fma(scaled[t][p], super_of<F>(panel, p), acc[t][p]);
                    if (F::HAS_MIN)
                        acc[t][p] = fma(mins[t][p], super_of<F>(panel, PARTS + p), acc[t][p]);
                }
    }
    for (int t = 0; t < NT; t++)
        for (int p = 0; p < PARTS; p++) store(out[t] + p * W, acc[t][p]);
}

// Column k (and of BF16 k + 1) of the W rows of part p.
template <Layout L>
GDN_INLINE vf column(const uint8_t* panel, int64_t k, int p) {
    if (L == L_F32) return load(reinterpret_cast<const float*>(panel) + k * PANEL + p * W);
    if (L == L_F16)
        return half_to_float(reinterpret_cast<const uint16_t*>(panel) + k * PANEL + p * W);
    const vi pair = load_as<vi>(panel + k / 2 * WORD_BYTES + p * 4 * W);
    return from_bits(k % 2 ? pair & static_cast<int32_t>(0xffff0000) : pair << 16);
}

template <int NT, bool, Layout L>
inline void panel_product(Plain<L>, const uint8_t* panel, int64_t n_in, const Row* rows,
                          float (*out)[PANEL]) {
    // Separate sums of every CHAINS-th column: their additions don't wait for each other.
    constexpr int CHAINS = 4, COLUMN_BYTES = PANEL * (L == L_F32 ? 4 : 2);
    constexpr int STEP_BYTES = CHAINS * COLUMN_BYTES;
    vf acc[NT][CHAINS][PARTS] = {};
    int64_t k = 0;
    for (; k + CHAINS <= n_in; k += CHAINS) {
        prefetch_ahead<STEP_BYTES>(panel + k * COLUMN_BYTES);
#pragma GCC unroll 4
        for (int c = 0; c < CHAINS; c++)
#pragma GCC unroll 4
            for (int p = 0; p < PARTS; p++) {
                const vf w = column<L>(panel, k + c, p);
#pragma GCC unroll 4
                for (int t = 0; t < NT; t++)
                    acc[t][c][p] = fma(w, splat(rows[t].x[k + c]), acc[t][c][p]);
            }
    }
    for (; k < n_in; k++)
        for (int p = 0; p < PARTS; p++)
            for (int t = 0; t < NT; t++)
                acc[t][0][p] = fma(column<L>(panel, k, p), splat(rows[t].x[k]), acc[t][0][p]);
    for (int t = 0; t < NT; t++)
        for (int p = 0; p < PARTS; p++)
            store(out[t] + p * W, (acc[t][0][p] + acc[t][1][p]) + (acc[t][2][p] + acc[t][3][p]));
}

// The same for n rows of one kind.
template <bool FINE, typename F>
void multiply_rows(F f, const uint8_t* panel, int64_t n_in, const Row* rows, int64_t n,
                   float (*out)[PANEL]) {
    constexpr int NT = is_plain(F{}) && PARTS > 1 ? 2 : 4;
    int64_t i = 0;
    for (; i + NT <= n; i += NT) panel_product<NT, FINE>(f, panel, n_in, rows + i, out + i);
    switch (n - i) {
        case 3: return panel_product<3, FINE>(f, panel, n_in, rows + i, out + i);
        case 2: return panel_product<2, FINE>(f, panel, n_in, rows + i, out + i);
        case 1: return panel_product<1, FINE>(f, panel, n_in, rows + i, out + i);
    }
}

}  // namespace

void multiply(int32_t layout, const uint8_t* panel, int64_t n_in, const Row* rows, int64_t n,
              float (*out)[PANEL]) {
    with_format(layout, [&](auto f) {
        for (int64_t begin = 0, end = 0; begin < n; begin = end) {
            const bool is_fine = !is_plain(f) && rows[begin].is_fine;
            while (end < n && (is_plain(f) || rows[end].is_fine == is_fine)) end++;
            if constexpr (!is_plain(f))
                if (is_fine) {
                    multiply_rows<true>(f, panel, n_in, rows + begin, end - begin, out + begin);
                    continue;
                }
            multiply_rows<false>(f, panel, n_in, rows + begin, end - begin, out + begin);
        }
    });
}

}  // namespace gdn
